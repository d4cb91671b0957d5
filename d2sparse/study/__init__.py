"""Comparisons: methods x values of flags x seeds, resumable, in one table.

    from d2sparse import data, study

    source = data.from_arrays(x_train, y_train, x_test, y_test)
    config = study.Config(methods=("dense", "rigl", "imp"), samples_per_class=0)
    runs = study.compare(config, source=source, model=model)  # a data frame

`flags`: what can be said of a comparison. `grid`, `trainings`, `splits`: from flags to
trainings and their data. `runner`, `tracking`: trains what has not finished. `judging`:
quality, calibration, corruptions, cost. `frames`, `tables`, `reporting`: tidy rows and
what is made of them. `cli`: the same as a command.
"""

from d2sparse.study.comparing import (
    Experiment,
    compare,
    default_workdir,
    identified,
    refuse_all_failed,
)
from d2sparse.study.flags import (
    Config,
    MethodName,
    as_axes,
    aside,
    given,
    refuse,
)
from d2sparse.study.frames import (
    difference,
    read_runs,
    summarise,
    with_difference,
)
from d2sparse.study.grid import (
    Plan,
    Row,
    flags_used,
    list_rows,
    make_plans,
    unread_options,
)
from d2sparse.study.judging import zeros
from d2sparse.study.reporting import Comparison, report
from d2sparse.study.runner import End, Finished, Runner, run_plans
from d2sparse.study.splits import Splits, make_draw_splits
from d2sparse.study.tables import percent, table_of
from d2sparse.study.trainings import save_ticket

__all__ = [
    "Comparison",
    "Config",
    "End",
    "Experiment",
    "Finished",
    "MethodName",
    "Plan",
    "Row",
    "Runner",
    "Splits",
    "as_axes",
    "aside",
    "compare",
    "default_workdir",
    "difference",
    "flags_used",
    "given",
    "identified",
    "list_rows",
    "make_draw_splits",
    "make_plans",
    "percent",
    "read_runs",
    "refuse",
    "refuse_all_failed",
    "report",
    "run_plans",
    "save_ticket",
    "summarise",
    "table_of",
    "unread_options",
    "with_difference",
    "zeros",
]
