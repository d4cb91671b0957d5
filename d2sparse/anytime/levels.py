"""How much of the network is left after each megabatch."""

import math
from typing import Literal, get_args

LevelSchedule = Literal["linear_level", "linear_density", "cubic", "constant"]
LEVELS: tuple[LevelSchedule, ...] = get_args(LevelSchedule)
BASE = 0.8


def density(level: float) -> float:
    """Part of the prunable weights that is left at a level, `0.8^level`.

    A level is one pruning of a fifth, the unit of the lottery tickets.

    >>> round(density(4.5), 3)
    0.366
    """
    return BASE**level


def levels(
    target: float,
    megabatches: int,
    schedule: LevelSchedule = "linear_level",
    first: float = 1.0,
) -> list[float]:
    """The level at which the network is trained on each megabatch.

    With s from 0 at the first to 1 at the last megabatch:

    * `"linear_level"`: `first + (target - first) s`, the density falls geometrically
      (APP).
    * `"linear_density"`: the density falls linearly.
    * `"cubic"`: the density is `d_T + (d_1 - d_T) (1 - s)^3`, most of it early (Zhu and
      Gupta, arXiv 1710.01878).
    * `"constant"`: the target from the start.

    The last level is the target; with a single megabatch it is the only one.

    Args:
      target: the last level tau, above 0.
      megabatches: number T, at least 1.
      schedule: one of the above.
      first: the first level, from 0 to the target; a larger one counts as the target.

    Raises:
      ValueError: a number is out of its range, or there is no such schedule.

    >>> levels(4.5, 8)
    [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]
    >>> levels(4.5, 1)
    [4.5]
    """
    if schedule not in LEVELS:
        raise ValueError(f"expected levels of {', '.join(LEVELS)}, got {schedule!r}")
    if not 0 < target < math.inf:
        raise ValueError(
            f"expected a target level above 0, got {target}; at 0 nothing would be "
            "pruned: train the dense network instead"
        )
    if megabatches < 1 or not first >= 0:
        raise ValueError(
            "expected at least 1 megabatch and a first level of at least 0, got "
            f"megabatches={megabatches}, first={first}"
        )
    first = target if schedule == "constant" else min(first, target)
    parts = [t / (megabatches - 1) for t in range(megabatches - 1)] + [1.0]
    return [_level(first, target, schedule, part) for part in parts[:-1]] + [target]


def _level(first: float, target: float, schedule: str, part: float) -> float:
    if schedule in ("linear_level", "constant"):
        return first + (target - first) * part
    rest = (1 - part) ** 3 if schedule == "cubic" else 1 - part
    low, high = density(target), density(first)
    return math.log(low + (high - low) * rest, BASE)
