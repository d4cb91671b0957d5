"""The sections of `experiments.benchmark`, one file each, and what they share.

measure    candidates take turns; memory and bytes of compiled programs
workload   what is measured, and how large it is on this backend
refresh    masks: every rule against sorting, numpy and torch
steps      optimiser steps: running and compiling them
training   whole training steps: one large network, many small ones
memory     the estimate of a training's memory against what it takes
targets    the figures the library is held to
"""
