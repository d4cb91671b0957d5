"""The formulae beside compiled programs, of trees small enough to compile."""

from collections.abc import Sequence

from experiments.benchmark.measure import Table, temporary_bytes
from experiments.scaling.collectives import Collective, collectives
from experiments.scaling.formulae import (
    Traffic,
    gathered_bytes,
    temporary_bounds,
    traffic,
)
from experiments.scaling.methods import METHODS
from experiments.scaling.programs import compile_refresh, compile_sort
from experiments.scaling.sharding import make_shardings

CHECKED_ON = (2, 4, 8)
CHECKED = {
    "a": (64, 24),
    "b": (12, 10),  # Over 4 devices at most.
    "c": (2, 3, 5),  # Over 2.
    "d": (3, 3),  # On every device whole.
}
CHECKED_WIDE = {"a": (512, 1024)}


def check_table(devices: Sequence[int]) -> Table:
    """What compiled programs communicate, beside the formulae."""
    trees = {"small": CHECKED, "wide": CHECKED_WIDE}
    rows = []
    for model, shapes in trees.items():
        for n in devices:
            shardings = make_shardings(shapes, n)
            for what, method in METHODS.items():
                compiled = compile_refresh(method, shapes, shardings)
                expected = traffic(method, shapes, n)
                least, most = temporary_bounds(method, shapes, n)
                row = {"what": what, "model": model, "devices": n}
                row |= check_cells(expected, collectives(compiled.as_text()))
                row |= {"temporary": temporary_bytes(compiled) / 1e3}
                rows.append(row | {"least": least / 1e3, "most": most / 1e3})
            row = {"what": "jnp.sort, each leaf", "model": model, "devices": n}
            found = collectives(compile_sort(shapes, shardings).as_text())
            scores = gathered_bytes(METHODS["magnitude, each leaf"], shapes, n)
            rows.append(row | check_gathers(scores, found))
    columns = {
        "what": "refresh",
        "model": "tree",
        "devices": "devices",
        "formula": "bytes, formula",
        "compiled": "bytes, compiled",
        "calls_formula": "calls, formula",
        "calls_compiled": "calls, compiled",
        "others": "other collectives",
        "temporary": "temporary, kB",
        "least": "at least",
        "most": "at most",
    }
    note = (
        f"small: leaves {', '.join(map(str, CHECKED.values()))}; wide: "
        f"{CHECKED_WIDE['a']}. Bytes: once + those of every pass of all searches, read "
        "off the compiled program; the number of passes depends on the scores and is "
        "not in it. Of the sort: bytes that it gathers. Temporary: of the compiled "
        "program, between the bounds by the formula."
    )
    title = "Formulae against compiled programs"
    return Table(title, note, columns, rows)


def check_cells(expected: Traffic, found: Sequence[Collective]) -> dict[str, object]:
    """Bytes and calls by the formula and of a program, once + a pass."""
    cells: dict[str, object] = {}
    for suffix, sent in (("formula", expected), ("compiled", compiled_traffic(found))):
        cells[f"calls_{suffix}"] = f"{sent.calls_once} + {sent.calls_a_pass}"
        cells[suffix] = f"{sent.bytes_once} + {sent.bytes_a_pass:,}"
    others = {c.kind for c in found} - {"all-reduce"}
    return cells | {"others": ", ".join(sorted(others)) or "none"}


def compiled_traffic(found: Sequence[Collective]) -> Traffic:
    """The all-reduces among the collectives of a compiled refresh."""
    reduces = [c for c in found if c.kind == "all-reduce"]
    once = [sum(c.sizes) for c in reduces if not c.in_search]
    a_pass = [sum(c.sizes) for c in reduces if c.in_search]
    return Traffic(len(once), sum(once), len(a_pass), sum(a_pass))


def check_gathers(expected: int, found: Sequence[Collective]) -> dict[str, object]:
    """Bytes that a program gathers, by the formula and as compiled."""
    gathers = [c for c in found if c.kind == "all-gather"]
    return {
        "formula": f"{expected:,}",
        "compiled": f"{sum(sum(c.sizes) for c in gathers):,}",
        "calls_compiled": len(gathers),
        "others": ", ".join(sorted({c.kind for c in found})),
    }
