"""Results as tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from d2sparse.checks import optional

with optional(__name__):
    from tabulate import tabulate


def markdown_table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
) -> str:
    """A Markdown table that is aligned in the source as well.

    >>> rows = [{"method": "RigL", "size": 2660}, {"method": "dense", "size": 26610}]
    >>> print(markdown_table(rows, {"method": "method", "size": "non-zeros"}))
    | method   |   non-zeros |
    |:---------|------------:|
    | RigL     |        2660 |
    | dense    |       26610 |

    Args:
      rows: cells by key, printed with `str`; a key may be absent.
      columns: title of every column by key, in order. The first column is the name of
        a row and aligned left, the others hold numbers and are aligned right.

    Returns:
      The table, without a newline at its end.
    """
    cells = [[str(row.get(key, "")) for key in columns] for row in rows]
    align = ["left", *["right"] * (len(columns) - 1)]
    return tabulate(
        [list(columns.values()), *cells],
        headers="firstrow",
        tablefmt="pipe",
        colalign=align,
        disable_numparse=True,
    )
