"""The tables of `experiments.scaling`, by the formulae and from compiled programs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.benchmark.measure import temporary_bytes
from experiments.benchmark.tables import Table
from experiments.scaling.compiled import (
    Collective,
    collectives,
    compile_refresh,
    compile_sort,
    compiled_traffic,
)
from experiments.scaling.formulae import (
    METHODS,
    PASSES,
    WORD,
    Traffic,
    gather_seconds,
    gathered_bytes,
    is_refused,
    ring_seconds,
    temporary_bounds,
    traffic,
)
from experiments.scaling.leaves import (
    Shapes,
    local_weights,
    make_shardings,
    num_weights,
)

CHECKED_ON = (2, 4, 8)
CHECKED = {
    "a": (64, 24),
    "b": (12, 10),  # Over 4 devices at most.
    "c": (2, 3, 5),  # Over 2.
    "d": (3, 3),  # Whole on every device.
}
CHECKED_WIDE = {"a": (512, 1024)}


def bytes_table(trees: Mapping[str, Shapes]) -> Table:
    """Bytes of a refresh, on any number of devices that all sharded leaves divide."""
    devices, rows = 8, []
    for model, shapes in trees.items():
        for name, method in METHODS.items():
            row: dict[str, Any] = {
                "refresh": name,
                "model": model,
                "weights (M)": num_weights(shapes) / 1e6,
                "leaves": len(shapes),
            }
            if is_refused(method, shapes):
                rows.append(row | {"MB, at most": "refused"})
                continue
            sent = traffic(method, shapes, devices)
            gathered = gathered_bytes(method, shapes, devices)
            row |= {
                "MB, no ties": sent.bytes(PASSES) / 1e6,
                "MB, at most": sent.bytes(2 * PASSES) / 1e6,
                "MB of scores gathered": gathered / 1e6,
                "calls on 8 devices, at most": sent.calls(2 * PASSES),
            }
            rows.append(row)
    note = (
        "Weights: those of leaves with two axes or more, class token and position "
        "embedding left out. MB: 10^6 bytes that every device gives to the "
        "all-reduces of a refresh; the same from 8 devices to 4096. On more devices "
        "leaves differ in how far they divide, which adds calls."
    )
    return Table("Bytes of a refresh", note, rows)


def time_table(
    trees: Mapping[str, Shapes],
    devices: Sequence[int],
    latency: float,
    bandwidth: float,
) -> Table:
    """Time of a refresh on a ring, beside that of gathering the scores.

    Args:
      trees: leaves by the name of their network.
      devices: numbers of devices.
      latency: seconds of a message between two devices.
      bandwidth: bytes a second and device.
    """
    rows = []
    for model, shapes in trees.items():
        for name, method in METHODS.items():
            if is_refused(method, shapes):
                continue
            searched: dict[str, Any] = {"refresh": name, "model": model}
            gathered = searched | {"refresh": f"{name}, scores gathered"}
            for n in devices:
                ring = (latency, bandwidth)
                seconds = ring_seconds(method, shapes, n, 2 * PASSES, *ring)
                searched[f"{n} devices"] = 1e3 * seconds
                seconds = gather_seconds(method, shapes, n, *ring)
                gathered[f"{n} devices"] = 1e3 * seconds
            rows += [searched, gathered]
    note = (
        f"ms of communication on a ring, by the formula, with {1e6 * latency:g} µs "
        f"a message and {bandwidth / 1e9:g} * 10^9 bytes a second, both assumed; "
        "of as many passes as there can be, whose calls do not overlap."
    )
    return Table("Time on a ring", note, rows)


def memory_table(trees: Mapping[str, Shapes], devices: Sequence[int]) -> Table:
    """Memory of a refresh by RigL on every device."""
    rows = []
    for model, shapes in trees.items():
        for n in devices:
            held = local_weights(shapes, n)
            least, most = temporary_bounds(shapes, n)
            sizes = {
                "weights": WORD * held,
                "masks": held,
                "temporary, at least": least,
                "temporary, at most": most,
                "largest leaf gathered": WORD * max(map(math.prod, shapes.values())),
            }
            row = {"model": model, "devices": n}
            rows.append(row | {title: size / 1e6 for title, size in sizes.items()})
    note = (
        "MB on each device, under RigL; the gradients take as much as the weights. "
        "Temporary: at least a key of 4 bytes for each local weight; at most 20 bytes "
        "a local weight and 4 kB, which bounds the programs that were compiled. The "
        "masks are the only state, 1 byte a weight. Replicated weights are those of "
        "one device. Largest leaf gathered: its scores, the least that sorting leaf by "
        "leaf needs."
    )
    return Table("Memory of a refresh", note, rows)


def check_table(devices: Sequence[int]) -> Table:
    """What compiled programs communicate, beside the formulae."""
    rows = []
    for tree, shapes in {"small": CHECKED, "wide": CHECKED_WIDE}.items():
        for n in devices:
            shardings = make_shardings(shapes, n)
            for name, method in METHODS.items():
                compiled = compile_refresh(method, shapes, shardings)
                operations = collectives(compiled.as_text())
                least, most = temporary_bounds(shapes, n)
                row: dict[str, Any] = {"refresh": name, "tree": tree, "devices": n}
                row |= _refresh_cells(traffic(method, shapes, n), operations)
                row["temporary, kB"] = temporary_bytes(compiled) / 1e3
                rows.append(row | {"at least": least / 1e3, "at most": most / 1e3})
            row = {"refresh": "jnp.sort, each leaf", "tree": tree, "devices": n}
            operations = collectives(compile_sort(shapes, shardings).as_text())
            scores = gathered_bytes(METHODS["magnitude, each leaf"], shapes, n)
            rows.append(row | _sort_cells(scores, operations))
    note = (
        f"small: leaves {', '.join(map(str, CHECKED.values()))}; wide: "
        f"{CHECKED_WIDE['a']}. Bytes: once + those of every pass of all searches, read "
        "off the compiled program; the number of passes depends on the scores and is "
        "not in it. Of the sort: bytes that it gathers. Temporary: of the compiled "
        "program, between the bounds by the formula."
    )
    return Table("Formulae against compiled programs", note, rows)


def _refresh_cells(
    expected: Traffic, operations: Sequence[Collective]
) -> dict[str, object]:
    """Bytes and calls by the formula and of a program, once + a pass."""
    compiled = compiled_traffic(operations)
    others = {c.kind for c in operations} - {"all-reduce"}
    return {
        "bytes, formula": f"{expected.bytes_once} + {expected.bytes_a_pass:,}",
        "bytes, compiled": f"{compiled.bytes_once} + {compiled.bytes_a_pass:,}",
        "calls, formula": f"{expected.calls_once} + {expected.calls_a_pass}",
        "calls, compiled": f"{compiled.calls_once} + {compiled.calls_a_pass}",
        "other collectives": ", ".join(sorted(others)) or "none",
    }


def _sort_cells(expected: int, operations: Sequence[Collective]) -> dict[str, object]:
    """Bytes that a program gathers, by the formula and as compiled."""
    gathers = [c for c in operations if c.kind == "all-gather"]
    return {
        "bytes, formula": f"{expected:,}",
        "bytes, compiled": f"{sum(sum(c.sizes) for c in gathers):,}",
        "calls, compiled": len(gathers),
        "other collectives": ", ".join(sorted({c.kind for c in operations})),
    }
