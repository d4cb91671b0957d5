"""The choice of values for every method, on a validation part of the labels.

Every method gets as many trials. The first are the flags as they are; those that follow
come from a sequence that fills the ranges evenly, however many there are (the additive
recurrence of Roberts, with the powers of the generalised golden ratio), the same points
for all methods. The best mean validation accuracy wins, ties going to the smaller
negative log likelihood, and the test set is not read.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

import numpy as np
from rich.console import Console

from d2sparse import data, disk, records, schema
from experiments import results, units
from experiments.few_labels.cells import Cell, list_settings
from experiments.few_labels.contenders import CONTENDERS
from experiments.few_labels.options import LowDataOptions
from experiments.few_labels.plans import Plan, Planner, Values, run_plans
from experiments.task import check_choice

Tuned = dict[str, dict[str, Values]]  # By method and labels per class.
FILE = "tuned.json"
_PART = 0.2  # Of the labels, to validate on.


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
    return (0.5 + np.arange(count)[:, None] * steps) % 1


def draw_trials(config: LowDataOptions, method: str) -> list[Values]:
    """The values of every trial; those of the first are the flags."""
    own = CONTENDERS[method].own(config)
    ranges = {
        "learning_rate": config.tuning_rates,
        "weight_decay": config.tuning_decays,
    }
    trials: list[Values] = [{}]
    for point in points(2 + len(own), config.trials)[1:]:
        places = iter(point.tolist())
        drawn: dict[str, Any] = {
            name: _between(*ends, next(places)) for name, ends in ranges.items()
        }
        for name, choices in own.items():
            drawn[name] = choices[int(next(places) * len(choices))]
        trials.append(drawn)
    return trials


def tune(config: LowDataOptions, source: data.Source, workdir: str) -> Tuned:
    """Runs the trials that are missing, and writes what they say.

    Trials are a run directory of their own, `tuning`, in that of the benchmark.

    Args:
      config: the flags.
      source: the data set; its test set is not read.
      workdir: the run directory of the benchmark.

    Returns:
      The chosen values, with those of earlier calls for other methods and budgets.

    Raises:
      ValueError: a flag is out of its range, or all trials of a method have failed.
    """
    fraction = config.validation_fraction or _PART
    own = dataclasses.replace(
        config,
        validation_fraction=fraction,
        seeds=config.tuning_seeds,
        # Wrong labels and long tails are learned with the values of their budget.
        label_noises=(),
        imbalances=(),
    )
    planned = [
        (planner, cell, _plan(own, planner, cell))
        for setting in list_settings(own)
        for planner in [Planner(own, source, setting)]
        for cell in [Cell(method, setting) for method in own.methods]
    ]
    # The directory is that of the runs that follow, which validate on nothing.
    out = records.open_run(
        workdir, dataclasses.replace(config, validation_fraction=0.0), results.Finished
    )
    trials = records.open_run(out.workdir / "tuning", own, results.Finished)
    chosen = read_tuned(workdir)
    rows: list[dict[str, Any]] = []

    def report() -> Mapping[str, Any]:
        summary = {"config": dataclasses.asdict(own), "trials": rows}
        trials.write_summary(summary)
        trials.write_text("table.md", _table(rows) + "\n")
        Console(soft_wrap=True).print(_table(rows))
        return summary

    with units.reporting(trials, report) as reported:
        for planner, cell, plans in planned:
            run_plans(planner.config, trials, source, plans, lambda *_: {})
            tried = _rows(own, cell, plans, trials)
            best = _best(cell, tried)
            best["chosen"] = True
            chosen.setdefault(cell.method, {})[cell.setting.name] = best["values"]
            rows += tried
    out.write_text(FILE, json.dumps(chosen, indent=2, sort_keys=True) + "\n")
    reported()
    Console(soft_wrap=True).print(f"\nThe choice is in {out.workdir / FILE}")
    return chosen


def read_tuned(workdir: str, named: str = "") -> Tuned:
    """The chosen values: of the file that is named, or of the run directory.

    Args:
      workdir: the run directory.
      named: a file, or nothing.

    Returns:
      Nothing where no file is named and none has been written.

    Raises:
      ValueError: there is no such file, or it is another one.
    """
    if named:
        path = disk.local_path(named, "--tuned")
    else:
        path = disk.local_path(workdir, "--workdir") / FILE
    if not named and not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        _check_tuned(found)
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(
            f"expected a file of chosen values, got {path} ({error}); --tune writes one"
        ) from None
    return found


def _check_tuned(found: Any) -> None:
    """Raises ValueError where something is no value of a flag, by method and labels."""
    kinds = get_type_hints(LowDataOptions)
    for method, budgets in schema.parse(found, dict[str, dict[str, Any]]).items():
        check_choice("method", method, CONTENDERS)
        for budget, values in budgets.items():
            if not budget.isdecimal():
                raise ValueError(f"{method} has values for {budget!r}, not a number")
            for name, value in schema.parse(values, dict[str, Any]).items():
                check_choice("flag", name, kinds)
                schema.parse({name: value}, dict[str, kinds[name]])


def values_of(tuned: Mapping[str, Mapping[str, Values]], cell: Cell) -> Values:
    """What was chosen for a cell: for its method on its budget."""
    return tuned.get(cell.method, {}).get(str(cell.setting.samples), {})


def _between(low: float, high: float, place: float) -> float:
    """At a place of a logarithmic scale, to two digits."""
    return float(f"{low * (high / low) ** place:.2g}")


def _plan(config: LowDataOptions, planner: Planner, cell: Cell) -> dict[str, Plan]:
    """Every trial of a method on a budget, by the name of its units."""
    return {
        name: planner.plan(name, cell.method, values)
        for name, values in _named(config, cell).items()
    }


def _named(config: LowDataOptions, cell: Cell) -> dict[str, Values]:
    trials = draw_trials(config, cell.method)
    return {f"{cell.name}-trial{n}": values for n, values in enumerate(trials)}


def _rows(
    config: LowDataOptions, cell: Cell, plans: Mapping[str, Plan], out: records.Run
) -> list[dict[str, Any]]:
    """What became of every trial of a method."""
    rows = []
    for name in _named(config, cell):
        own = results.gather(out, name, config.tuning_seeds).values()
        complete = len(own) == config.tuning_seeds
        means = {
            key: float(np.mean([unit[key] for unit in own])) if complete else math.nan
            for key in ("accuracy", "nll")
        }
        values = dict(plans[name].values)
        rows.append({"trial": name, "values": values, **means, "chosen": False})
    return rows


def _best(cell: Cell, tried: Sequence[dict[str, Any]]) -> dict[str, Any]:
    complete = [row for row in tried if not math.isnan(row["accuracy"])]
    if not complete:
        raise ValueError(
            f"expected a trial of {cell.name} to come to its end, got none; lower "
            "--tuning_rates"
        )
    return min(complete, key=lambda row: (-row["accuracy"], row["nll"]))


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = {
        "trial": "trial",
        "accuracy": "validation accuracy %",
        "nll": "NLL",
        "values": "values",
        "chosen": "",
    }
    cells = [
        {
            "trial": row["trial"],
            "accuracy": f"{100 * row['accuracy']:.2f}",
            "nll": f"{row['nll']:.3f}",
            "values": ", ".join(f"{k} {v}" for k, v in row["values"].items()),
            "chosen": "chosen" if row["chosen"] else "",
        }
        for row in rows
    ]
    return records.markdown_table(cells, columns)
