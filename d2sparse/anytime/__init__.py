"""Anytime learning: data arrive in megabatches, and the network shrinks as they do.

On a stream (ALMA, Caccia et al., arXiv 2106.09563) a network has to predict well after
every megabatch, not only at the end. Anytime progressive pruning (APP, Misra et al.,
arXiv 2204.01640) prunes it at every arrival, before it trains on:

    lambda_t = 1 + (tau - 1) (t - 1) / (T - 1)        levels
    d_t = 0.8^lambda_t                                 part of the weights that stays
    m_t = the d_t N largest scores among the live      on a sample of what was seen
    train on R_t under m_t, keep the best epoch on validation, test, resume from it

`levels` and `density` are the schedule, `prune` is one pruning, `stages` when there is
training, and `measures` what is reported. The streams themselves are
`d2sparse.data.cut_stream` and `visible`, and training on them is
`d2sparse.constraints.stream`.

The code that was released with APP does something else, see `experiments.anytime`.
"""

from d2sparse.anytime.levels import LEVELS, LevelSchedule, density, levels
from d2sparse.anytime.measures import (
    anytime_measures,
    area_under_errors,
    error_changes,
    relative_gap_change,
)
from d2sparse.anytime.pruning import DEAD, Dead, prune
from d2sparse.anytime.stages import Stage, go_on_from, plan_stages, stage_rate

__all__ = [
    "DEAD",
    "LEVELS",
    "Dead",
    "LevelSchedule",
    "Stage",
    "anytime_measures",
    "area_under_errors",
    "density",
    "error_changes",
    "go_on_from",
    "levels",
    "plan_stages",
    "prune",
    "relative_gap_change",
    "stage_rate",
]
