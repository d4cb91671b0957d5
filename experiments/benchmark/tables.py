"""Tables of measurements, as Markdown."""

import math
from typing import Any, NamedTuple

from d2sparse import records


class Table(NamedTuple):
    """What a section has measured.

    Attributes:
      title: its heading.
      note: what the columns mean.
      rows: cells by the title of their column, numbers not rounded yet. The first cell
        of a row names what was measured.
    """

    title: str
    note: str
    rows: list[dict[str, Any]]


def name_of(row: dict[str, Any]) -> str:
    """The first cell of a row, which names what was measured."""
    return next(iter(row.values()))


def to_markdown(table: Table) -> str:
    """Heading, table and note; a cell that a row lacks is empty.

    >>> rows = [{"refresh": "sort", "ms": 1234.5}, {"refresh": "torch", "ms": "absent"}]
    >>> print(to_markdown(Table("One refresh", "Medians.", rows)))
    ## One refresh
    <BLANKLINE>
    | refresh |     ms |
    | :------ | -----: |
    | sort    |  1,234 |
    | torch   | absent |
    <BLANKLINE>
    Medians.
    """
    titles = dict.fromkeys(title for row in table.rows for title in row)
    cells = [{k: format_cell(v) for k, v in row.items()} for row in table.rows]
    text = records.markdown_table(cells, {title: title for title in titles})
    return f"## {table.title}\n\n{text}\n\n{table.note}"


def format_cell(cell: Any) -> str:
    """A cell as it is printed: floats to about three digits.

    >>> cells = (1234.5, 123.4, 12.34, 1.234, 0.01234, 8, "yes", math.nan)
    >>> [format_cell(cell) for cell in cells]
    ['1,234', '123', '12.3', '1.23', '0.0123', '8', 'yes', '—']
    """
    if not isinstance(cell, float):
        return str(cell)
    if math.isnan(cell):
        return "—"
    if abs(cell) >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.1f}" if abs(cell) >= 10 else f"{cell:.3g}"
