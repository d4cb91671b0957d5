"""The figures the library is held to, and whether a run has met them."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.benchmark.measure import Table, shown
from experiments.benchmark.refresh import RULES
from experiments.benchmark.steps import OPTIMIZERS, SGD, WRAPPED
from experiments.benchmark.training import SPARSE

MAGNITUDE = ("magnitude, each leaf (ERK)", "magnitude, global")
OURS = (*RULES, *(WRAPPED.format(name) for name in OPTIMIZERS))


class Target(NamedTuple):
    """A bound on one column of some rows; the worst of them counts.

    Attributes:
      text: what is bounded.
      limit: the bound.
      column: key of the column.
      sections: the tables it is in.
      what: the rows.
      model: the only model it is about; None is every model that was measured.
      at_least: the limit is the smallest value that is allowed, not the largest.
    """

    text: str
    limit: float
    column: str
    sections: tuple[str, ...]
    what: tuple[str, ...]
    model: str | None = None
    at_least: bool = False


TARGETS = (
    Target("passes of a refresh by magnitude", 16, "passes", ("refresh",), MAGNITUDE),
    Target(
        "saving of CPU time over jnp.sort, ResNet-50",
        25,
        "saving",
        ("refresh",),
        MAGNITUDE,
        model="resnet50",
        at_least=True,
    ),
    Target("passes of a refresh by RigL", 30, "passes", ("refresh",), ("RigL",)),
    Target(
        f"step around {SGD} over the plain step",
        1.15,
        "relative",
        ("step",),
        (WRAPPED.format(SGD),),
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
        10,
        "cpu_s",
        ("compile",),
        (WRAPPED.format(SGD),),
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
        {
            "target": "target",
            "limit": "limit",
            "measured": "measured",
            "where": "at",
            "met": "met",
        },
        [judge(target, tables) for target in TARGETS],
    )


def judge(target: Target, tables: Mapping[str, Table]) -> dict[str, Any]:
    """The row of one target: the worst figure, where it was found, whether it is met.

    Args:
      target: the bound.
      tables: what was measured, by section.
    """
    sign = "≥" if target.at_least else "≤"
    row = {"target": target.text, "limit": f"{sign} {shown(target.limit)}"}
    found = [
        line
        for section in target.sections
        if section in tables
        for line in tables[section].rows
        if line["what"] in target.what
        and target.model in (None, line["model"])
        and not math.isnan(line[target.column])
    ]
    if not found:
        return row | {"met": "not measured"}
    pick = min if target.at_least else max
    worst = pick(found, key=lambda line: line[target.column])
    value = worst[target.column]
    met = value >= target.limit if target.at_least else value <= target.limit
    where = f"{worst['model']}, {worst['what']}"
    return row | {"measured": value, "where": where, "met": "yes" if met else "no"}
