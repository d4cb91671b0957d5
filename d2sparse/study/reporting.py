"""What is written of a comparison: the summary, the table, the figures."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from d2sparse import plots, records
from d2sparse.checks import optional
from d2sparse.study.flags import Config, text_of
from d2sparse.study.frames import read_runs, summarise, with_difference
from d2sparse.study.grid import Plan, Row
from d2sparse.study.runner import judged
from d2sparse.study.tables import STANDARD, table_of

with optional(__name__):
    import pandas as pd
    from rich.console import Console


class Comparison(NamedTuple):
    """A comparison whose runs have finished, or some of them.

    Attributes:
      config: the flags.
      out: the run directory.
      plans: what was compared.
      runs: the results, a row a run.
      references: methods that differences are taken to.
    """

    config: Config
    out: records.Run
    plans: Sequence[Plan]
    runs: "pd.DataFrame"
    references: tuple[str, ...] = ()

    @property
    def axes(self) -> list[str]:
        """Flags whose values were compared."""
        return list(self.config.axes)


Report = Callable[[Comparison], Mapping[str, Any]]


def report(comparison: Comparison) -> dict[str, Any]:
    """Writes summary, table and figures of the finished runs, and prints the table.

    Returns:
      The summary, as in summary.json.
    """
    rows = summary_rows(comparison)
    heading = heading_of(comparison.config)
    if not len(rows):
        return write(comparison, {"rows": []}, heading + "No run has a result.")
    table = table_of(rows, comparison.axes, comparison.references, STANDARD)
    summary = write(comparison, {"rows": rows.to_dict("records")}, heading + table)
    draw_cost(comparison, rows)
    draw_curves(comparison)
    if "sparsity" in comparison.axes:
        draw_sparsities(comparison, rows)
    return summary


def summary_rows(comparison: Comparison) -> "pd.DataFrame":
    """The summary with differences to the references, in the order of the plans."""
    runs, by = comparison.runs, ["method", *comparison.axes]
    rows = summarise(runs, by)
    if not len(rows):
        return rows
    by = [name for name in by if name in rows.columns]
    for reference in comparison.references:
        if set(runs["method"]) > {reference}:
            named = {"method": reference}
            rows = with_difference(rows, runs, reference, named, by)
    order = {_key(plan.row, by): n for n, plan in enumerate(comparison.plans)}
    place = [order[_values(row, by)] for row in rows.to_dict("records")]
    return rows.assign(_place=place).sort_values("_place").drop(columns="_place")


def heading_of(config: Config) -> str:
    """What the numbers of a table are."""
    seeds = "1 seed" if config.seeds == 1 else f"{config.seeds} seeds"
    return (
        f"{judged(config).capitalize()} accuracy, mean ± standard error over {seeds}; "
        "MACs of training, dense = 1.\n\n"
    )


def write(
    comparison: Comparison, results: Mapping[str, Any], table: str
) -> dict[str, Any]:
    """Writes summary and tables, adding what has failed, and prints the tables.

    Returns:
      The summary.
    """
    out, failed = comparison.out, comparison.out.failures()
    for name, why in failed.items():
        table += f"\n\n{name} failed and is not counted: {why}"
    config = dataclasses.asdict(comparison.config)
    summary = {"config": config, **results, "failed": failed}
    out.write_summary(summary)
    out.write_text("table.md", table + "\n")
    if out.writes:
        console = Console(soft_wrap=True)
        console.print(table, highlight=False, markup=False)
        console.print(f"\nEverything is in {out.workdir}", highlight=False)
    return summary


def draw_cost(comparison: Comparison, rows: "pd.DataFrame") -> None:
    """Accuracy against the cost of training."""
    if len(rows):
        label = f"{judged(comparison.config)} accuracy"
        figure = plots.accuracy_against_cost(labelled(comparison, rows), label)
        comparison.out.save_figure("accuracy_against_cost", figure)


def draw_curves(comparison: Comparison) -> None:
    """Learning curves, one figure for every sparsity: all in one are too many."""
    names = {plan.row.name: plan.row for plan in comparison.plans}
    lines = [
        line
        for line in records.read_metrics(comparison.out.workdir)
        if line["method"] in names
    ]
    # In which order runs began that were trained side by side is up to chance.
    order = {name: number for number, name in enumerate(names)}
    lines.sort(key=lambda line: order[line["method"]])
    if not lines:
        return
    monitored = any("monitor_accuracy" in line for line in lines)
    key, label = (
        ("monitor_accuracy", "accuracy on training images outside the budget")
        if monitored
        else ("train_accuracy", "accuracy on training batches")
    )
    for sparsity in comparison.config.axes.get("sparsity", (None,)):
        shown = [
            {**line, "method": label_of(names[line["method"]])}
            for line in lines
            if dict(names[line["method"]].values).get("sparsity", sparsity) == sparsity
        ]
        end = "" if sparsity is None else f"-{text_of(sparsity)}"
        figure = plots.learning_curves(shown, key, label, percent=True)
        comparison.out.save_figure(f"learning_curves{end}", figure)


def draw_sparsities(comparison: Comparison, rows: "pd.DataFrame") -> None:
    """Accuracy against the sparsity that was measured, dense networks as a line."""
    label = f"{judged(comparison.config)} accuracy"
    drawn = [
        {**row, "sparsity": row["zeros"]}
        for row in labelled(comparison, rows)
        if row["zeros"] < 1
    ]
    dense = next((row for row in drawn if row["zeros"] == 0), None)
    sparse = [row for row in drawn if row["zeros"] > 0]
    if sparse:
        figure = plots.accuracy_against_sparsity(sparse, label, dense)
        comparison.out.save_figure("accuracy_against_sparsity", figure)


def labelled(comparison: Comparison, rows: "pd.DataFrame") -> list[dict[str, Any]]:
    """Rows for a picture, whose methods are named with the values of their axes."""
    axes = [name for name in comparison.axes if name in rows.columns]
    found = []
    for row in rows.to_dict("records"):
        values = tuple((k, row[k]) for k in axes if row[k] == row[k])
        found.append({**row, "method": label_of(Row(row["method"], values))})
    return found


def label_of(row: Row) -> str:
    """A method with the values of its axes but for the sparsity."""
    values = [f"{k} {text_of(v)}" for k, v in row.values if k != "sparsity"]
    return ", ".join([row.method, *values])


@contextlib.contextmanager
def partial_report(out: records.Run, write_report: Callable[[], Any]) -> Iterator[None]:
    """Around the training of runs: where it is stopped there is a table too.

    Raises:
      KeyboardInterrupt: it was stopped; the table is there, and says so.
    """
    try:
        yield
    except KeyboardInterrupt:
        if out.writes and len(out.units()) > len(out.failures()):
            summary = write_report()
            partial = "This table is partial: the run was stopped before its end."
            table = (out.workdir / "table.md").read_text(encoding="utf-8")
            out.write_text("table.md", f"{partial}\n\n{table}")
            out.write_summary({**summary, "partial": True})
            print(partial, flush=True)
        raise


def _key(row: Row, by: Sequence[str]) -> tuple[Any, ...]:
    values = dict(row.values)
    return (row.method, *(values.get(name) for name in by[1:]))


def _values(row: Mapping[str, Any], by: Sequence[str]) -> tuple[Any, ...]:
    """As `_key`, of a row of a data frame, where what is absent is NaN."""
    return tuple(None if row[k] != row[k] else row[k] for k in by)


def read(
    config: Config, out: records.Run, plans: Sequence[Plan], parts: bool = False
) -> "pd.DataFrame":
    """The runs of these plans and seeds in a run directory, or their parts."""
    runs = read_runs(out, parts)
    if not len(runs):
        return runs
    names = {plan.row.name for plan in plans}
    kept = runs["run"].isin(names) & (runs["seed"] < config.seeds)
    return runs[kept]
