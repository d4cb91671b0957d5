"""The numbers and choices that methods can be varied by."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Literal, get_args

from d2sparse import distributions, masks, scores
from d2sparse.checks import check_choice, check_least
from d2sparse.constraints.decayed import Normalise
from d2sparse.constraints.found_scales import InputScales
from d2sparse.constraints.growing import Moves
from d2sparse.constraints.lottery import Rewinds
from d2sparse.constraints.masked import Structure
from d2sparse.constraints.thresholded import Search
from d2sparse.distributions import Distribution, check_sparsity
from d2sparse.dual import Coupling
from d2sparse.masks import Selection
from d2sparse.quantisation import ScaleName, check_bits
from d2sparse.scores import Score

DistributionName = Literal["auto", "global", "uniform", "er", "erk"]
PatternName = Literal["unstructured", "n_of_m", "blocks", "channels"]
ScoreName = Literal["magnitude", "random", "saliency", "gradient"]
PairRule = Literal["rigl", "set", "static"]
Preset = Literal["averaged", "symmetric", "fast_slow", "constant"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Methods."""

    sparsity: float = 0.8  # zeros among the prunable weights; a pair shares the rest

    # How layers share the live weights; auto is what suits the method.
    distribution: DistributionName = "auto"
    # Sparsities of single leaves as pattern:sparsity, such as head/*:0.5; the others
    # share what is left by the distribution, and by erk where that is global.
    layer_sparsities: tuple[str, ...] = ()
    pattern: PatternName = "unstructured"  # which weights live and die together
    group: int = 4  # m of n:m, in the pattern n_of_m and in sr_ste; side of blocks
    score: ScoreName = "magnitude"  # what one_shot, gradual and imp prune by

    refresh_interval: int = 0  # steps between mask refreshes; 0: from data and steps
    growth_samples: int = 1024  # examples of a growth gradient; 0: those of the step
    # Part of the live weights that moves at the first refresh; falls to 0 by a cosine.
    drop_fraction: float = 0.3
    # Part of the training after which one_shot, powerprop and wanda prune.
    prune_at: float = 0.5
    start_sparsity: float = 0.5  # of the random pattern that granet begins with
    backward_density: float = 2.0  # weights top_kast trains for each one that it uses
    score_samples: int = 256  # examples that snip, grasp, fisher and wanda look at
    power: float = 2.0  # alpha of powerprop, whose weights are theta |theta|^(alpha-1)
    threshold_decay: float = 0.03  # weight decay on the thresholds of str

    # What weights that the loss or the outputs are insensitive to lose in every step of
    # lobster, sensitivity, serene and l2_thresholded: their part, whatever the learning
    # rate is.
    decay_strength: float = 0.0004
    # What sensitivities are divided by: the largest of the tensor, of all, or nothing,
    # as published, which can hardly be told from l2_thresholded.
    decay_normalise: Normalise = "tensor"
    # Steps between two checks of the loss on a tenth of the training examples, which
    # thresholded and the methods above hold out; 0: a pass over the labels.
    threshold_interval: int = 0
    # Checks in a row at which the loss is no longer falling, before they prune.
    patience: int = 3
    tolerance: float = 0.05  # part by which a pruning may raise that loss

    # Hidden neurons that group_lasso leaves no weights, a part of all.
    group_sparsity: float = 0.5
    # What it takes off the root mean square of their weights in every step, whatever
    # the learning rate is; after three quarters of the training as much as is needed.
    group_strength: float = 0.001

    rounds: int = 5  # prunings of imp, soup and swamp
    rewind_fraction: float = 0.1  # part of a round whose weights are rewound to
    # What goes back between rounds: weights and learning rate, or the latter alone.
    rewinding: Literal["weights", "learning_rate"] = "weights"
    # Part of the entropy of units that is gone where imp_stopped prunes no more.
    entropy_drop: float = 0.3
    members: int = 2  # networks of free_tickets, and of a round of soup and swamp
    explore: float = 0.5  # part of the training before free_tickets anneals the first

    # What easier, egp, nepenthe and tlc do to a trained network, each followed by a
    # whole training, and how many blocks lacoot drops: at most so many times.
    depth_rounds: int = 4
    # Part of the live weights before activations that egp and nepenthe prune a round.
    depth_fraction: float = 0.5
    collapse: float = 1.0  # weight of the distances that lacoot adds to the loss

    bits: int = 4  # of quantised kernels
    activation_bits: int = 8  # of the inputs of their layers; 0: floats
    edge_bits: int = 8  # of the first and the last layer, both of these
    # What a code of the weights of a channel stands for: absmax clips none, mse has the
    # least error, and lsq is trained.
    weight_scale: ScaleName = "absmax"
    # What a code of inputs stands for: dynamic is that of every example, calibrated has
    # the least error when the training begins, and learned is trained.
    activation_scale: InputScales = "dynamic"

    tail: float = 0.25  # last part of the training whose weights are averaged
    coupling: float = 1.0  # weight of a peer's or a teacher's teaching
    temperature: float = 1.0  # of the softened outputs that are taught
    coupling_ramp: int = 0  # steps over which the teaching grows to its weight
    weighted_coupling: bool = False  # weigh the teaching by the peer's confidence
    trust_threshold: float = 0.0  # confidence below which a peer does not teach
    mask_coupling: float = 1.0  # 1: masks avoid each other, 0: independent, -1: attract
    independent_views: bool = False  # augment the batch for each learner anew
    preset: Preset = "averaged"  # learning rates and mask moves of a pair's learners
    # How the masks of a pair move; set and static do not look at gradients, and
    # --mask_coupling then sets where they start alone.
    pair_rule: PairRule = "rigl"
    # Steps the slow average reaches back; 0: a sixth of the training.
    horizon: float = 0.0
    finish_part: float = 0.25  # last part of the training that trains one network
    finish_rate: float = 0.1  # its learning rate, as a part of the first one

    def __post_init__(self) -> None:
        """Refuses values out of their ranges."""
        check_sparsity(self.sparsity)
        check_least(self, _LEAST, most=math.inf)
        for name in _FRACTIONS:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"expected {name} in [0, 1), got {getattr(self, name)}"
                )
        for name in _BITS:
            check_bits(getattr(self, name))
        if self.activation_bits:  # 0 stands for floats.
            check_bits(self.activation_bits)
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)

    @property
    def masks(self) -> Structure:
        """Which masks are possible."""
        return Structure(self._distribution(), self._selection())

    @property
    def moves(self) -> Moves:
        """How masks move; the refresh interval has to be known."""
        return Moves(self.refresh_interval, self.drop_fraction, self.growth_samples)

    @property
    def rewinds(self) -> Rewinds:
        """What goes back between rounds."""
        return Rewinds(self.rewind_fraction, self.rewinding, self.scored_by)

    @property
    def search(self) -> Search:
        """When and how far a threshold prunes."""
        return Search(self.patience, self.tolerance)

    @property
    def scored_by(self) -> Score:
        """What prunes by."""
        found: Score = getattr(scores, self.score)
        return found

    @property
    def teaching(self) -> Coupling:
        """How two sparse learners influence each other."""
        return dataclasses.replace(self.lessons, masks=self.mask_coupling)

    @property
    def lessons(self) -> Coupling:
        """How two dense learners influence each other: by what they predict."""
        return Coupling(
            fast=self.coupling,
            slow=self.coupling,
            temperature=self.temperature,
            ramp=self.coupling_ramp,
            masks=0.0,
            independent_views=self.independent_views,
            weighted=self.weighted_coupling,
            threshold=self.trust_threshold,
        )

    def _selection(self) -> Selection:
        makers: dict[str, Callable[[], Selection]] = {
            "unstructured": lambda: masks.select,
            "n_of_m": lambda: masks.n_of_m(self.group),
            "blocks": lambda: masks.blocks((self.group, self.group)),
            "channels": masks.channels,
        }
        return makers[self.pattern]()

    def _distribution(self) -> Distribution | None:
        named: dict[str, Distribution | None] = {
            "auto": None,
            "global": distributions.global_,
            "uniform": distributions.uniform,
            "er": distributions.er,
            "erk": distributions.erk,
        }
        table = read_table(self.layer_sparsities)
        if not table:
            return named[self.distribution]
        if self.distribution == "global":
            raise ValueError(
                "expected distribution of uniform, er, erk beside layer_sparsities, "
                "got 'global', which has no number for every leaf; leave it away"
            )
        return distributions.explicit(
            table, named[self.distribution] or distributions.erk
        )


