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

import pandas as pd

from d2sparse import study
from d2sparse.constraints import METHODS
from d2sparse.models import Model
from d2sparse.study import cli, compression

STRENGTHS = (1e-4, 4e-4, 1.6e-3)


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """What is compressed."""

    # What to compare: each makes something unnecessary, and removes it.
    methods: tuple[study.MethodName, ...] = (
        *("dense", "thresholded", "l2_thresholded", "lobster", "serene_lower"),
    )
    # Of a decay in a step; not multiplied by the learning rate. 0: three are compared.
    decay_strength: float = 0.0
    samples_per_class: int = 0  # training labels of every class; 0 for all
    steps: int = 3000  # optimiser steps of one training
    seeds: int = 3  # runs of every method: labels, weights and order differ
    shift: int = 0  # augmentation: random crop after padding by so many pixels


def run(config: Config, model: Model | None = None) -> pd.DataFrame:
    """Trains what has not finished yet, and reports on all of it: a row a run."""
    used = study.flags_used([METHODS[name] for name in config.methods], config)
    is_open = not config.decay_strength and "decay_strength" not in config.axes
    if "decay_strength" in used and is_open:
        axes = {**config.axes, "decay_strength": STRENGTHS}
        config = dataclasses.replace(config, axes=axes)
    experiment = study.Experiment(
        "compress", ("dense",), examine=compression.examine, report=compression.report
    )
    return study.compare(config, experiment, model=model)


if __name__ == "__main__":
    cli.main(run, Config)
