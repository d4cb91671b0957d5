"""Results as tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
) -> str:
    """A Markdown table that is aligned in the source as well.

    >>> rows = [{"method": "RigL", "size": 2660}, {"method": "dense", "size": 26610}]
    >>> print(markdown_table(rows, {"method": "method", "size": "non-zeros"}))
    | method | non-zeros |
    | :----- | --------: |
    | RigL   |      2660 |
    | dense  |     26610 |

    Args:
      rows: cells by key, printed with `str`; a key may be absent.
      columns: title of every column by key, in order. The first column is the name of
        a row and aligned left, the others hold numbers and are aligned right.

    Returns:
      The table, without a newline at its end.
    """
    cells = [[str(row.get(key, "")) for key in columns] for row in rows]
    lines = [list(columns.values()), *cells]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (n - 1) + ":" for n in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
        for line in lines
    ]
    return "\n".join(
        f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:])
    )
