"""The command `python -m experiments.benchmark`."""

from d2sparse.study import cli
from experiments import benchmark

if __name__ == "__main__":
    cli.main(benchmark.run, benchmark.Config)
