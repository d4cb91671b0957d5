"""Anytime learning: data arrive in megabatches, and the network shrinks on the way.

A learner on a stream (ALMA, Caccia et al., arXiv 2106.09563) has to predict well after
every megabatch, not only at the end. Anytime progressive pruning (APP, Misra et al.,
arXiv 2204.01640) prunes it at every arrival before it trains on:

    lambda_t = 1 + (tau - 1) (t - 1) / (T - 1)        levels
    d_t = 0.8^lambda_t                                 part of the weights that stays
    m_t = the d_t N largest scores among the live      on a sample of what was seen
    train on R_t under m_t, keep the best epoch on validation, test, go on from there

`levels` and `density` are the schedule, `prune` is one pruning, `learn_stream` the walk
through the stages, and `measures` what is told of it. The streams themselves are
`d2sparse.data.cut_stream` and `visible`.

The code that was released with APP does something else, see `experiments.anytime`.
"""

from d2sparse.anytime.journeys import (
    Journey,
    Stage,
    begin_journey,
    go_on_from,
    learn_stream,
    plan_stages,
    stage_rate,
)
from d2sparse.anytime.levels import LEVELS, LevelSchedule, density, levels
from d2sparse.anytime.measures import (
    anytime_measures,
    area_under_errors,
    error_changes,
    relative_gap_change,
)
from d2sparse.anytime.pruning import DEAD, Dead, prune

__all__ = [
    "DEAD",
    "LEVELS",
    "Dead",
    "Journey",
    "LevelSchedule",
    "Stage",
    "anytime_measures",
    "area_under_errors",
    "begin_journey",
    "density",
    "error_changes",
    "go_on_from",
    "learn_stream",
    "levels",
    "plan_stages",
    "prune",
    "relative_gap_change",
    "stage_rate",
]
