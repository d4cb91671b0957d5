"""The figures the library is held to, and whether a run has met them."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.benchmark.refresh import RULES
from experiments.benchmark.small import BETWEEN, DENSE, FIT, NETWORK, RIGL
from experiments.benchmark.steps import OPTIMIZERS, SGD, SPARSIFIED
from experiments.benchmark.tables import Table, format_cell, name_of
from experiments.benchmark.training import SPARSE

OURS = (*RULES, *(SPARSIFIED.format(name) for name in OPTIMIZERS))


class Target(NamedTuple):
    """A bound on one column of some rows; the worst of them counts.

    Attributes:
      text: what is bounded.
      limit: the bound.
      column: title of the column.
      sections: the tables it is in.
      names: of the rows.
      model: the only model it is about; None for every model that was measured.
      at_least: the limit is the smallest value that is allowed, not the largest.
    """

    text: str
    limit: float
    column: str
    sections: tuple[str, ...]
    names: tuple[str, ...]
    model: str | None = None
    at_least: bool = False


TARGETS = (
    Target("ms of a refresh by RigL", 3, "ms", ("refresh",), ("RigL",), model=NETWORK),
    Target(
        "training step between refreshes, sparse over dense",
        1.2,
        "over dense",
        ("small",),
        (BETWEEN,),
    ),
    Target(
        "steps of fit over those of a loop by hand",
        0.9,
        "of the loop by hand",
        ("small",),
        (FIT.format(DENSE), FIT.format(RIGL)),
        at_least=True,
    ),
    Target(
        "training step of ResNet-18, sparse over dense",
        1.03,
        "relative",
        ("training",),
        (SPARSE,),
        model="resnet18",
    ),
    Target(
        "largest temporary over the weights",
        2.5,
        "temporary",
        ("refresh", "step"),
        OURS,
    ),
    Target(
        "CPU s to trace, lower and compile the step under RigL, ResNet-50",
        12,
        "CPU s",
        ("compile",),
        (SPARSIFIED.format(SGD),),
        model="resnet50",
    ),
)


def targets_table(tables: Mapping[str, Table]) -> Table:
    """Every target with the figure that was measured.

    Args:
      tables: what was measured, by section.
    """
    return Table(
        "Targets",
        "The worst row counts. Where no row is about a target it was not measured.",
        [judge(target, tables) for target in TARGETS],
    )


def judge(target: Target, tables: Mapping[str, Table]) -> dict[str, Any]:
    """The row of one target: the worst figure, its place, whether the target is met.

    Args:
      target: the bound.
      tables: what was measured, by section.
    """
    rows = [
        row
        for section in target.sections
        if section in tables
        for row in tables[section].rows
        if name_of(row) in target.names
        and target.model in (None, row["model"])
        and not math.isnan(row[target.column])
    ]
    row = {
        "target": target.text,
        "limit": f"{'≥' if target.at_least else '≤'} {format_cell(target.limit)}",
    }
    if not rows:
        return row | {"measured": "", "at": "", "met": "not measured"}
    worst = (min if target.at_least else max)(rows, key=lambda row: row[target.column])
    value = worst[target.column]
    met = value >= target.limit if target.at_least else value <= target.limit
    at = f"{worst['model']}, {name_of(worst)}"
    return row | {"measured": value, "at": at, "met": "yes" if met else "no"}
