"""The lottery with the recipe of the DataEfficientLTH release.

The convolutions of a ResNet-18, on CIFAR-10 with 500 labels of every class: a fifth of
the rest goes in every round, back to the end of epoch 3. Here the last step counts and
not the best epoch on the test set, and a round runs from epoch 3 to epoch 200.

    python -m experiments.data_efficient_lth
    python -m experiments.data_efficient_lth --samples_per_class=100 --seeds=3
"""

import dataclasses

from d2sparse.study import cli
from d2sparse.study.flags import PrunableName
from experiments import lottery

ROUNDS = 15


@dataclasses.dataclass(frozen=True)
class Config(lottery.Config):
    """What is pruned, with the defaults of the recipe."""

    dataset: str = "cifar10"  # any TFDS image classification set
    samples_per_class: int = 500  # training labels of every class; 0 for all
    model: str = "resnet18"  # network, by its name in d2sparse.models
    rounds: int = ROUNDS  # prunings, each of the same part of the live weights
    sparsity: float = 1 - 0.8**ROUNDS  # zeros after the last round
    prunable: PrunableName = "convolutions"  # what may be pruned
    epochs: float = 200.0  # passes over the labels in one round
    rewind_fraction: float = 3 / 200  # part of a round whose weights are rewound to
    batch_size: int = 100  # examples per step
    shift: int = 4  # augmentation: random crop after padding by so many pixels
    flip: bool = True  # augmentation: mirror left and right
    report_every: int = 500  # steps between two measurements


if __name__ == "__main__":
    cli.main(lottery.run, Config)
