"""The report of a comparison on a stream: its tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from d2sparse import anytime, plots
from d2sparse import data as streamed
from d2sparse.checks import optional
from d2sparse.study.grid import Plan
from d2sparse.study.reporting import (
    Comparison,
    heading_of,
    label_of,
    read,
    summary_rows,
    write,
)
from d2sparse.study.runner import judged
from d2sparse.study.streams import stream_options
from d2sparse.study.tables import percent, titled_table

with optional(__name__):
    import pandas as pd

_ALONG = ("seen", "test_error", "accuracy", "density", "gap", "released_gap")
# Figures along the stream by name: column, label, whether on a logarithmic axis.
_FIGURES = {
    "anytime_accuracy": ("accuracy", "accuracy", False),
    "density": ("density", "live weights of the prunable ones", True),
    "gap": ("gap", "training minus test accuracy", False),
}


def report(comparison: Comparison, classes: int, test_size: int) -> dict[str, Any]:
    """Writes summary, tables and figures of the finished runs, and prints the tables.

    Args:
      comparison: of methods on a stream.
      classes: number of classes, one of which is guessed before the first stage.
      test_size: number of examples that are judged on.

    Returns:
      The summary, as in summary.json: "rows", a row of the tables, and "stages", means
      after every stage by the name of a row.
    """
    config, plans = comparison.config, comparison.plans
    stages = read(config, comparison.out, plans, parts=True)
    runs = pd.DataFrame()
    if len(stages):
        runs = measure_streams(stages, plans, classes, test_size)
    rows, tables = _summarise(comparison, runs)
    along = {
        name: {key: _along(part, key) for key in _ALONG}
        for name, part in (stages.groupby("run", sort=False) if len(stages) else ())
    }
    results = {"rows": rows.to_dict("records"), "stages": along}
    summary = write(comparison, results, heading_of(config) + "\n\n".join(tables))
    if len(stages):
        _draw(comparison, stages)
    return summary


def _along(part: "pd.DataFrame", key: str) -> list[float]:
    """Means over seeds after every stage; NaN where nothing was held out."""
    means: list[float] = (
        part[key].astype(float).groupby(part["arrived"]).mean().tolist()
    )
    return means


def measure_streams(
    stages: "pd.DataFrame", plans: Sequence[Plan], classes: int, test_size: int
) -> "pd.DataFrame":
    """A row for every run: its last stage, and the measures of the whole stream.

    Args:
      stages: a row for every stage, from `read_runs` with parts.
      plans: of the runs.
      classes: as for `report`.
      test_size: as for `report`.
    """
    flags, rows = {plan.row.name: plan.config for plan in plans}, []
    for (name, _), part in stages.groupby(["run", "seed"], sort=False):
        options = stream_options(flags[name])
        errors = streamed.on_finest_grid(
            *(part["test_error"].tolist(), options.wait, options.megabatches),
            1 - 1 / classes,
        )
        whole = {
            **anytime.anytime_measures(errors, test_size),
            "most_nonzeros": int(part["nonzeros"].max()),
            "sum_nonzeros": int(part["nonzeros"].sum()),
            "mean_gap": float(part["gap"].mean()),
        }
        last = part.drop(columns=["layers", "title"]).to_dict("records")[-1]
        rows.append({**last, **whole})
    return pd.DataFrame(rows)


def _summarise(
    comparison: Comparison, runs: "pd.DataFrame"
) -> tuple["pd.DataFrame", list[str]]:
    """The rows of the summary, and the tables of errors and of the last stage."""
    if not len(runs):
        return runs, [titled_table(runs, {"method": "method"})]

    def summary_of(column: str) -> "pd.DataFrame":
        changed = runs.assign(accuracy=runs[column])
        return summary_rows(comparison._replace(runs=changed))

    rows, errors = summary_of("accuracy"), summary_of("mean_error")
    rows = rows.assign(
        mean_error_error=errors["standard_error"],
        gap_error=summary_of("gap")["standard_error"],
    )
    apart = {}
    for name in comparison.references:
        if f"minus_{name}" in errors.columns:
            apart[f"minus_{name}"] = f"minus {name}"
            for end in ("", "_error"):
                rows[f"error_minus_{name}{end}"] = errors[f"minus_{name}{end}"]
    named = {"method": "method"}
    named |= {name: name for name in comparison.axes if name in rows.columns}
    gaps = [percent(*gap) for gap in zip(rows["gap"], rows["gap_error"], strict=True)]
    error_table = titled_table(
        errors.assign(gap=gaps),
        {**named, "accuracy": "mean error %", **apart, "gap": "gap %"},
    )
    last = {"density": "density %", "nonzeros": "non-zeros", "relative_macs": "MACs"}
    last_table = titled_table(
        rows.assign(density=[f"{100 * density:.3g}" for density in rows["density"]]),
        {**named, "accuracy": "last accuracy %", **apart, **last},
    )
    return rows, [error_table, last_table]


def _draw(comparison: Comparison, stages: "pd.DataFrame") -> None:
    config, out = comparison.config, comparison.out
    rows = {plan.row.name: plan.row for plan in comparison.plans}
    lines: list[Mapping[str, Any]] = [
        {**line, "method": label_of(rows[line["run"]]), "step": line["arrived"]}
        for line in stages.to_dict("records")
    ]
    for title, (key, label, log) in _FIGURES.items():
        label = f"{judged(config)} {label}" if key == "accuracy" else label
        out.save_figure(title, plots.along_stream(lines, key, label, log=log))
    for name in rows:
        layers = [
            {**line, "method": path, "density": density}
            for line in lines
            if line["run"] == name
            for path, density in line["layers"].items()
        ]
        if any(line["density"] < 1 for line in layers):
            figure = plots.along_stream(layers, "density", "live weights", log=True)
            out.save_figure(f"layers-{name}", figure)
