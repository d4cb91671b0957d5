"""Does compressing a network harm what it is worth on another task?

Source networks that are dense, pruned or of few bits, all from one dense run, are put
on a target task: by a visual prompt and a label map in front of and behind the frozen
network, by a linear probe on its features, and by fine-tuning under its masks. Tables
have accuracies for every number of labels, differences to the dense network paired by
source network, and calibration before and after temperature scaling; claims are decided
by a rule that was fixed in advance: a mean difference beyond twice its standard error.

    python -m experiments.transfer
    python -m experiments.transfer --dataset=mnist --classes= --data_dir=TFDS
    python -m experiments.transfer --source=resnet20.npz --source_dataset=cifar10 \
        --classes= --data_dir=TFDS --source_seed=0
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import pandas as pd

from d2sparse import data, study
from d2sparse.constraints import TRANSFER_METHODS, TransferOptions
from d2sparse.data import Source
from d2sparse.study import cli, sources, transfers

_Name = Literal[*TRANSFER_METHODS]


_NO_MEANING = {
    "ticket": "source networks come from --source",
    "model": "the network is that of --source_model or --source",
    "width": "the network is that of --source_model or --source",
    "optimizer": "every way has Adam",
    "learning_rate": "each way has a rate of its own, such as --prompt_rate",
}


def _axes() -> dict[str, tuple[Any, ...]]:
    return {
        "compression": ("dense", "one_shot80", "imp80", "ptq4", "qat4", "imp80_ptq4"),
        "source_seed": (0, 1, 2),
        "samples_per_class": (1, 10),
    }


@dataclasses.dataclass(frozen=True)
class Config(sources.SourceFlags, TransferOptions, study.Config):
    """What is compared."""

    HIDDEN = (*_NO_MEANING, *study.unread_options(()))

    # Ways to the target: a prompt with one of four label maps, a probe, fine-tuning.
    methods: tuple[_Name, ...] = (
        *("prompted_random", "prompted_frequency", "prompted_iterative"),
        *("probed", "fine_tuned"),
    )
    classes: str = "5-9"  # of the target, FIRST-LAST; empty: all
    steps: int = 300  # of a training on the target
    seeds: int = 1  # of every source network: labels, prompts and order differ
    shift: int = 0  # augmentation: random crop after padding by so many pixels
    axes: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=_axes)

    def __post_init__(self) -> None:
        """Refuses values out of their ranges."""
        sources.SourceFlags.__post_init__(self)
        TransferOptions.__post_init__(self)
        study.Config.__post_init__(self)


def run(config: Config, target: Source | None = None) -> pd.DataFrame:
    """Trains what has not finished yet, and reports on all of it: a row a run.

    Raises:
      ValueError: something in the configuration has no meaning or cannot be done.
    """
    study.refuse(config, _NO_MEANING)
    target = target or data.load(config.dataset, config.data_dir)
    if config.classes:
        target = data.only_classes(target, config.classes)
    return transfers.transfer(config, target)


if __name__ == "__main__":
    cli.main(run, Config)
