"""Values of flags for every method, chosen on a validation part of the labels.

Every method gets the same number of trials. The first trial has the flags as they are
given; the others come from a sequence that fills the ranges evenly, however many there
are (the additive recurrence of Roberts, with powers of the generalised golden ratio),
the same points for all methods. The best mean validation accuracy wins, ties going to
the smaller negative log likelihood. The test set is not read.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from d2sparse import data, records
from d2sparse.checks import check_least, optional
from d2sparse.constraints import Method
from d2sparse.constraints.equal_costs import Known
from d2sparse.data import Source
from d2sparse.models import Model
from d2sparse.study import reporting
from d2sparse.study.comparing import Experiment, default_workdir, identified
from d2sparse.study.dry_run import print_plans
from d2sparse.study.flags import (
    Config,
    as_axes,
    aside,
    given,
    text_of,
)
from d2sparse.study.grid import Plan, Row, make_plans
from d2sparse.study.runner import Finished, Runner, run_plans
from d2sparse.study.splits import make_draw_splits
from d2sparse.study.tables import percent
from d2sparse.study.tuned import (
    FILE,
    RATES,
    Flags,
    Tuned,
    list_tries,
    read_tuned,
    tuned_values,
)

with optional(__name__):
    from rich.console import Console

_PART = 0.2  # Of the labels, to validate on.
_TUNING = ("trials", "tuning_seeds")


@dataclasses.dataclass(frozen=True)
class Tunable(Config):
    """Tuning.

    Flags of a comparison whose methods can be tuned before.
    """

    # Part of the labels to validate on, with --tune alone; 0: a fifth.
    validation_fraction: float = 0.0
    # Choose values for every method and number of labels on the validation part, and
    # write them to tuned.json. Later runs in the same directory use them.
    tune: bool = aside(False)
    trials: int = aside(8)  # values that are tried, the same number for every method
    tuning_seeds: int = aside(3)  # runs of every trial
    tuned: str = aside("")  # file of chosen values; empty: tuned.json of the run
    tuning_rates: tuple[float, ...] = (0.01, 0.3)  # learning rates, from and to
    tuning_decays: tuple[float, ...] = (1e-5, 1e-2)  # weight decays, from and to

    def __post_init__(self) -> None:
        """Refuses values out of their ranges, and flags without effect.

        Raises:
          ValueError: naming the flag.
        """
        super().__post_init__()
        check_least(self, {"trials": 1, "tuning_seeds": 1})
        for name in ("tuning_rates", "tuning_decays"):
            ends = getattr(self, name)
            if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
                raise ValueError(f"expected {name} from above 0 to no less, got {ends}")
        for name in given(self).keys() & {*_TUNING, "validation_fraction"}:
            if not self.tune:
                raise ValueError(
                    f"expected no {name}, which is for --tune, got "
                    f"{getattr(self, name)}; leave it away"
                )
        if self.tune and self.tuned:
            raise ValueError(
                "expected no tuned, since --tune chooses the values, got "
                f"{self.tuned}; leave one away"
            )


def points(dimensions: int, count: int) -> np.ndarray:
    """Points that fill the unit cube evenly: float[count, dimensions].

    `u_t = frac(1 / 2 + t (1 / phi, ..., 1 / phi^d))` with `phi^(d + 1) = phi + 1`. More
    points begin with the same ones.

    >>> points(1, 3).round(3).ravel().tolist()
    [0.5, 0.118, 0.736]
    """
    phi = 2.0
    for _ in range(50):
        phi = (1 + phi) ** (1 / (dimensions + 1))
    steps = phi ** -np.arange(1.0, dimensions + 1)
    return cast(np.ndarray, (0.5 + np.arange(count)[:, None] * steps) % 1)


def draw_trials(flags: Any, method: Method) -> list[Flags]:
    """The values of every trial of a method; those of the first are the flags.

    Args:
      flags: those of a `Tunable`, with the number of steps.
      method: a row of METHODS.
    """
    tries = list_tries(flags, method)
    ranges = dict(zip(RATES, (flags.tuning_rates, flags.tuning_decays), strict=True))
    trials: list[Flags] = [{}]
    for point in points(2 + len(tries), flags.trials)[1:]:
        places = iter(point.tolist())
        drawn: dict[str, Any] = {
            name: _between(ends, next(places)) for name, ends in ranges.items()
        }
        for name, choices in tries.items():
            drawn[name] = choices[int(next(places) * len(choices))]
        trials.append(drawn)
    return trials


def tune(
    config: Tunable,
    experiment: Experiment,
    source: Source | None = None,
    model: Model | None = None,
) -> Tuned:
    """Runs the trials that are missing, and writes which values are the best.

    Trials have a run directory, `tuning`, in that of the comparison.

    Args:
      config: the flags.
      experiment: what is compared; its name and its table of methods are used.
      source: data in place of --dataset; its test set is not read.
      model: a network in place of --model.

    Returns:
      The chosen values, with those of earlier calls for other methods and labels.

    Raises:
      ValueError: a flag is out of its range, or all trials of a method have failed.
    """
    source = source or data.load(config.dataset, config.data_dir)
    config = identified(config, source, model)
    # The directory is that of the runs that follow, which validate on nothing.
    later = dataclasses.replace(config, validation_fraction=0.0)
    workdir = config.workdir or default_workdir(experiment.name, later)
    trial_flags, draw_splits = _of_trials(config), make_draw_splits(source)
    table, classes = experiment.methods, source.num_classes
    values = functools.partial(_trial_values, methods=table)
    build = None if model is None else (lambda flags: model)
    plans = make_plans(trial_flags, draw_splits, classes, build, table, values)
    if config.dry_run:
        print_plans(trial_flags, plans, draw_splits)
        return {}
    out = records.open_run(workdir, later, Finished)
    trials = records.open_run(out.workdir / "tuning", trial_flags, Finished)
    chosen, rows = read_tuned(workdir, methods=table), list[dict[str, Any]]()
    with reporting.partial_report(trials, lambda: _report(trials, trial_flags, rows)):
        for name in config.methods:
            mine = [plan for plan in plans if plan.row.method == name]
            _train(Runner(trial_flags, trials, draw_splits), mine)
            rows += _choose(trials, mine, table[name])
    for row in rows:
        if row["chosen"]:
            labels = str(row["samples_per_class"])
            chosen.setdefault(row["method"], {})[labels] = row["values"]
    out.write_text(FILE, json.dumps(chosen, indent=2, sort_keys=True) + "\n")
    _report(trials, trial_flags, rows)
    Console(soft_wrap=True).print(f"\nThe choice is in {out.workdir / FILE}")
    return chosen


def _of_trials(config: Tunable) -> Tunable:
    """The flags of the trials, which are an axis, on a validation part of the labels.

    Wrong labels and long tails are learned with the values of their number of labels.
    """
    config = as_axes(config, ["samples_per_class"])
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    values |= {
        "validation_fraction": config.validation_fraction or _PART,
        "seeds": config.tuning_seeds,
        "label_noise": 0.0,
        "imbalance": 1.0,
        "axes": {
            "samples_per_class": config.axes["samples_per_class"],
            "trial": tuple(range(config.trials)),
        },
    }
    bases = (type(config),)
    form = dataclasses.make_dataclass(
        "Trials", [("trial", int, 0)], bases=bases, frozen=True
    )
    return cast(Tunable, form(**values))


def _trial_values(row: Row, base: Known, methods: Mapping[str, Method]) -> Flags:
    """The values of the trial of a row, in place of its number."""
    trials = draw_trials(base.flags, methods[row.method])
    return {"trial": 0, **trials[base.flags.trial]}


def _train(runner: Runner, plans: Sequence[Plan]) -> None:
    before = len(runner.out.units())
    run_plans(runner, plans)
    # The programs of one method are of no use to the next, and a process that keeps
    # thousands of them has no room left in its table of memory maps.
    if len(runner.out.units()) > before:
        jax.clear_caches()


def _choose(
    out: records.Run, plans: Sequence[Plan], method: Method
) -> list[dict[str, Any]]:
    """A row for every trial of a method, the best one for each number of labels chosen.

    Raises:
      ValueError: no trial has come to its end.
    """
    rows = [_row(out, plan, method) for plan in plans]
    for labels in dict.fromkeys(row["samples_per_class"] for row in rows):
        complete = [
            row
            for row in rows
            if row["samples_per_class"] == labels and not math.isnan(row["accuracy"])
        ]
        if not complete:
            raise ValueError(
                f"expected a trial of {plans[0].row.method} with {labels} labels per "
                "class to come to its end, got none; lower --tuning_rates"
            )
        best = min(complete, key=lambda row: (-row["accuracy"], row["nll"]))
        best["chosen"] = True
    return rows


def _row(out: records.Run, plan: Plan, method: Method) -> dict[str, Any]:
    """The values and the quality of a trial; NaN where a run of it has failed."""
    runs = reporting.read(dataclasses.replace(plan.config, axes={}), out, [plan])
    complete = len(runs) == plan.config.seeds
    return {
        **{"method": plan.row.method, **dict(plan.row.values)},
        "values": tuned_values(plan, method, {}),
        "accuracy": float(runs["accuracy"].mean()) if complete else math.nan,
        "nll": float(runs["nll"].mean()) if complete else math.nan,
        "chosen": False,
    }


def _report(
    out: records.Run, config: Tunable, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    summary = {"config": dataclasses.asdict(config), "trials": rows}
    out.write_summary(summary)
    out.write_text("table.md", _table(rows) + "\n")
    Console(soft_wrap=True).print(_table(rows))
    return summary


def _between(ends: tuple[float, ...], place: float) -> float:
    """At a place of a logarithmic scale, to two digits."""
    low, high = ends
    return float(f"{low * (high / low) ** place:.2g}")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    titles = {
        "method": "method",
        "samples_per_class": "labels",
        "trial": "trial",
        "accuracy": "validation %",
        "nll": "NLL",
        "values": "values",
        "chosen": "",
    }
    cells = [
        {
            **row,
            "accuracy": percent(row["accuracy"]),
            "nll": f"{row['nll']:.3f}",
            "values": ", ".join(f"{k} {text_of(v)}" for k, v in row["values"].items()),
            "chosen": "chosen" if row["chosen"] else "",
        }
        for row in rows
    ]
    return records.markdown_table(cells, titles)
