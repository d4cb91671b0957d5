"""The command `python -m experiments.benchmark`."""

from experiments import benchmark, cli

if __name__ == "__main__":
    cli.main(benchmark.run, benchmark.Config)