_LEAST = {
    "group": 1,
    "refresh_interval": 0,
    "growth_samples": 0,
    "backward_density": 1,
    "score_samples": 1,
    "power": 1,
    "threshold_decay": 0,
    "threshold_interval": 0,
    "patience": 1,
    "tolerance": 0,
    "group_strength": 0,
    "rounds": 1,
    "members": 1,
    "depth_rounds": 1,
    "collapse": 0,
    "coupling": 0,
    "horizon": 0,
}
_FRACTIONS = (
    *("decay_strength", "group_sparsity"),
    *("drop_fraction", "prune_at", "start_sparsity", "rewind_fraction", "explore"),
    *("trust_threshold", "finish_part", "depth_fraction"),
    "entropy_drop",
)
_BITS = ("bits", "edge_bits")
_CHOICES = {
    "distribution": get_args(DistributionName),
    "pattern": get_args(PatternName),
    "score": get_args(ScoreName),
    "decay_normalise": get_args(Normalise),
    "rewinding": ("weights", "learning_rate"),
    "preset": get_args(Preset),
    "weight_scale": get_args(ScaleName),
    "activation_scale": get_args(InputScales),
    "pair_rule": get_args(PairRule),
}


def read_table(entries: Iterable[str]) -> dict[str, float]:
    """Sparsities by pattern, of entries such as "head/*:0.5".

    Raises:
      ValueError: an entry is none, or a pattern stands there twice.

    >>> read_table(["head/*:0.5"])
    {'head/*': 0.5}
    """
    table: dict[str, float] = {}
    for entry in entries:
        pattern, _, text = entry.rpartition(":")
        sparsity = _sparsity(text)
        if not pattern or sparsity is None:
            raise ValueError(
                "expected layer_sparsities of the form pattern:sparsity in [0, 1], "
                f"such as head/*:0.5, got {entry!r}"
            )
        if pattern in table:
            raise ValueError(
                f"expected layer_sparsities with every pattern once, got {pattern!r} "
                "twice; leave one away"
            )
        table[pattern] = sparsity
    return table


def _sparsity(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None
