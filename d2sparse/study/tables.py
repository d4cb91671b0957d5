"""From the rows of a summary to tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from d2sparse import records
from d2sparse.checks import optional
from d2sparse.study.flags import text_of

with optional(__name__):
    import pandas as pd

# Columns of every table by the name of the result: title, and how it is written.
COLUMNS: Mapping[str, tuple[str, str]] = {
    "zeros": ("sparsity %", "{:.4g}"),
    "nll": ("NLL", "{:.3f}"),
    "ece": ("ECE %", "{:.1f}"),
    "brier": ("Brier", "{:.3f}"),
    "nonzeros": ("non-zeros", "{:,.0f}"),
    "compression": ("compression", "{:.1f}"),
    "neurons": ("neurons %", "{:.1f}"),
    "activations": ("activations", "{:.0f}"),
    "train_accuracy": ("training %", "{:.1f}"),
    "relative_macs": ("MACs", "{:.2f}"),
    "relative_inference": ("inference", "{:.2f}"),
    "seeds": ("seeds", "{:.0f}"),
    "seconds": ("seconds", "{:.1f}"),
}
STANDARD = ("nll", "ece", "nonzeros", "relative_macs", "seconds")
_PERCENT = ("zeros", "ece", "neurons", "train_accuracy")


def table_of(
    rows: "pd.DataFrame",
    axes: Sequence[str],
    references: Sequence[str] = (),
    columns: Sequence[str] = STANDARD,
) -> str:
    """The table of a summary in Markdown: accuracies in per cent with standard errors.

    Args:
      rows: from `summarise`, with the columns "minus_<reference>" and their errors.
      axes: flags whose values tell rows apart. The column of the sparsity is the one
        that was measured.
      references: methods that differences were taken to.
      columns: further columns, of `COLUMNS`.
    """
    given = [name for name in axes if name in rows.columns and name != "sparsity"]
    named = ["method"] if rows["method"].nunique() > 1 or not given else []
    titles = {name: name for name in [*named, *given]}
    if "sparsity" in axes:
        columns = ("zeros", *columns)
    titles["accuracy"] = "accuracy %"
    for name in references:
        if f"minus_{name}" in rows.columns:
            titles[f"minus_{name}"] = f"minus {name}"
    titles |= {name: COLUMNS[name][0] for name in columns if name in rows.columns}
    if "zeros" in titles:  # Beside the name of the method.
        order = [*named, *given, "zeros"]
        titles = {name: titles[name] for name in dict.fromkeys([*order, *titles])}
    return titled_table(rows, titles)


def titled_table(rows: "pd.DataFrame", titles: Mapping[str, str]) -> str:
    """The columns of a summary that have titles, as a table in Markdown."""
    cells = [_cells(row, titles) for row in rows.to_dict("records")]
    return records.markdown_table(cells, titles)


def percent(value: float, error: float = np.nan, signed: bool = False) -> str:
    """A fraction and its error in per cent; without the error where it is NaN.

    >>> percent(0.125, 0.01), percent(0.125, signed=True), percent(-0.1, 0.05)
    ('12.50 ± 1.00', '+12.50', '-10.00 ± 5.00')
    """
    if np.isnan(value):
        return ""
    sign = "+" if signed and value >= 0 else ""
    text = f"{sign}{100 * value:.2f}"
    return text if np.isnan(error) else f"{text} ± {100 * error:.2f}"


def _cells(row: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, str]:
    cells = {}
    for name in titles:
        value = row[name]
        if name == "accuracy":
            cells[name] = percent(value, row["standard_error"])
        elif name.startswith("minus_"):
            cells[name] = percent(value, row[f"{name}_error"], signed=True)
        elif name in COLUMNS:
            number = 100 * value if name in _PERCENT else value
            cells[name] = "" if np.isnan(value) else COLUMNS[name][1].format(number)
        else:
            is_empty = isinstance(value, float) and np.isnan(value)
            cells[name] = "" if is_empty else text_of(value)
    return cells
