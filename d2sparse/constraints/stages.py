"""The phases of a stream: the epochs of a stage, and what is resumed from after it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import anytime
from d2sparse import data as streamed
from d2sparse.anytime import Stage
from d2sparse.constraints.arrivals import Arrival, Prune, new_network, sample_of
from d2sparse.constraints.timetables import StreamOptions, timetable_of
from d2sparse.dual import Dual, joint_state
from d2sparse.train import (
    Data,
    Phase,
    Program,
    Progress,
    Training,
    TrainState,
    accuracy_of,
    take,
)
from d2sparse.transforms import SparsifyState, sparse_states, zero_pruned


class Parts(NamedTuple):
    """The arguments of all phases of a stream.

    Attributes:
      options: how the data arrive, and what an arrival looks at.
      arrival: what an arrival does.
      stages: the steps of every stage.
      rate: the learning rate of the training.
      batch_size: examples per step.
      prune: from `make_pruner`.
    """

    options: StreamOptions
    arrival: Arrival
    stages: list[Stage]
    rate: float
    batch_size: int
    prune: Prune


def begin_stream(progress: Progress) -> Progress:
    """The progress with the memory of a stream."""
    state = progress.state
    kept = {
        "best": _copy(state),
        "score": jnp.float32(-jnp.inf),
        "macs": jnp.float32(0.0),
        "learning_rate": jnp.copy(state.settings["learning_rate"]),
    }
    return progress._replace(memory={**progress.memory, **kept})


def phases_of(parts: Parts, number: int) -> list[Phase]:
    """One phase for every epoch of a stage, and one that ends it."""
    stage = parts.stages[number]
    batches = functools.partial(_batches, parts, number)
    epochs = [
        Phase(
            stage.begin + (epoch + 1) * stage.per_epoch,
            functools.partial(_begin_epoch, parts, number, epoch),
            batches,
        )
        for epoch in range(stage.epochs)
    ]
    close = functools.partial(_close, parts, number)
    return [*epochs, Phase(stage.end, close, title=f"megabatch {number + 1}")]


def _batches(
    parts: Parts, number: int, progress: Progress, data: Data, steps: int
) -> np.ndarray:
    """Epochs on the visible examples, in an order of the run's seed."""
    state = progress.state
    visible = timetable_of(parts.options, state, data).visible[number].train
    start = int(state.step) - parts.stages[number].begin
    seed = (int(state.settings["seed"]), number)
    return streamed.epoch_batches(visible, start, steps, parts.batch_size, seed)


def _begin_epoch(
    parts: Parts,
    number: int,
    epoch: int,
    progress: Progress,
    data: Data,
    program: Program,
) -> Progress:
    """The data arrive, or the epoch before is validated; a new learning rate."""
    enter = _validate if epoch else _arrive
    progress = enter(parts, number, progress, data, program)
    state, options = progress.state, parts.options
    base = _meant(progress.memory["learning_rate"], parts.rate)
    epochs = parts.stages[number].epochs
    rate = anytime.stage_rate(options.schedule, base, epoch, epochs)
    settings = {**state.settings, "learning_rate": jnp.float32(rate)}
    return progress._replace(state=state._replace(settings=settings))


def _arrive(
    parts: Parts, number: int, progress: Progress, data: Data, program: Program
) -> Progress:
    """The network as a stage begins with it: as it is, anew, or pruned."""
    state, options, memory = progress.state, parts.options, dict(progress.memory)
    if parts.arrival.anew:
        state = new_network(program.training, state, data, number)
    usual = parts.arrival.densities[number] if parts.arrival.densities else None
    if usual is not None:
        density = _meant(state.settings[f"density_{number}"], usual)
        timetable = timetable_of(options, state, data)
        chosen = sample_of(options, timetable, state, number)
        sample = take(data, jnp.asarray(chosen))
        state, spent = parts.prune(state, sample, density, number)
        memory["macs"] += jnp.float32(spent / parts.batch_size)
    memory["score"] = jnp.float32(-jnp.inf)
    return progress._replace(state=_copy(state), memory=memory)


def _validate(
    parts: Parts, number: int, progress: Progress, data: Data, program: Program
) -> Progress:
    """The best epoch so far; without held-out examples it is the last."""
    state, memory = progress.state, progress.memory
    visible = timetable_of(parts.options, state, data).visible[number]
    score = jnp.float32(state.step)
    if parts.options.select == "best" and len(visible.validation):
        examples = take(data, jnp.asarray(visible.validation))
        counts = program.training.finish(progress, data, program)
        # As it is kept, or equal ones differ.
        score = jnp.float32(accuracy_of(program, counts, examples))
    if not score > memory["score"]:
        return progress
    better = {"best": _copy(state), "score": score}
    return progress._replace(memory={**memory, **better})


def _close(
    parts: Parts, number: int, progress: Progress, data: Data, program: Program
) -> Progress:
    """The state of the best epoch, which the next stage resumes from."""
    progress = _validate(parts, number, progress, data, program)
    state = progress.state
    best = _under_last_masks(progress.memory["best"], state)
    fresh = None if parts.options.carry_moments else _forget(best, program.training)
    return progress._replace(state=anytime.go_on_from(best, state, fresh))


def _forget(state: TrainState, training: Training) -> TrainState:
    """The state with the moments of an optimiser that has seen nothing."""
    rate = training.rate(state.settings["learning_rate"], training.horizon)
    tx = training.transform(rate, state.settings, jax.random.key(0))
    return state._replace(opt_state=tx.init(state.params))


def _under_last_masks(best: TrainState, state: TrainState) -> TrainState:
    """The best epoch, no denser than the network was asked to be by now."""
    if _live(best) <= _live(state):
        return best

    def last(kept: Any, now: Any) -> Any:
        return kept._replace(masks=now.masks) if _is_sparse(kept) else kept

    both = best.opt_state, state.opt_state
    opt_state = jax.tree.map(last, *both, is_leaf=_is_sparse)
    params = best.params
    if isinstance(params, Dual):
        learners = joint_state(opt_state)
        params = Dual(*map(zero_pruned, params, learners))
    else:
        params = zero_pruned(params, opt_state)
    return best._replace(params=params, opt_state=opt_state)


def _live(state: TrainState) -> int:
    masks = [own.masks for own in sparse_states(state.opt_state)]
    return sum(int(jnp.sum(mask)) for mask in jax.tree.leaves(masks))


def _is_sparse(node: Any) -> bool:
    return isinstance(node, SparsifyState)


def _meant(setting: Any, usual: float) -> float:
    """The number that a setting stands for, which is kept in float32.

    >>> _meant(np.float32(0.8**1.5), 0.8**1.5) == 0.8**1.5, _meant(np.float32(0.1), 1.0)
    (True, 0.1)
    """
    value = np.float32(setting)
    return usual if np.float32(usual) == value else float(str(value))


def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)
