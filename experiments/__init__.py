"""Runnable studies: `python -m experiments.NAME --flag=value`."""
