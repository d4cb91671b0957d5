"""A learner on a stream: stage after stage, epoch after epoch, and its best state."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.train import TrainState
from d2sparse.transforms import FreezeState, SparsifyState, mask_states

StageSchedule = Literal["step", "cosine", "constant"]
STAGE_SCHEDULES: tuple[StageSchedule, ...] = get_args(StageSchedule)


class Stage(NamedTuple):
    """When a learner trains on what is visible after one arrival.

    Attributes:
      begin: step of the run at which it begins.
      per_epoch: steps of a pass over what is visible.
      epochs: passes.
    """

    begin: int
    per_epoch: int
    epochs: int

    @property
    def end(self) -> int:
        """Step of the run before which it ends."""
        return self.begin + self.epochs * self.per_epoch


class Journey(NamedTuple):
    """Where a learner on a stream stands; a copy of it is the run.

    Attributes:
      stage: int32[], arrivals before the one it learns from.
      epoch: int32[], epochs of the stage that are over and validated.
      state: what is being trained.
      best: the state after the best epoch of the stage; before the first, any.
      score: float32[], what that was measured by; -inf before the first.
    """

    stage: jax.Array
    epoch: jax.Array
    state: TrainState
    best: TrainState
    score: jax.Array


def plan_stages(
    sizes: Sequence[int], batch_size: int, epochs: int, steps: int = 0
) -> list[Stage]:
    """The stages of a run.

    Args:
      sizes: examples that are visible for training at each stage.
      batch_size: examples per step, at most the smallest size.
      epochs: passes of every stage, at least 1.
      steps: steps of every stage in place of epochs, as whole passes and at least one;
        0 for epochs.

    >>> plan_stages([8, 16], batch_size=4, epochs=3)[1]
    Stage(begin=6, per_epoch=4, epochs=3)
    """
    stages, begin = [], 0
    for size in sizes:
        per_epoch = max(size // batch_size, 1)
        passes = max(round(steps / per_epoch), 1) if steps else epochs
        stages.append(Stage(begin, per_epoch, passes))
        begin = stages[-1].end
    return stages


def stage_rate(
    schedule: StageSchedule, learning_rate: float, epoch: int, epochs: int
) -> float:
    """The learning rate of an epoch of a stage; every stage begins anew.

    * `"step"`: a tenth after 40 % and a hundredth after 80 % of the epochs (APP: after
      20 and 40 of 50).
    * `"cosine"`: from the whole towards 0.
    * `"constant"`.

    Raises:
      ValueError: no such schedule.

    >>> [round(stage_rate("step", 0.1, epoch, 5), 6) for epoch in range(5)]
    [0.1, 0.1, 0.01, 0.01, 0.001]
    """
    if schedule not in STAGE_SCHEDULES:
        known = ", ".join(STAGE_SCHEDULES)
        raise ValueError(f"expected a schedule of {known}, got {schedule!r}")
    part = epoch / epochs
    if schedule == "step":
        return learning_rate * 0.1 ** ((part >= 0.4) + (part >= 0.8))
    if schedule == "cosine":
        return learning_rate * (1 + float(np.cos(np.pi * part))) / 2
    return learning_rate


def begin_journey(state: TrainState) -> Journey:
    """A learner that has seen nothing."""
    zero = jnp.zeros((), jnp.int32)
    return Journey(zero, jnp.copy(zero), state, _copy(state), jnp.float32(-jnp.inf))


def go_on_from(
    best: TrainState, state: TrainState, fresh: TrainState | None = None
) -> TrainState:
    """The best state of a stage as the beginning of the next one, as a copy.

    Weights, statistics and masks are those of the best; steps, and what else counts
    them, go on.

    Args:
      best: what is gone on from.
      state: where the training stands.
      fresh: a state without momentum, whose moments are taken; None keeps those of
        `state`, as if weights and moments belonged together.
    """

    def has_masks(node: Any) -> bool:
        return isinstance(node, SparsifyState | FreezeState)

    def joined(now: Any, chosen: Any, new: Any) -> Any:
        if not has_masks(now):
            return chosen
        return now._replace(masks=chosen.masks, inner=new.inner)

    moments = (state if fresh is None else fresh).opt_state
    opt_state = moments  # All of it, where there are no masks.
    if mask_states(state.opt_state):
        opt_state = jax.tree.map(
            joined,
            state.opt_state,
            best.opt_state,
            moments,
            is_leaf=has_masks,
        )
    return _copy(
        best._replace(step=state.step, faults=state.faults, opt_state=opt_state)
    )


def learn_stream(
    journey: Journey,
    stages: Sequence[Stage],
    arrive: Callable[[int, TrainState], TrainState],
    fit: Callable[[Journey, int], TrainState],
    validate: Callable[[int, TrainState], float],
    depart: Callable[[int, TrainState, TrainState], TrainState],
) -> TrainState:
    """Trains through all stages from wherever the journey stands.

    After every epoch the state is validated, and the best of its stage is kept: the
    first of equals.

    Args:
      journey: where to start; its state is used up.
      stages: all stages of the stream.
      arrive: `(stage, state) -> state`, what becomes of the network when the data of a
        stage arrive, such as a pruning.
      fit: `(journey, step) -> state`, trains the state of the journey up to a step on
        what is visible at its stage. What is saved inside of it has to be the journey
        with the present state in place of its own.
      validate: `(stage, state) -> score`, larger is better. With a score that never
        falls the last epoch counts.
      depart: `(stage, best, state) -> state`: the stage is over; what comes next begins
        with the result.

    Returns:
      The best state of the last stage.
    """
    for number in range(int(journey.stage), len(stages)):
        stage = stages[number]
        # Inside of the stage it has arrived already.
        if int(journey.state.step) == stage.begin:
            journey = begin_journey(arrive(number, journey.state))
            journey = journey._replace(stage=jnp.int32(number))
        for epoch in range(int(journey.epoch), stage.epochs):
            stop = stage.begin + (epoch + 1) * stage.per_epoch
            state = fit(journey, stop)
            score = jnp.float32(
                validate(number, state)
            )  # As it is kept, or ties differ.
            journey = journey._replace(state=state, epoch=jnp.int32(epoch + 1))
            if score > journey.score:
                journey = journey._replace(best=_copy(state), score=score)
        best = journey.best
        journey = journey._replace(
            state=depart(number, best, journey.state), epoch=jnp.int32(0)
        )
    return best


def _copy(state: TrainState) -> TrainState:
    """Not used up by the training of the other."""
    return jax.tree.map(jnp.copy, state)
