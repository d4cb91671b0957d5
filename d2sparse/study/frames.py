"""The results of a comparison as data frames: one tidy row a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from d2sparse import records
from d2sparse.checks import optional

with optional(__name__):
    import pandas as pd


def read_runs(out: records.Run, parts: bool = False) -> "pd.DataFrame":
    """The results of all finished runs of a run directory.

    Args:
      out: the run directory.
      parts: whether titled phases, such as the rounds of iterative pruning, have rows
        of their own; otherwise every run has one.

    Returns:
      A row for every run that did not fail, with the columns method, run (its name
      without the seed), seed, a column for every flag whose values were compared, and
      the results.
    """
    rows = []
    for unit in out.units():
        results = out.finished(unit)
        if results is None or "failed" in results:
            continue
        for part in results["parts"] if parts else [results]:
            rows.append(_row(unit, part))
    return pd.DataFrame(rows)


def _row(unit: records.Unit, results: dict[str, Any]) -> dict[str, Any]:
    numbers = {k: v for k, v in results.items() if k not in ("values", "parts")}
    named = {"method": results["method"], "run": unit.method, "seed": unit.seed}
    return {**named, **results["values"], **numbers}


def summarise(runs: "pd.DataFrame", by: Sequence[str] = ("method",)) -> "pd.DataFrame":
    """Means over seeds, with deviation and standard error of the accuracy.

    Args:
      runs: from `read_runs`.
      by: the columns that tell rows of the summary apart, in the order of `runs`.

    Returns:
      A row for every group: the means of all numeric columns, NaN where one of a run
      is, and the columns seeds, deviation and standard_error (NaN for one seed);
      seconds are the median. Without runs it has no rows.

    >>> runs = pd.DataFrame({"method": ["rigl"] * 2, "seed": [0, 1],
    ...                      "accuracy": [0.5, 0.75], "seconds": [1.0, 2.0]})
    >>> summarise(runs)[["accuracy", "standard_error", "seeds"]].values.tolist()
    [[0.625, 0.125, 2.0]]
    """
    if not len(runs):
        return pd.DataFrame(columns=["method"])
    by = [name for name in by if name in runs.columns]
    groups = runs.groupby(by, sort=False, dropna=False)
    numeric = runs.select_dtypes("number").columns.difference([*by, "seed"])
    summary = groups[list(numeric)].agg(lambda column: column.mean(skipna=False))
    deviation = groups["accuracy"].std(ddof=1)
    count = groups["accuracy"].count()
    summary["deviation"] = deviation
    summary["standard_error"] = deviation / np.sqrt(count)
    summary["seeds"] = count
    summary["seconds"] = groups["seconds"].median()
    return summary.reset_index()


def difference(
    runs: "pd.DataFrame",
    reference: Mapping[str, Any],
    by: Sequence[str] = ("method",),
    column: str = "accuracy",
) -> "pd.DataFrame":
    """Differences to other runs, paired by seed: mean and standard error.

    A run is compared with the reference that has its seed, and its values of all other
    columns of `by` that the reference has values of.

    Args:
      runs: from `read_runs`.
      reference: values of columns that tell the reference, {"method": "rigl"}.
      by: the columns that tell rows of the result apart.
      column: what is compared.

    Returns:
      A row for every group that has a partner: the columns of `by`, difference and
      difference_error. The reference has no row.

    >>> runs = pd.DataFrame({"method": ["dense", "rigl"] * 2, "seed": [0, 0, 1, 1],
    ...                      "accuracy": [0.5, 0.75, 0.5, 1.0]})
    >>> difference(runs, {"method": "dense"}).values.tolist()
    [['rigl', 0.375, 0.125]]
    """
    by = [name for name in by if name in runs.columns]
    is_reference = np.logical_and.reduce([runs[k] == v for k, v in reference.items()])
    other = runs[is_reference]
    free = [name for name in by if name not in reference]
    shared = [name for name in free if other[name].notna().any()]
    partner = other[[*shared, "seed", column]].rename(columns={column: "_partner"})
    pairs = runs[~is_reference].merge(partner, on=[*shared, "seed"])
    pairs = pairs.assign(difference=pairs[column] - pairs["_partner"])
    groups = pairs.groupby(by, sort=False, dropna=False)["difference"]
    error = groups.std(ddof=1) / np.sqrt(groups.count())
    both = {"difference": groups.mean(), "difference_error": error}
    return pd.DataFrame(both).reset_index()


def with_difference(
    rows: "pd.DataFrame",
    runs: "pd.DataFrame",
    name: str,
    reference: Mapping[str, Any],
    by: Sequence[str] = ("method",),
    column: str = "accuracy",
) -> "pd.DataFrame":
    """A summary with the columns "minus_<name>" and "minus_<name>_error".

    Args:
      rows: from `summarise` with the same `by`.
      runs: what they summarise.
      name: of the reference.
      reference: as for `difference`.
      by: as for `difference`.
      column: what is compared.
    """
    by = [column for column in by if column in rows.columns]
    names = {
        "difference": f"minus_{name}",
        "difference_error": f"minus_{name}_error",
    }
    apart = difference(runs, reference, by, column).rename(columns=names)
    return rows.merge(apart, on=by, how="left")
