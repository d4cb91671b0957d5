"""Which weights can a network do without, and when should they go?

Any method that prunes or keeps networks sparse, on any model and data set, over several
sparsities and seeds. All methods of a seed see the same labels, initial weights and
batches, and differences to the dense network are paired. Figures show accuracy against
sparsity, and how it was learned.

    python -m experiments.prune
    python -m experiments.prune --methods=rigl --sparsity=0.98 --seeds=1
    python -m experiments.prune --methods=dense,sr_ste --sparsity=0.5,0.75 --group=4
    python -m experiments.prune --dataset=cifar10 --model=resnet20s --shift=4 --flip
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pandas as pd

from d2sparse import study
from d2sparse.study import cli

SPARSITIES = (0.8, 0.9, 0.95, 0.98)


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """What is pruned."""

    # What to compare; fixed keeps the masks it starts with, those of a --ticket.
    methods: tuple[study.MethodName, ...] = (
        "dense",
        "static",
        "gradual",
        "set",
        "rigl",
    )
    axes: Mapping[str, tuple[Any, ...]] = dataclasses.field(
        default_factory=lambda: {"sparsity": SPARSITIES}
    )


def run(config: Config) -> pd.DataFrame:
    """Trains what has not finished yet, and reports on all of it: a row a run."""
    return study.compare(config, study.Experiment("prune", ("dense",)))


if __name__ == "__main__":
    cli.main(run, Config)
