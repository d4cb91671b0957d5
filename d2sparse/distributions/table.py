"""Sparsities of named leaves, by a table."""

import fnmatch
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from d2sparse.checks import check_function, is_number
from d2sparse.distributions.budget import (
    Distribution,
    Shapes,
    Sparsity,
    array_module,
    check_sparsity,
    hand_out,
    keep,
    largest_remainder,
    sizes,
)
from d2sparse.distributions.shares import erk
from d2sparse.tree import Count


def explicit(table: Mapping[str, float], rest: Distribution = erk) -> Distribution:
    """Named leaves at the sparsities of a table; the others share what remains.

    The total is always the one asked for. From the sparsity on at which the table alone
    takes all zeros, a named leaf has `round(sparsity * size)` of them, whatever the
    total. Below it the other leaves are dense and the named ones have fewer zeros, all
    in proportion: a schedule that starts at 0 ends at the table.

    Args:
      table: sparsity in [0, 1] by a pattern of leaf paths, as in `fnmatch` (`*` matches
        slashes too). The first pattern that matches a leaf counts.
      rest: how the leaves that no pattern names share their weights; it must return a
        number for every leaf.

    Returns:
      A distribution. It raises a `ValueError` where a pattern matches no leaf, and
      where a known sparsity is out of reach: with the named leaves at the table and all
      others empty, too many weights are left. A traced one then takes what it can.

    Raises:
      ValueError: a sparsity of the table is outside [0, 1].

    >>> shapes = {"conv": (3, 3, 4, 8), "mix": (8, 8), "head": (8, 2)}
    >>> counts = explicit({"head": 0.25})(shapes, 0.5)
    >>> {path: int(n) for path, n in counts.items()}
    {'conv': 108, 'mix': 64, 'head': 12}
    """
    check_function("rest", rest, "shapes, sparsity", "erk")
    if not isinstance(table, Mapping):
        raise ValueError(
            'expected a table of sparsities by pattern, such as {"head/*": 0.5}, got '
            f"{table!r}"
        )
    for pattern, value in table.items():
        if not is_number(value) or not 0 <= value <= 1:
            raise ValueError(
                "expected sparsities in [0, 1], the fraction of zeros, got "
                f"{value!r} for {pattern!r}"
            )

    def distribution(shapes: Shapes, sparsity: Sparsity) -> dict[str, Count]:
        xp = array_module(check_sparsity(sparsity))
        named, others = _split(shapes, table)
        if not isinstance(sparsity, jax.core.Tracer):
            _check_reachable(float(sparsity), shapes, named, others)
        total = int(sizes(shapes).sum())
        zeros = total - keep(total, sparsity)
        pruned = _zeros_of_named(zeros, shapes, named, int(sizes(others).sum()), xp)
        kept = sizes({path: shapes[path] for path in named}) - pruned
        counts = dict(zip(named, kept, strict=True))
        if others:
            counts |= _counts_of_others(zeros - xp.sum(pruned), others, rest, xp)
        return {path: counts[path] for path in shapes}

    return distribution


def _split(
    shapes: Shapes, table: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, tuple[int, ...]]]:
    """Sparsities of the leaves that the table names, and the shapes of the others."""
    named: dict[str, float] = {}
    for pattern, value in table.items():
        paths = [path for path in shapes if fnmatch.fnmatchcase(path, pattern)]
        if not paths:
            raise ValueError(
                f"expected patterns that match a prunable leaf, got {pattern!r}; the "
                f"prunable leaves are {sorted(shapes)}"
            )
        named = dict.fromkeys(paths, float(value)) | named  # The first pattern counts.
    return named, {path: s for path, s in shapes.items() if path not in named}


def _bounds(shapes: Shapes, named: Mapping[str, float]) -> tuple[np.ndarray, ...]:
    """Zeros of the named leaves: by the table, and at most, rounded up."""
    size = sizes({path: shapes[path] for path in named})
    sparsity = np.array(list(named.values()))
    # A sparsity in float32 does not tell zeros apart in leaves of millions of weights.
    most = np.ceil(size * sparsity - 1e-6) + size // 2**22
    return np.round(size * sparsity).astype(int), np.minimum(most, size).astype(int)


def _zeros_of_named(
    zeros: Any, shapes: Shapes, named: Mapping[str, float], room: int, xp: Any
) -> Any:
    """int[named]: those of the table, or fewer in proportion where there are fewer."""
    literal, most = _bounds(shapes, named)
    whole = int(literal.sum())
    shared = xp.minimum(zeros, whole)
    pruned = largest_remainder(literal * (shared / max(whole, 1)), literal, shared, xp)
    # Rounding may leave a zero or two that the others have no room for.
    return hand_out(xp.maximum(zeros - shared - room, 0), pruned, most, xp)


def _counts_of_others(zeros: Any, shapes: Shapes, rest: Distribution, xp: Any) -> Any:
    limits = sizes(shapes)
    room = int(limits.sum())
    kept = room - xp.minimum(zeros, room)
    sparsity = 1 - kept / max(room, 1)
    # A distribution refuses a sparsity of 1; the total is set right below.
    below_one = 1 - np.finfo(sparsity.dtype).epsneg
    counts = rest(shapes, xp.minimum(sparsity, below_one))
    if not isinstance(counts, Mapping):
        raise ValueError(
            "expected `rest` to return a number for every leaf, got one number for all "
            "of them; use `erk`, `er` or `uniform` beside a table"
        )
    shares = xp.stack([xp.asarray(counts[path]) for path in shapes])
    shares = hand_out(kept - xp.sum(shares), shares, limits, xp)
    return dict(zip(shapes, shares, strict=True))


def _check_reachable(
    sparsity: float,
    shapes: Shapes,
    named: Mapping[str, float],
    others: Shapes,
) -> None:
    total = int(sizes(shapes).sum())
    most = int(_bounds(shapes, named)[1].sum() + sizes(others).sum())
    excess = total - int(keep(total, sparsity)) - most
    if excess > 0:
        raise ValueError(
            f"expected a sparsity of at most {most / total:.6g}, got {sparsity:.6g}, "
            f"which takes {excess} more weights than there are: {sorted(named)} are at "
            f"their sparsities in the table and {sorted(others)} are empty; raise "
            "sparsities of the table, or name fewer leaves"
        )
