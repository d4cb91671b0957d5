"""How small a network has become: its numbers, neurons and layers, and their states."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from d2sparse import plots, train, tree
from d2sparse.checks import optional
from d2sparse.constraints import count_states_on, entropies_of, layers_of
from d2sparse.models.gates import Gates, leaf_of
from d2sparse.study import reporting
from d2sparse.study.frames import summarise
from d2sparse.study.reporting import Comparison
from d2sparse.study.runner import End, judged
from d2sparse.study.tables import table_of

with optional(__name__):
    import pandas as pd

_COLUMNS = ("nll", "compression", "neurons", "activations", "train_accuracy")
# Figures by name: column, label, whether on a logarithmic axis.
_FIGURES = {
    "compression": ("compression", "compression ratio", True),
    "neurons": ("neurons", "neurons and channels left, of the dense network's", False),
    "depth": ("activations", "activation functions left", False),
}


def examine(end: End) -> dict[str, Any]:
    """What is left of a network, and how certain the states of its units are.

    Returns:
      compression: numbers of the dense network over those stored; neurons: part of the
      neurons and channels before activation functions that have a live incoming weight;
      activations: functions that are neither linear nor in a dropped block; entropies:
      mean ON/OFF entropy of channels over the training examples, in bits by activation
      function, 0 where it is gone; entropy: their mean; train_accuracy: on the labels
      it is trained on. NaN and empty where it has no activation functions that are
      Linen modules, and for several networks at once.
    """
    training, state, data = end.program.training, end.state, end.splits.train
    masks = jax.device_get(training.masks(state))
    stored = sum(int(np.sum(m)) for m in jax.tree.leaves(masks.stored))
    total = tree.size(end.plan.base.network.params)
    found = layers_of(end.program, state, data).activations
    feeding = {
        leaf_of(masks.used[0], layer, "kernel")
        for own in found.values()
        for layer in own.kernels
    }
    bits: dict[str, float] = {}
    if found:
        counts = count_states_on(end.program, state, data, found)
        bits = entropies_of(counts, zero="off", varying_only=False)
    gone = _gone(state.model_state, bits)
    active = [own for name, own in bits.items() if name not in gone]
    return {
        "compression": total / stored,
        "neurons": live_neurons(masks.used[0], feeding) if feeding else np.nan,
        "activations": len(active) if found else np.nan,
        "entropies": {n: 0.0 if n in gone else own for n, own in bits.items()},
        "entropy": float(np.mean(active)) if active else np.nan,
        "train_accuracy": train.accuracy_of(end.program, state, data),
    }


def live_neurons(masks: Any, kernels: Collection[str]) -> float:
    """Part of the neurons and channels of some kernels with a live incoming weight.

    >>> first = np.array([[True, False], [True, False]])
    >>> masks = {"first": {"kernel": first}, "head": {"kernel": ~first}}
    >>> live_neurons(masks, ["first/kernel"])
    0.5
    """
    own = [leaf for path, leaf in tree.flatten(masks).items() if path in kernels]
    live = [np.any(k, axis=tuple(range(np.ndim(k) - 1))) for k in own]
    return float(np.mean(np.concatenate(live)))


def _gone(model_state: Any, names: Collection[str]) -> set[str]:
    """Activation functions that gates have made linear, or dropped with their block."""
    nodes = jax.tree.leaves(model_state, is_leaf=lambda n: isinstance(n, Gates))
    gone: set[str] = set()
    for gates in (node for node in nodes if isinstance(node, Gates)):
        dropped = [block for block, on in gates.blocks.items() if not bool(on)]
        gone |= {name for name, on in gates.active.items() if not bool(on)}
        gone |= {n for n in names if any(n.startswith(f"{b}/") for b in dropped)}
    return gone


def report(comparison: Comparison) -> dict[str, Any]:
    """Writes summary, tables and figures of the finished runs, and prints the tables.

    A run with titled phases has a row for each of them in a second table, and figures
    show all of these networks instead of the last ones.

    Returns:
      The summary, as in summary.json.
    """
    rows = reporting.summary_rows(comparison)
    heading = reporting.heading_of(comparison.config)
    if not len(rows):
        return reporting.write(comparison, {"rows": []}, heading + "No run has ended.")
    axes, references = comparison.axes, comparison.references
    table = table_of(rows, axes, references, ("zeros", *_COLUMNS, "relative_macs"))
    parts = _parts(comparison)
    results = {"rows": rows.to_dict("records"), "parts": parts.to_dict("records")}
    if len(parts) > len(rows):
        several = parts["method"].isin(parts[parts["part"] > 0]["method"])
        every = table_of(parts[several], [*axes, "part"], (), ("zeros", *_COLUMNS))
        table += f"\n\n## Along the way\n\n{every}"
    summary = reporting.write(comparison, results, heading + table)
    _draw(comparison, parts)
    reporting.draw_curves(comparison)
    return summary


def _parts(comparison: Comparison) -> "pd.DataFrame":
    """The networks of titled phases, numbered; of runs without any, the last one."""
    config, out, plans = comparison.config, comparison.out, comparison.plans
    titled, whole = reporting.read(config, out, plans, parts=True), comparison.runs
    keys = ["run", "seed"]
    if len(titled):
        known = pd.MultiIndex.from_frame(titled[keys])
        alone = ~pd.MultiIndex.from_frame(whole[keys]).isin(known)
        whole = pd.concat([titled, whole[alone]], ignore_index=True)
    order = {plan.row.name: place for place, plan in enumerate(plans)}
    runs = whole.sort_values("run", key=lambda name: name.map(order), kind="stable")
    runs = runs.assign(part=runs.groupby(keys).cumcount())
    by = ["method", *comparison.axes, "part"]
    by = [name for name in by if name in runs.columns]
    entropies = runs.groupby(by, sort=False, dropna=False)["entropies"].agg(_mean)
    return summarise(runs, by).merge(entropies.reset_index(), on=by)


def _mean(each: "pd.Series[Any]") -> dict[str, float]:
    """The mean over seeds of dicts by layer."""
    return {name: float(np.mean([d[name] for d in each])) for name in each.iloc[0]}


def _draw(comparison: Comparison, parts: "pd.DataFrame") -> None:
    rows, label = reporting.labelled(comparison, parts), judged(comparison.config)
    lines = _lines(comparison, parts)
    for name, (key, axis, log) in _FIGURES.items():
        if np.unique(parts[key].dropna()).size > 1:
            figure = plots.accuracy_against(
                lines, key, axis, f"{label} accuracy", log=log
            )
            comparison.out.save_figure(f"accuracy_against_{name}", figure)
    going_on = {row["method"] for row in rows if row["part"]}
    seen = [row for row in rows if row["method"] in going_on and row["entropies"]]
    if seen:
        figure = plots.entropies_of_layers(seen)
        comparison.out.save_figure("entropy_of_layers", figure)


def _lines(comparison: Comparison, parts: "pd.DataFrame") -> list[dict[str, Any]]:
    """Rows for a line a method: through its parts, or through its strengths."""
    config = comparison.config
    if parts["part"].max():
        return reporting.labelled(comparison, parts)
    names = [n for n, values in config.axes.items() if isinstance(values[0], str)]
    axes = {name: config.axes[name] for name in names}
    named = dataclasses.replace(config, axes=axes)
    return reporting.labelled(comparison._replace(config=named), parts)
