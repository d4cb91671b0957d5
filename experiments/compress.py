r"""What does it cost to do with fewer weights, neurons and layers?

Penalties and decays that make weights, neurons or whole layers unnecessary, each with
what removes them, over strengths and seeds. Tables and figures show accuracy against
the compression ratio, against neurons and activation functions that are left, and the
ON/OFF entropy of layers as the training goes on. All methods of a seed see the same
labels, initial weights and batches.

    python -m experiments.compress
    python -m experiments.compress --methods=imp,imp_distilled --label_noise=0.4 \
      --rewinding=learning_rate --rewind_fraction=0 --rounds=24 --sparsity=0.999
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pandas as pd

from d2sparse import study
from d2sparse.models import Model
from d2sparse.study import cli, compression


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """What is compressed."""

    # What to compare: each makes something unnecessary, and removes it.
    methods: tuple[study.MethodName, ...] = (
        *("dense", "thresholded", "l2_thresholded", "lobster", "serene_lower"),
    )
    samples_per_class: int = 0  # training labels of every class; 0 for all
    steps: int = 3000  # optimiser steps of one training
    seeds: int = 3  # runs of every method: labels, weights and order differ
    shift: int = 0  # augmentation: random crop after padding by so many pixels
    axes: Mapping[str, tuple[Any, ...]] = dataclasses.field(
        default_factory=lambda: {"decay_strength": (1e-4, 4e-4, 1.6e-3)}
    )


def run(config: Config, model: Model | None = None) -> pd.DataFrame:
    """Trains what has not finished yet, and reports on all of it: a row a run."""
    experiment = study.Experiment(
        "compress", ("dense",), examine=compression.examine, report=compression.report
    )
    return study.compare(config, experiment, model=model)


if __name__ == "__main__":
    cli.main(run, Config)
