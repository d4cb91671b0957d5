"""From the results of units to the rows and cells of a table."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np
from rich.console import Console

from d2sparse import records, tree
from d2sparse.tree import PyTree
from experiments.task import Task, TaskConfig

Results = Mapping[int, Mapping[str, Any]]  # By seed.


class Finished(TypedDict):
    """What the results of every unit hold; those of an experiment hold more."""

    accuracy: float
    nll: float
    ece: float
    brier: float
    nonzeros: float
    inference_macs: float
    training_macs: float
    seconds: float


class Rounds(TypedDict):
    """The results of a unit that consists of rounds."""

    rounds: list[Finished]


_DIFFERENCES = (
    "to_first",
    *("to_dense", "to_random", "to_rigl", "to_imp"),
    *("to_uncoupled", "to_half"),
)


def gather(out: records.Run, name: str, seeds: int) -> dict[int, dict[str, Any]]:
    """The results of a method by seed, of the seeds that have come to their end."""
    found = {seed: out.finished(records.Unit(name, seed)) for seed in range(seeds)}
    return {seed: own for seed, own in found.items() if own and "failed" not in own}


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows for which at least one seed has come to its end."""
    return [row for row in rows if row["seeds"]]


def with_weights(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that have a place on a logarithmic axis of the density."""
    return [row for row in rows if row["sparsity"] < 1]


def sparsity(masks: PyTree, task: Task) -> float:
    """Fraction of zeros among the prunable weights of the task's network."""
    prunable = tree.prunable_leaves(task.params, task.prunable)
    live = sum(int(mask.sum()) for mask in tree.pick(masks, prunable).values())
    return 1 - live / tree.size(prunable)


def summarise(name: str, results: Results, task: Task) -> dict[str, Any]:
    """One row: means over seeds, with the deviation and the standard error.

    Args:
      name: of the method.
      results: of its units by seed.
      task: what was learned; costs are relative to those of its dense network.
    """
    if not results:
        return {"method": name, "seeds": 0}
    numbers = [k for k, v in next(iter(results.values())).items() if np.isscalar(v)]
    mean = {
        key: float(np.mean([unit[key] for unit in results.values()])) for key in numbers
    }
    summary = records.summarize(unit["accuracy"] for unit in results.values())
    dense = sum(task.macs.values())
    measured = {"sparsity": mean["sparsity"]} if "sparsity" in mean else {}
    return {
        "method": name,
        **measured,
        "accuracy": mean["accuracy"],
        "standard_error": summary.standard_error,
        "deviation": summary.standard_error * np.sqrt(summary.n),
        "seeds": summary.n,
        "nll": mean["nll"],
        "ece": mean["ece"],
        "brier": mean["brier"],
        "nonzeros": mean["nonzeros"],
        "relative_macs": mean["training_macs"] / (3 * task.steps * dense),
        "inference_macs": mean["inference_macs"],
        "relative_inference": mean["inference_macs"] / dense,
        "seconds": float(np.median([unit["seconds"] for unit in results.values()])),
        "outputs": {k: v for k, v in mean.items() if k.startswith("accuracy_")},
    }


def difference(name: str, a: Results, b: Results) -> dict[str, float]:
    """Mean and standard error of the difference in accuracy, paired by seed.

    Returns:
      Both, by the name and the name with "_error"; nothing where no seed is in both.
    """
    if not a.keys() & b.keys():
        return {}
    one, other = (
        {seed: unit["accuracy"] for seed, unit in results.items()} for results in (a, b)
    )
    mean, error, _ = records.paired_difference(one, other)
    return {name: mean, f"{name}_error": error}


def judged(config: TaskConfig) -> str:
    """On what the numbers were measured."""
    return "validation" if config.validation_fraction else "test"


def curve_key(lines: list[dict[str, Any]]) -> tuple[str, str]:
    """Which measurement the learning curves show, and its name."""
    if any("monitor_accuracy" in line for line in lines):
        return "monitor_accuracy", "accuracy on training images outside the budget"
    return "train_accuracy", "accuracy on training batches"


def percent(value: float, error: float) -> str:
    """A fraction and its error in per cent; without the error where it is NaN."""
    mean = f"{100 * value:.2f}"
    return mean if np.isnan(error) else f"{mean} ± {100 * error:.2f}"


def signed_percent(value: float, error: float) -> str:
    """A difference and its error in per cent, its sign in front."""
    return "+" * (value >= 0) + percent(value, error)


def cells(row: Mapping[str, Any], error: str = "standard_error") -> dict[str, str]:
    """The row as text.

    Args:
      row: as `summarise` returns it.
      error: the field that stands behind the accuracy.
    """
    if not row["seeds"]:
        return {"method": row["method"], "accuracy": "no result"}
    text = {
        key: signed_percent(row[key], row[f"{key}_error"])
        for key in _DIFFERENCES
        if key in row
    }
    if "sparsity" in row:
        text["sparsity"] = f"{100 * row['sparsity']:.4g}"
    return text | {
        "method": row["method"],
        "accuracy": percent(row["accuracy"], row[error]),
        "nll": f"{row['nll']:.3f}",
        "ece": f"{100 * row['ece']:.1f}",
        "brier": f"{row['brier']:.3f}",
        "nonzeros": f"{row['nonzeros']:,.0f}",
        "relative_macs": f"{row['relative_macs']:.2f}",
        "relative_inference": f"{row['relative_inference']:.2f}",
        "seconds": f"{row['seconds']:.1f}",
    }


def publish(
    config: TaskConfig,
    out: records.Run,
    kind: str,
    rows: list[dict[str, Any]],
    columns: Mapping[str, str],
    error: str = "standard_error",
) -> dict[str, Any]:
    """Writes summary and table, and prints the table.

    Args:
      config: the flags.
      out: where to.
      kind: what a row is; its name in the summary.
      rows: as `summarise` returns them, and more.
      columns: titles of the table by field.
      error: the field that stands behind the accuracy.

    Returns:
      The summary.
    """
    titles = {**columns, "accuracy": f"{judged(config)} accuracy %"}
    table = records.markdown_table([cells(row, error) for row in rows], titles)
    return write(config, out, {kind: rows}, table)


def write(
    config: TaskConfig, out: records.Run, found: Mapping[str, Any], table: str
) -> dict[str, Any]:
    """Writes summary and tables, adding what has failed, and prints the tables.

    Args:
      config: the flags.
      out: where to.
      found: what the summary says.
      table: the tables, as Markdown.

    Returns:
      The summary.
    """
    failed = out.failures()
    for name, why in failed.items():
        table += f"\n\n{name} failed and is not counted: {why}"
    summary = {"config": dataclasses.asdict(config), **found, "failed": failed}
    out.write_summary(summary)
    out.write_text("table.md", table + "\n")
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"\nEverything is in {out.workdir}")
    return summary
