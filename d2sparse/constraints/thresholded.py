"""Training, and a threshold of magnitudes whenever it has stopped getting better."""

import functools
import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import rules, tree
from d2sparse.anytime import go_on_from
from d2sparse.checks import check_number, check_whole
from d2sparse.constraints.bisection import bisect_threshold
from d2sparse.constraints.held_out import (
    batches_of,
    held_out,
    split_of,
    validation_loss,
)
from d2sparse.constraints.masked import under_masks
from d2sparse.masks import dense_masks
from d2sparse.train import (
    Constraint,
    Data,
    Phase,
    Program,
    Progress,
    Training,
    TrainState,
    end,
    forward_macs,
    live_weights,
)
from d2sparse.transforms import get_masks, set_masks
from d2sparse.tree import PyTree

_WORSE = 1.01  # Times the least loss: from there on a check is a bad one.


class Search(NamedTuple):
    """When and how far weights are pruned.

    Attributes:
      patience: bad checks in a row before a pruning.
      tolerance: by what part a pruning may raise the validation loss.
      validation: part of every class that is held out of the training data.
      target: sparsity at which pruning ends; None for none.
      released: whether a pruning goes by a threshold that was never evaluated, as in
        the released code.
    """

    patience: int = 3
    tolerance: float = 0.05
    validation: float = 0.1
    target: float | None = None
    released: bool = False


def threshold_search(interval: int, search: Search | None = None) -> Constraint:
    """Prunes by one threshold of magnitudes at every plateau of the validation loss.

    The loop that LOBSTER and SeReNe share (arXiv 2011.09905, 2102.03773). Every
    `interval` steps the loss on held-out training examples is checked; the check is bad
    where it is at least 1.01 times the least since the last pruning. After `patience`
    bad ones in a row the weights of the least loss are restored, and all live weights
    below a threshold are pruned for good: the largest that `bisect_threshold` finds
    whose loss is at most `1 + tolerance` times that. Every layer keeps a weight; where
    a larger threshold would empty one, a warning says so. At the end the weights of the
    least loss under the last masks count.

    It prunes as far as the loss lets it, mostly far less within few steps; `decayed`,
    put before it, makes weights small that do not matter. With a `target` it stops
    pruning there, and training at the next plateau; a warning tells if it is missed.

    Checks are phases. The memory holds "best", the state of the least loss; "least" and
    "bad"; "history", float[checks, 3] of the validation loss, the threshold, 0 without
    a pruning, and the live weights after it; and "macs", what validation has cost, per
    example of a batch.

    Args:
      interval: steps between two checks, such as those of an epoch.
      search: when and how far weights are pruned; `Search()` if not given.

    Raises:
      ValueError: a number is out of its range; when applied, the training is too short
        for a pruning or has several phases, or the masks are decided already; when it
        begins, a class has a single example.
      FloatingPointError: a layer has no weight other than 0 left, or predictions are
        not finite.

    >>> from d2sparse import models, train
    >>> like = train.images_like((8, 8, 1))
    >>> training = train.plain(models.lenet_300_100(num_classes=3), like)
    >>> training = train.constrain(training, threshold_search(interval=100))
    >>> len(training.phases), training.claims
    (11, {'the masks': 'threshold_search'})
    """
    own = search or Search()
    check_whole("patience", own.patience, least=1)
    check_number("tolerance", own.tolerance, 0, math.inf)
    if not 0 < own.validation < 1:
        raise ValueError(
            f"expected a validation part between 0 and 1, got {own.validation}"
        )
    if own.target is not None and not 0 <= own.target < 1:
        raise ValueError(f"expected a target sparsity in [0, 1), got {own.target}")

    def constrained(training: Training) -> Training:
        first = training.phases[0]
        stops = _stops(training, interval, own.patience)
        batches = functools.partial(batches_of, own.validation, training.batch_size)
        dense = dense_masks(training.network.params)
        masked = under_masks(training, "threshold_search", lambda s: rules.fixed(dense))

        def begin(progress: Progress, data: Data) -> Progress:
            return _begin(training.begin(progress, data), len(stops))

        def measure(state: TrainState) -> Mapping[str, Any]:
            live = _live(masked, state)
            compression = training.network.weights / max(live, 1)
            return {**training.measure(state), "compression": compression}

        checks = [
            Phase(stop, functools.partial(_check, own, number), batches)
            for number, stop in enumerate(stops[1:])
        ]
        close = Phase(stops[-1], functools.partial(_close, own, len(stops) - 1))
        phases = (first._replace(stop=stops[0], batches=batches), *checks, close)
        return masked._replace(phases=phases, begin=begin, measure=measure)

    return constrained


