"""The names of the methods, and the flags that they can be varied by."""

import dataclasses
from typing import Literal, get_args

from d2sparse.constraints.options import (
    DistributionName,
    PatternName,
    ScoreName,
    read_table,
)
from experiments.task import PrunableName, check_choice, check_least

RecipeName = Literal[
    "dense",
    "fixed",
    "random",
    "static",
    "one_shot",
    "gradual",
    "movement",
    "set",
    "rigl",
    "sparse_momentum",
    "granet",
    "ac_dc",
    "top_kast",
    "sr_ste",
    "str",
    "powerprop",
    "snip",
    "grasp",
    "synflow",
    "fisher",
    "wanda",
]
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)
LEARNED_SPARSITY: tuple[RecipeName, ...] = ("str",)  # They cannot be told one.

_CHOICES = {
    "distribution": get_args(DistributionName),
    "pattern": get_args(PatternName),
}
_LEAST = {
    "backward_density": 1,
    "score_samples": 1,
    "power": 1,
    "threshold_decay": 0,
}


@dataclasses.dataclass(frozen=True)
class MaskOptions:
    """Flags of the masks of all sparse methods."""

    # How layers share the live weights; auto is erk for static, set, rigl and
    # sparse_momentum, uniform for wanda, and global for all others.
    distribution: DistributionName = "auto"
    # Sparsities of single leaves as pattern:sparsity, such as head/*:0.5; the others
    # share what is left by the distribution, and by erk where that is global.
    layer_sparsities: tuple[str, ...] = ()
    pattern: PatternName = "unstructured"  # which weights live and die together
    group: int = 4  # m of n:m, in the pattern n_of_m and in sr_ste; side of blocks
    prunable: PrunableName = "kernels"  # body leaves the first layer and the head dense


@dataclasses.dataclass(frozen=True)
class Options(MaskOptions):
    """Flags that the recipes can be varied by."""

    score: ScoreName = "magnitude"  # what one_shot and gradual prune by
    # Part of the live weights that set, rigl, sparse_momentum and granet move at the
    # start; falls to 0 along a cosine.
    drop_fraction: float = 0.3
    # Part of the run after which one_shot, powerprop and wanda prune.
    prune_at: float = 0.5
    start_sparsity: float = 0.5  # of the random pattern that granet begins with
    backward_density: float = 2.0  # weights top_kast trains for each one that it uses
    score_samples: int = 256  # examples that snip, grasp, fisher and wanda look at
    power: float = 2.0  # alpha of powerprop, whose weights are theta |theta|^(alpha-1)
    # Weight decay on the thresholds of str: the larger it is, and the longer the run,
    # the sparser the network, until no weight is left.
    threshold_decay: float = 0.03


def check_masks(options: MaskOptions) -> None:
    """Refuses flags of masks that are out of their range.

    Raises:
      ValueError: naming the flag.
    """
    for name, choices in _CHOICES.items():
        check_choice(name, getattr(options, name), choices)
    check_least(options, {"group": 1})
    read_table(options.layer_sparsities)


def check_options(options: Options) -> None:
    """Refuses flags that are out of their range.

    Raises:
      ValueError: naming the flag.
    """
    check_masks(options)
    check_choice("score", options.score, get_args(ScoreName))
    for name in ("drop_fraction", "prune_at", "start_sparsity"):
        if not 0 <= getattr(options, name) < 1:
            raise ValueError(f"expected {name} in [0, 1), got {getattr(options, name)}")
    check_least(options, _LEAST)
