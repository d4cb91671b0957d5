"""The stages of a stream: steps, learning rates, and what the next resumes from."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.train import TrainState
from d2sparse.transforms import FreezeState, SparsifyState, mask_states

StageSchedule = Literal["step", "cosine", "constant"]
STAGE_SCHEDULES: tuple[StageSchedule, ...] = get_args(StageSchedule)


class Stage(NamedTuple):
    """The training on what is visible after one arrival.

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


def go_on_from(
    best: TrainState, state: TrainState, fresh: TrainState | None = None
) -> TrainState:
    """The best state of a stage as the beginning of the next one, as a copy.

    Weights, statistics and masks are those of the best; steps, and what else counts
    them, go on.

    Args:
      best: what is resumed from.
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
    resumed = best._replace(step=state.step, faults=state.faults, opt_state=opt_state)
    return jax.tree.map(jnp.copy, resumed)  # Training uses up what it is given.