def _stops(training: Training, interval: int, patience: int) -> list[int]:
    """The steps before which there is a check, the last one included."""
    check_whole("interval", interval, least=1)
    first, *others = training.phases
    if others or first.batches or first.training:
        raise ValueError(
            "expected a training in one phase on all of its examples, to search for "
            f"thresholds in, got {len(training.phases)} phases; leave the other "
            "constraint away"
        )
    horizon = training.horizon
    stops = [*range(interval, horizon, interval), horizon]
    if len(stops) < patience + 2:
        raise ValueError(
            f"expected more than {(patience + 1) * interval} steps, for a pruning "
            f"after {patience} bad checks, one every {interval} steps, got {horizon}; "
            "raise the steps, or lower the interval or the patience"
        )
    return stops


def _begin(progress: Progress, checks: int) -> Progress:
    kept = {
        "best": jax.tree.map(jnp.copy, progress.state),
        "least": jnp.float32(jnp.inf),
        "bad": jnp.int32(0),
        "history": jnp.full((checks, 3), jnp.nan, jnp.float32),
        "macs": jnp.float32(0.0),
    }
    return progress._replace(memory={**progress.memory, **kept})


def _check(
    search: Search, number: int, progress: Progress, data: Data, program: Program
) -> Progress:
    """Validates, and prunes after enough bad checks, or ends at the target."""
    progress, is_bad = _validated(search, number, progress, data, program)
    bad = int(progress.memory["bad"]) + 1 if is_bad else 0
    progress = _remember(progress, bad=jnp.int32(bad))
    if bad < search.patience:
        return progress
    best = go_on_from(progress.memory["best"], progress.state)
    progress = progress._replace(state=best)
    own = program.of(int(progress.phase))
    if search.target is not None and _live(own.training, best) <= _kept(search, own):
        return end(progress)
    return _pruned(search, number, progress, data, own)


def _close(
    search: Search, number: int, progress: Progress, data: Data, program: Program
) -> Progress:
    """The weights of the least loss under the last masks."""
    progress, _ = _validated(search, number, progress, data, program)
    best = go_on_from(progress.memory["best"], progress.state)
    own = program.of(int(progress.phase))
    live, size = _live(own.training, best), own.training.network.weights
    if search.target is not None and live > _kept(search, own):
        warnings.warn(
            f"expected a sparsity of {search.target:g}, got {1 - live / size:.4g} at "
            "the end of the training; raise the steps, the tolerance, or the strength "
            "of the decay, or lower the patience",
            stacklevel=2,
        )
    return progress._replace(state=best)


def _validated(
    search: Search, number: int, progress: Progress, data: Data, program: Program
) -> tuple[Progress, bool]:
    """The progress with the best state so far, and whether the check was a bad one."""
    state, own = progress.state, program.of(int(progress.phase))
    held = held_out(state, data, search.validation)
    loss = np.float32(validation_loss(own, state, held))
    least = np.float32(progress.memory["least"])
    if loss < least:
        copied = jax.tree.map(jnp.copy, state)
        progress = _remember(progress, best=copied, least=jnp.float32(loss))
    progress = _noted(progress, number, float(loss), 0.0, _live(own.training, state))
    progress = _charged(search, progress, data, own, evaluations=1)
    return progress, bool(loss >= np.float32(_WORSE) * least)


