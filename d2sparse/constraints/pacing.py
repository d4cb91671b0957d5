"""How fast a training goes: its learning-rate schedule."""

from typing import Any

import optax

from d2sparse.train import SCHEDULES, Constraint


def paced(schedule: str, scale: float = 1.0) -> Constraint:
    """Another learning-rate schedule, from a part of the learning rate.

    Args:
      schedule: "cosine", falling to 0 at the last step, or "constant".
      scale: the rate at the first step, as a part of the learning rate.

    Raises:
      ValueError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(
            f"expected schedule of {', '.join(SCHEDULES)}, got {schedule!r}"
        )

    def rate(first: Any, horizon: int) -> optax.Schedule:
        return SCHEDULES[schedule](scale * first, horizon)

    return lambda training: training._replace(rate=rate)
