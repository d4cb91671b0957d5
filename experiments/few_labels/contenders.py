"""The methods of the benchmark: each is a row of what it builds, changes and tunes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from d2sparse import distributions, lottery, models, tree
from experiments import recipes
from experiments.costs import rigl_part
from experiments.few_labels.options import LowDataOptions
from experiments.methods import imp
from experiments.pairs import (
    Choices,
    dense_pair,
    make_choices,
    sparse_pair,
    uncoupled_pair,
)
from experiments.recipes import Options, RecipeName
from experiments.recipes.arguments import make_shared, rehearse
from experiments.relays import Finish, distilled_pair, self_distilled
from experiments.singles import Method
from experiments.snapshots import free_tickets
from experiments.task import Task, given

_MULTIPLIED = ("lenet_300_100", "lenet5")  # Their width is a factor.
_CAPPED_ROUNDS = 3


class Base(NamedTuple):
    """What the flags alone make in a setting.

    Attributes:
      task: of the network.
      samples: number of training examples.
      classes: number of classes.
    """

    task: Task
    samples: int
    classes: int


Make = Callable[[Task, LowDataOptions, int], Method]
Fields = Mapping[str, Any]


class Contender(NamedTuple):
    """One method.

    Attributes:
      make: (task, flags, number of examples) -> method.
      change: (flags, base) -> the flags that it has of its own.
      own: flags -> values to try when it is tuned, by flag, besides those of the
        learning rate and weight decay.
    """

    make: Make
    change: Callable[[LowDataOptions, Base], Fields] = lambda config, base: {}
    own: Callable[[LowDataOptions], Mapping[str, tuple[Any, ...]]] = lambda config: {}


def narrow_width(config: LowDataOptions, base: Base) -> float:
    """Width of the widest network that has no more numbers than the sparse one.

    Raises:
      ValueError: there is none.
    """
    prunable = tree.size(tree.prunable_leaves(base.task.params, base.task.prunable))
    rest = tree.size(base.task.params) - prunable
    most = round((1 - config.sparsity) * prunable) + rest
    unit = 0.01 if config.model in _MULTIPLIED else 1
    x = jax.ShapeDtypeStruct((1, *base.task.image_shape), "float32")

    def fits(number: int) -> bool:
        model = models.make_model(config.model, base.classes, unit * number)
        params, _ = jax.eval_shape(model.init, jax.random.key(0), x)
        return tree.size(params) <= most

    if not fits(1):
        raise ValueError(
            f"expected a narrow {config.model} of at most {most} numbers, got none; "
            "lower the sparsity or leave dense_narrow away"
        )
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return unit * low


def _narrowed(config: LowDataOptions, base: Base) -> Fields:
    return {"width": narrow_width(config, base)}


def _halved(config: LowDataOptions, base: Base) -> Fields:
    """As many weights as one learner of a pair has."""
    del base
    return {"sparsity": (1 + config.sparsity) / 2}


def _shortened(config: LowDataOptions, base: Base) -> Fields:
    """As many steps as cost what RigL costs."""
    own = make_shared(base.task, config, distributions.erk)
    part = rigl_part(base.task, base.samples, own["distribution"])
    return {"steps": max(round(part * config.steps), 1)}


def _capped(config: LowDataOptions, base: Base) -> Fields:
    """Shorter rounds, which together cost about what the dense network does."""
    sparsities = lottery.round_sparsities(config.sparsity, _CAPPED_ROUNDS)
    later = sum(1 - sparsity for sparsity in sparsities[:-1]) + 1 - config.sparsity
    rounds = 1 + (1 - config.rewind_fraction) * later
    steps = max(round(config.steps / rounds), 2)
    return {"steps": steps, "imp_rounds": _CAPPED_ROUNDS}


def _recipe(name: RecipeName) -> Make:
    def make(task: Task, config: LowDataOptions, samples: int) -> Method:
        del samples
        shared = {f.name for f in dataclasses.fields(Options)} & set(vars(config))
        options = Options(**{flag: getattr(config, flag) for flag in shared})
        return recipes.make_method(name, task, options)

    return make


def _imp(task: Task, config: LowDataOptions, samples: int) -> Method:
    del samples
    return imp(task, config.imp_rounds, config.rewind_fraction, config)


def _self_distilled(task: Task, config: LowDataOptions, samples: int) -> Method:
    del samples
    return self_distilled(task, config.coupling, config.temperature)


def _free_tickets(task: Task, config: LowDataOptions, samples: int) -> Method:
    del samples
    shared = make_shared(task, config, distributions.erk)
    rehearse(task, config, shared)
    own = (config.members, config.explore, config.drop_fraction)
    return free_tickets(task, *own, shared)


def _choices(task: Task, config: LowDataOptions, samples: int) -> Choices:
    del task
    return make_choices(config, config, samples)


def _dense_mutual(task: Task, config: LowDataOptions, samples: int) -> Method:
    return dense_pair(task, _choices(task, config, samples).coupling)


def _uncoupled(task: Task, config: LowDataOptions, samples: int) -> Method:
    return uncoupled_pair(task, _choices(task, config, samples))


def _d2_sparse(task: Task, config: LowDataOptions, samples: int) -> Method:
    return sparse_pair(task, _choices(task, config, samples))


def _d2_finished(merged: bool) -> Make:
    def make(task: Task, config: LowDataOptions, samples: int) -> Method:
        finish = Finish(
            config.finish_part,
            config.finish_rate,
            config.coupling,
            config.temperature,
        )
        return distilled_pair(task, _choices(task, config, samples), finish, merged)

    return make


def _of(**fields: Any) -> Callable[[LowDataOptions, Base], Fields]:
    """Flags that a method has by its name, and does not take from the command."""

    def change(config: LowDataOptions, base: Base) -> Fields:
        del base
        for flag, value in given(config).items():
            if flag in fields and fields[flag] != value:
                named = ", ".join(
                    name for name, own in CONTENDERS.items() if own.change is change
                )
                raise ValueError(
                    f"expected {flag} of {fields[flag]} for {named}, got {value}; "
                    f"leave them or --{flag} away"
                )
        return fields

    return change


def _try(**own: tuple[Any, ...]) -> Callable[[LowDataOptions], Fields]:
    return lambda config: own


def _horizons(config: LowDataOptions) -> Fields:
    return {"horizon": tuple(max(config.steps // n, 1) for n in (24, 12, 6, 3))}


_DENSE = _recipe("dense")
_DROPS = _try(drop_fraction=(0.1, 0.3, 0.5))
_COUPLINGS = _try(coupling=(0.5, 1.0, 2.0))
_RADII = _try(sharpness=(0.02, 0.05, 0.1))
_TAIL = _of(schedule="constant", averaging=0.25)  # Of networks that are alone.
_AVERAGED = _of(preset="averaged", averaging=0.25)
_ANNEALED = _of(preset="symmetric")
_TAILS = _try(averaging=(0.1, 0.25, 0.5))
_RATES = _try(finish_rate=(0.03, 0.1, 0.3))

CONTENDERS: Mapping[str, Contender] = {
    "dense": Contender(_DENSE),
    "dense_short": Contender(_DENSE, _shortened),
    "dense_narrow": Contender(_DENSE, _narrowed),
    "dense_smoothed": Contender(
        _DENSE, _of(label_smoothing=0.1), _try(label_smoothing=(0.05, 0.1, 0.2))
    ),
    "dense_averaged": Contender(_DENSE, _TAIL, _TAILS),
    "dense_sharp": Contender(_DENSE, _of(sharpness=0.05), _RADII),
    "self_distilled": Contender(_self_distilled, own=_COUPLINGS),
    "one_shot": Contender(_recipe("one_shot"), own=_try(prune_at=(0.25, 0.5, 0.75))),
    "snip": Contender(_recipe("snip")),
    "grasp": Contender(_recipe("grasp")),
    "synflow": Contender(_recipe("synflow")),
    "static": Contender(_recipe("static")),
    "set": Contender(_recipe("set"), own=_DROPS),
    "rigl": Contender(_recipe("rigl"), own=_DROPS),
    "rigl_averaged": Contender(_recipe("rigl"), _TAIL, _TAILS),
    "rigl_half": Contender(_recipe("rigl"), _halved, _DROPS),
    "granet": Contender(_recipe("granet"), own=_DROPS),
    "imp": Contender(_imp, own=_try(rewind_fraction=(0.0, 0.1, 0.2))),
    "imp_capped": Contender(_imp, _capped, _try(rewind_fraction=(0.0, 0.1, 0.2))),
    "dense_mutual": Contender(_dense_mutual, own=_COUPLINGS),
    "uncoupled_annealed": Contender(_uncoupled, _ANNEALED),
    "uncoupled_averaged": Contender(_uncoupled, _AVERAGED, _TAILS),
    "free_tickets": Contender(_free_tickets, own=_try(explore=(0.3, 0.5, 0.7))),
    "d2_sparse": Contender(_d2_sparse, _AVERAGED, _TAILS),
    "d2_annealed": Contender(_d2_sparse, _ANNEALED, _COUPLINGS),
    "d2_views": Contender(
        _d2_sparse, _of(preset="symmetric", independent_views=True), _COUPLINGS
    ),
    "d2_confident": Contender(
        _d2_sparse,
        _of(preset="symmetric", weighted_coupling=True),
        _try(trust_threshold=(0.0, 0.5, 0.8)),
    ),
    "d2_sharp": Contender(_d2_sparse, _of(preset="symmetric", sharpness=0.05), _RADII),
    "d2_consolidated": Contender(_d2_sparse, _of(mode="consolidated"), _horizons),
    "d2_distilled": Contender(_d2_finished(merged=False), _ANNEALED, _RATES),
    "d2_merged": Contender(_d2_finished(merged=True), _of(mode="consolidated"), _RATES),
    "d2_averaged_views": Contender(
        _d2_sparse, _of(averaging=0.25, independent_views=True), _TAILS
    ),
    "d2_averaged_sharp": Contender(
        _d2_sparse, _of(averaging=0.25, sharpness=0.05), _TAILS
    ),
    "d2_averaged_distilled": Contender(_d2_finished(merged=False), _TAIL, _RATES),
}