def _pruned(
    search: Search, number: int, progress: Progress, data: Data, program: Program
) -> Progress:
    """The restored state under a threshold, and nothing known of the loss any more."""
    state, held = progress.state, held_out(progress.state, data, search.validation)
    prunable = program.training.network.prunable
    masks = get_masks(state.opt_state)
    alive = tree.flatten(masks)
    kernels = {
        path: np.abs(np.asarray(w, np.float32))[np.asarray(alive[path])]
        for path, w in tree.prunable_leaves(state.params, prunable).items()
    }
    _refuse_empty(kernels)
    paths = tuple(kernels)

    def loss_of(threshold: float) -> float:
        params, _ = _cut(state.params, masks, np.float32(threshold), paths)
        return validation_loss(program, state._replace(params=params), held)

    found = bisect_threshold(
        loss_of,
        kernels,
        float(progress.memory["least"]),
        search.tolerance,
        _most(search, kernels, program),
        search.released,
    )
    if found.layer:
        warnings.warn(
            f"expected a threshold that the loss ends, got {found.value:.4g}, above "
            f"which all weights of {found.layer!r} would fall; lower the tolerance, or "
            "leave that layer dense with `prunable`",
            stacklevel=2,
        )
    progress = _charged(search, progress, data, program, found.evaluations)
    threshold = np.float32(found.value)
    params, masks = _cut(state.params, masks, threshold, paths)
    opt_state = set_masks(state.opt_state, masks)
    pruned = jax.tree.map(jnp.copy, state._replace(params=params, opt_state=opt_state))
    progress = _remember(
        progress._replace(state=pruned),
        best=jax.tree.map(jnp.copy, pruned),
        least=jnp.float32(jnp.inf),
        bad=jnp.int32(0),
    )
    checked = float(progress.memory["history"][number, 0])
    live = _live(program.training, pruned)
    return _noted(progress, number, checked, found.value, live)


@functools.partial(jax.jit, static_argnums=3)
def _cut(
    params: PyTree, masks: PyTree, threshold: Any, paths: tuple[str, ...]
) -> tuple[PyTree, PyTree]:
    """Weights and masks under a threshold, which is traced: one program for all."""
    weights, live = tree.pick(params, paths), tree.pick(masks, paths)
    kept = {
        path: live[path] & (jnp.abs(weights[path]).astype(jnp.float32) >= threshold)
        for path in paths
    }
    cut = {path: jnp.where(kept[path], weights[path], 0) for path in paths}
    return tree.replace(params, cut), tree.replace(masks, kept)


def _noted(progress: Progress, number: int, *row: float) -> Progress:
    """The progress with a row of its history."""
    history = np.array(progress.memory["history"])
    history[number] = row
    return _remember(progress, history=jnp.asarray(history))


def _charged(
    search: Search, progress: Progress, data: Data, program: Program, evaluations: int
) -> Progress:
    """The progress with the cost of forward passes on the held-out examples."""
    training, state = program.training, progress.state
    size = len(split_of(state, data, search.validation)[1])
    used = jax.device_get(training.masks(state).used)
    forward = float(forward_macs(training.network, used))
    spent = evaluations * size * forward / training.batch_size
    return _remember(progress, macs=progress.memory["macs"] + jnp.float32(spent))


def _remember(progress: Progress, **values: Any) -> Progress:
    return progress._replace(memory={**progress.memory, **values})


def _live(training: Training, state: TrainState) -> int:
    """Prunable weights that are left."""
    used = jax.device_get(training.masks(state).used)
    return sum(live_weights(training.network, used).values())


def _kept(search: Search, program: Program) -> int:
    """Weights that are left at the target."""
    assert search.target is not None
    return round((1 - search.target) * program.training.network.weights)


def _most(search: Search, kernels: Mapping[str, np.ndarray], program: Program) -> float:
    """The largest threshold that does not prune beyond the target."""
    if search.target is None:
        return math.inf
    everything = np.sort(np.concatenate([w.ravel() for w in kernels.values()]))[::-1]
    return float(everything[max(_kept(search, program), 1) - 1])


def _refuse_empty(kernels: Mapping[str, np.ndarray]) -> None:
    empty = [path for path, weights in kernels.items() if not weights.any()]
    if empty:
        raise FloatingPointError(
            f"expected a weight other than 0 in every layer, got none in {empty}; "
            "lower the strength of the decay, or the learning rate"
        )
