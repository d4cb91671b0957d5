"""The lottery with the recipe of the DataEfficientLTH release.

The convolutions of a ResNet-18, on CIFAR-10 with 500 labels of every class: a fifth of
the rest goes in every round, back to the end of epoch 3. Here the last step counts and
not the best epoch on the test set, and a round goes on from epoch 3 to epoch 200.

    python -m experiments.data_efficient_lth
    python -m experiments.data_efficient_lth --rounds=5 --samples_per_class=100
"""

import dataclasses

from experiments import cli, lottery
from experiments.task import PrunableName


@dataclasses.dataclass(frozen=True)
class Config(lottery.Config):
    """The flags of `experiments.lottery`, with the defaults of the recipe."""

    dataset: str = "cifar10"
    samples_per_class: int = 500
    model: str = "resnet18"
    sparsity: float | None = None
    rounds: int = 15
    prunable: PrunableName = "convolutions"
    epochs: int = 200
    rewind_fraction: float = 3 / 200
    batch_size: int = 100
    shift: int = 4
    flip: bool = True
    report_every: int = 500


if __name__ == "__main__":
    cli.main(lottery.run, Config)
