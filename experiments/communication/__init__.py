"""What a refresh of sharded masks communicates, for `experiments.scaling`.

trees        the networks: shapes of their kernels
sharding     how a leaf lies on the devices
methods      the refreshes that are compared
formulae     bytes, calls, time and memory of a refresh
programs     refreshes and sorts, compiled for devices that there are
collectives  the operations between devices, read off a compiled program
check        the formulae beside compiled programs
"""
