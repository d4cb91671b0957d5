"""The report of a comparison over numbers of labels: its tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from d2sparse import plots, records
from d2sparse.checks import optional
from d2sparse.study.frames import read_runs
from d2sparse.study.reporting import Comparison, write
from d2sparse.study.robustness import (
    DESIGNS,
    HALF,
    clean,
    comparable,
    in_order,
    summarise_labels,
)
from d2sparse.study.tables import percent, table_of, titled_table

with optional(__name__):
    import pandas as pd

_QUALITY = (
    *("nll", "ece", "brier", "nonzeros"),
    *("relative_macs", "relative_inference", "seeds"),
)
_MOST = 12  # Methods that have room in a picture.
_PICTURED = (  # Those that are shown where there are more.
    *("dense", "dense_smoothed", "dense_mutual", "snip"),
    *("rigl", "rigl_averaged", "imp", "free_tickets"),
    *("uncoupled_averaged", "d2_sparse", "d2_annealed", "d2_consolidated"),
)
_WIDTH = 4  # Conditions that have room beside the names of methods.
_TESTED = (
    "Test accuracy, mean ± standard error over seeds; MACs of training and of "
    "inference, dense = 1."
)
_APART = "Test accuracy in % minus that of the method in the title, paired by seed."
_SLOW = "Test accuracy of the slow learner of a pair alone."
_WRONG = "Test accuracy in % where something is wrong."
_OUTSIDE = (
    "Accuracy on training images outside of the labels, to choose designs by, and in % "
    "minus that of the method in the title."
)


def report(comparison: Comparison) -> dict[str, Any]:
    """Writes summary, tables and figures of all runs of the directory.

    Args:
      comparison: whose runs have values of `SETTINGS`.

    Returns:
      The summary, as in summary.json: under "labels" the rows of each number of labels
      per class, and the mean "ranks" by method.
    """
    runs = in_order(read_runs(comparison.out))
    samples = sorted(set(runs["samples_per_class"])) if len(runs) else []
    parts = {n: runs[runs["samples_per_class"] == n] for n in samples}
    rows = {n: summarise_labels(parts[n], comparison.references) for n in samples}
    tables = [
        text
        for n in samples
        for text in (
            f"## {n or 'All'} labels per class",
            *_tables(rows[n], comparison.references),
        )
    ]
    scores = comparable(runs) if len(runs) else {}
    results = {
        "labels": {
            str(n): {k: v.to_dict("records") for k, v in rows[n].items()}
            for n in samples
        },
        "ranks": _rank(scores),
    }
    summary = write(comparison, results, "\n\n".join(tables))
    for n in samples:
        _draw(comparison.out, n, clean(parts[n]), rows[n]["methods"])
    if len(scores) > 1:
        comparison.out.save_figure("ranks", plots.rank_diagram(scores))
    return summary


def _tables(rows: "Mapping[str, pd.DataFrame]", references: Sequence[str]) -> list[str]:
    """The tables of a number of labels, each after a line that explains it."""
    methods, slow, designs = rows["methods"], rows["slow"], rows["designs"]
    tables = []
    if len(methods):
        tables += [_TESTED, table_of(methods, (), columns=_QUALITY)]
        tables += _differences(_APART, methods, references)
    if len(slow):
        slow = slow[slow["method"] != HALF]
        tables += [_SLOW, table_of(slow, (), (HALF,), ())]
    tables += _conditions(rows["conditions"])
    tables += _differences(_OUTSIDE, designs, DESIGNS, ("accuracy",))
    return tables


def _differences(
    heading: str,
    rows: "pd.DataFrame",
    references: Sequence[str],
    first: Sequence[str] = (),
) -> list[str]:
    """A table of differences to the references that there are, if there is any."""
    titles = {name: f"{name} %" for name in first}
    apart = {f"minus_{name}": name for name in references}
    titles |= {name: title for name, title in apart.items() if name in rows.columns}
    if not titles.keys() & set(rows.columns):
        return []
    return [heading, titled_table(rows, {"method": "method", **titles})]


def _conditions(rows: "pd.DataFrame") -> list[str]:
    """Tables with a column for every condition, as many as have room in one."""
    names, tables = list(dict.fromkeys(rows["condition"])), []
    methods = list(dict.fromkeys(rows["method"]))
    cells: dict[str, dict[str, str]] = {name: {"method": name} for name in methods}
    for row in rows.to_dict("records"):
        text = percent(row["accuracy"], row["standard_error"])
        cells[row["method"]][row["condition"]] = text
    for start in range(0, len(names), _WIDTH):
        titles = {name: name for name in ("method", *names[start : start + _WIDTH])}
        tables += [_WRONG, records.markdown_table(list(cells.values()), titles)]
    return tables


def _rank(scores: Mapping[str, list[float]]) -> dict[str, float]:
    """Mean ranks, where there are several methods to compare."""
    if len(scores) < 2:
        return {}
    ranks = plots.average_ranks(np.transpose(list(scores.values())).tolist())
    return dict(zip(scores, ranks.tolist(), strict=True))


def _draw(
    out: records.Run, samples: int, runs: "pd.DataFrame", rows: "pd.DataFrame"
) -> None:
    """Accuracy against cost, and calibration, of the methods that have room."""
    if not len(rows):
        return
    crowded = len(rows) > _MOST
    drawn = rows[rows["method"].isin(_PICTURED)] if crowded else rows
    if len(drawn):
        figure = plots.accuracy_against_cost(drawn.to_dict("records"))
        out.save_figure(f"accuracy_against_cost-{samples}", figure)
        bins = {
            name: _add_up(runs[runs["method"] == name]["calibration"])
            for name in drawn["method"]
        }
        out.save_figure(f"calibration-{samples}", plots.reliability_diagram(bins))


def _add_up(bins: "pd.Series[Any]") -> dict[str, np.ndarray]:
    """The sums of all seeds by bin."""
    return {key: np.sum([each[key] for each in bins], axis=0) for key in bins.iloc[0]}
