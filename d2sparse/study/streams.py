"""Comparisons on a stream: methods made from flags, and what their stages come to."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from d2sparse import records
from d2sparse.constraints import (
    METHODS,
    STREAM_METHODS,
    Method,
    Options,
    Streamed,
    StreamOptions,
    layer_densities,
    timetable_of,
)
from d2sparse.constraints.coupled import pair_masks
from d2sparse.dual import Dual
from d2sparse.study.flags import options_of
from d2sparse.study.grid import Plan
from d2sparse.study.runner import End
from d2sparse.study.splits import DrawSplits
from d2sparse.train import (
    Data,
    Training,
    accuracy_of,
    constrain,
    live_weights,
    take,
)
from d2sparse.tree import PyTree

Numbers = Mapping[str, float]
_TIMES = (
    *("megabatches", "stratified", "permuted", "stream_validation", "replay"),
    *("replay_size", "replay_fraction", "wait", "select", "carry_moments", "compat"),
)
_SAMPLES = ("score_on", "score_fraction", "score_batch")
_WEIGHTS = ("scope", "dead", "score_weights")
_SCORES = ("criterion", *_WEIGHTS, "score_sample", *_SAMPLES)
_LEVELS = ("tau", "first_level", "levels")
_RELEASED = (*_LEVELS, "criterion", "scope", *_SAMPLES)
# Flags of a stream that a method goes by, besides those of all methods.
_READS: Mapping[str, tuple[str, ...]] = {
    "one_shot": ("tau", *_SCORES),
    "app": (*_LEVELS, *_SCORES),
    "app_magnitude": (*_LEVELS, *_WEIGHTS),
    "gradual": ("tau",),
    "rigl": ("tau",),
    "d2_sparse": ("tau",),
    "d2_consolidated": ("tau",),
    "app_2022": _RELEASED,
    "random_matched": _RELEASED,
}
# Methods whose masks move within the stages.
WITHIN = ("gradual", "rigl", "d2_sparse", "d2_consolidated")


def stream_options(flags: Any) -> StreamOptions:
    """The options of a stream among flags, by their names."""
    return options_of(StreamOptions, flags)


def stream_methods(draw_splits: DrawSplits) -> dict[str, Method]:
    """STREAM_METHODS as they are made from flags.

    Args:
      draw_splits: data of a seed; the labels of the first one say how long a stream is.
    """
    return {
        name: method._replace(constraints=_from_flags(name, method, draw_splits))
        for name, method in STREAM_METHODS.items()
    }


def stage_results(end: End) -> dict[str, Any]:
    """What is recorded of a stage besides its quality; nothing at the end of a run.

    Returns:
      test_error; train_accuracy on all examples that are visible, clean, and their gap
      to what is judged; validation_accuracy and released_gap, that of the running
      accuracy; density, of all prunable weights and by leaf in layers; arrived, the
      number of megabatches, and seen, that of the examples.
    """
    if not end.title:
        return {}
    options, splits = stream_options(end.plan.config), end.splits
    timetable = timetable_of(options, end.state, splits.train)
    number = int(end.title.split()[1]) - 1
    visible, arrived = timetable.visible[number], timetable.arrived[: number + 1]

    judged = _accuracy(end, splits.judge)
    clean = _accuracy(end, _rows(splits.train, visible.train))
    held_out = float("nan")
    if len(visible.validation):
        held_out = _accuracy(end, _rows(splits.train, visible.validation))
    network = end.program.training.network
    masks = _masks(end)
    live = sum(live_weights(network, masks).values())
    return {
        "test_error": 1 - judged,
        "train_accuracy": clean,
        "validation_accuracy": held_out,
        "gap": clean - judged,
        "released_gap": end.means.get("train_accuracy", float("nan")) - held_out,
        "density": live / network.weights,
        "layers": layer_densities(network, masks),
        "arrived": (number + 1) * options.wait,
        "seen": len(np.unique(np.concatenate([i for part in arrived for i in part]))),
    }


def stream_settings(plan: Plan, seed: int, out: records.Run) -> Numbers | None:
    """The settings of a run: its seed, and densities that were come to by app_2022.

    Returns:
      The settings; None while the run whose densities it takes has not finished.

    Raises:
      FloatingPointError: the run whose densities it takes has failed.
    """
    settings = {"seed": float(seed)}
    if plan.row.method != "random_matched":
        return settings
    matched = records.Unit(plan.row._replace(method="app_2022").name, seed)
    if (results := out.finished(matched)) is None:
        return None
    if "failed" in results:
        raise FloatingPointError(
            f"{matched.name}, whose densities it takes, has failed"
        )
    parts = enumerate(results["parts"])
    return settings | {f"density_{number}": part["density"] for number, part in parts}


def _from_flags(
    name: str, method: Method, draw_splits: DrawSplits
) -> Callable[[Any], tuple[Any, ...]]:
    def constraints(flags: Any) -> tuple[Any, ...]:
        for flag in (*_TIMES, *_READS.get(name, ())):
            getattr(flags, flag)  # Which `flags_used` watches.
        if name in WITHIN:
            METHODS[name].constraints(flags)

        def on_stream(training: Training) -> Training:
            labels = np.asarray(draw_splits(flags, 0).train.labels)
            given = Streamed(options_of(Options, flags), stream_options(flags), labels)
            return constrain(training, *method.constraints(given))

        return (on_stream,)

    return constraints


def _masks(end: End) -> tuple[PyTree, ...]:
    """The masks of all networks, also of one that is an average of another."""
    if isinstance(end.state.params, Dual):
        return tuple(pair_masks(end.state))
    return end.program.training.masks(end.state).trained


def _rows(examples: Data, numbers: np.ndarray) -> Data:
    return take(examples, jnp.asarray(numbers))


def _accuracy(end: End, examples: Data) -> float:
    return accuracy_of(end.program, end.state, examples)
