"""From the cells of a run directory to its tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from d2sparse import data, plots, records
from d2sparse.data import CORRUPTIONS
from experiments import results
from experiments.few_labels.cells import Cell, Setting, parse_cell
from experiments.few_labels.options import CONTENDER_NAMES, LowDataOptions
from experiments.few_labels.plans import Planner
from experiments.task import Task

Found = Mapping[Cell, results.Results]  # By seed.

_COLUMNS = {
    "method": "method",
    "accuracy": "accuracy %",
    "to_rigl": "minus RigL",
    "to_imp": "minus IMP",
    "to_dense": "minus dense",
    "to_uncoupled": "minus uncoupled",
    "slow": "slow learner alone %",
    "to_half": "minus half RigL",
    "nll": "NLL",
    "ece": "ECE %",
    "brier": "Brier",
    "nonzeros": "non-zeros",
    "relative_macs": "training MACs",
    "relative_inference": "inference MACs",
    "seeds": "seeds",
}
_HEADING = "## {} labels per class"
_HARDER = "Test accuracy in % where something is wrong"
_OUTSIDE = (
    "Accuracy in % on training images outside of the labels, to choose designs by"
)
# Whose calibration is shown, and whose cost where all methods would fill the picture.
_PICTURED = (
    *("dense", "dense_smoothed", "dense_mutual", "snip"),
    *("rigl", "rigl_averaged", "imp", "free_tickets"),
    *("uncoupled_averaged", "d2_sparse", "d2_annealed", "d2_consolidated"),
)
_MOST = 20  # Methods that have room in a picture.
_COMPARED = {
    "to_rigl": "rigl",
    "to_imp": "imp",
    "to_dense": "dense",
    "to_uncoupled": "uncoupled_averaged",
}
_HALF = "rigl_half"  # It has as many weights as one learner of a pair.
_REFERENCES = (
    "rigl",
    "uncoupled_averaged",
    "d2_annealed",
    "d2_sparse",
)  # Of choices of design.


def gather_cells(out: records.Run) -> dict[Cell, dict[int, dict[str, Any]]]:
    """The results of everything that has come to its end, whenever it was run."""
    found: dict[Cell, dict[int, dict[str, Any]]] = {}
    for unit in out.units():
        own = out.finished(unit)
        if own and "failed" not in own:
            found.setdefault(parse_cell(unit.method), {})[unit.seed] = own
    return found


def report(
    config: LowDataOptions, source: data.Source, out: records.Run
) -> dict[str, Any]:
    """Writes summary, tables and figures of all finished cells, and prints the tables.

    Returns:
      The summary, as in summary.json.

    Raises:
      ValueError: nothing has been finished.
    """
    found = gather_cells(out)
    if not found:
        raise ValueError(
            f"expected a finished cell in {out.workdir}, got none; the failures are in "
            "its units"
        )
    budgets = sorted({cell.setting.samples for cell in found})
    tables, summary = [], {}
    for samples in budgets:
        task = Planner(config, source, Setting(samples)).base.task
        rows = list_rows(found, samples, task)
        if not rows:  # Only wrong labels or long tails were run.
            continue
        robust = list_robustness(found, samples)
        tables += [_HEADING.format(samples or "All"), _table(rows)]
        tables += [_HARDER, records.markdown_table(robust, {k: k for k in robust[0]})]
        designs = list_designs(found, samples)
        if designs:
            tables += [
                _OUTSIDE,
                records.markdown_table(designs, {k: k for k in designs[0]}),
            ]
        summary[str(samples)] = {
            "methods": rows,
            "robustness": robust,
            "designs": designs,
        }
    scores = compare(found)
    whole = {"budgets": summary, "ranks": _rank(scores)}
    written = results.write(config, out, whole, "\n\n".join(tables))
    for samples, own in summary.items():
        _draw(own["methods"], found, int(samples), out)
    if len(scores) > 1:
        out.save_figure("ranks", plots.rank_diagram(scores))
    return written


def list_rows(found: Found, samples: int, task: Task) -> list[dict[str, Any]]:
    """The rows of the main table of a budget, in the order of the methods."""
    own = _of_setting(found, Setting(samples))
    rows = []
    for name, units in own.items():
        row = results.summarise(name, units, task)
        for key, other in _COMPARED.items():
            if other in own and other != name:
                row |= results.difference(key, units, own[other])
        slow = _of_output(units, "accuracy_slow")
        row |= results.difference("to_half", slow, own.get(_HALF, {}))
        rows.append(row)
    return rows


def list_robustness(found: Found, samples: int) -> list[dict[str, str]]:
    """The cells of the table of robustness of a budget: means over seeds."""
    clean, every = Setting(samples), sorted({cell.setting for cell in found})
    harder = [own for own in every if own.samples == samples and own != clean]
    rows = []
    for name, units in _of_setting(found, clean).items():
        row = {"method": name}
        for corruption in CORRUPTIONS:
            row[corruption.replace("_", " ")] = _percent(
                [_corrupted(unit, corruption) for unit in units.values()]
            )
        for setting in harder:
            others = found.get(Cell(name, setting), {}).values()
            row[setting.title] = _percent([unit["accuracy"] for unit in others])
        rows.append(row)
    return rows


def list_designs(found: Found, samples: int) -> list[dict[str, str]]:
    """The cells of the table that choices of design are made by.

    Their images are in no budget and not in the test set, so that what is chosen by
    them has not seen what it is reported on.
    """
    own = {
        name: _of_output(units, "outside")
        for name, units in _of_setting(found, Setting(samples)).items()
    }
    rows = []
    for name, units in own.items():
        if not units:
            continue
        row = {
            "method": name,
            "accuracy %": _percent([u["accuracy"] for u in units.values()]),
        }
        for other in _REFERENCES:
            apart = results.difference("apart", units, own.get(other, {}))
            known = bool(apart) and other != name
            row[f"minus {other}"] = (
                results.signed_percent(apart["apart"], apart["apart_error"])
                if known
                else ""
            )
        rows.append(row)
    return rows


def compare(found: Found) -> dict[str, list[float]]:
    """Accuracies by method over seeds of settings, of a table that has no holes.

    Settings that have few methods, or methods that few settings have, are left out: of
    the tables of all seeds with at least so many methods, the one with the most
    accuracies is taken.
    """
    by_setting: dict[tuple[Setting, int], dict[str, float]] = {}
    for cell, units in found.items():
        for seed, unit in units.items():
            place = by_setting.setdefault((cell.setting, seed), {})
            place[cell.method] = unit["accuracy"]
    best: tuple[list[str], list[dict[str, float]]] = ([], [])
    for least in sorted({len(place) for place in by_setting.values()}, reverse=True):
        places = [place for place in by_setting.values() if len(place) >= least]
        shared = set.intersection(*map(set, places))
        if len(shared) * len(places) > len(best[0]) * len(best[1]):
            best = [name for name in CONTENDER_NAMES if name in shared], places
    names, places = best
    return {name: [place[name] for place in places] for name in names}


def _of_setting(found: Found, setting: Setting) -> dict[str, results.Results]:
    return {
        name: found[Cell(name, setting)]
        for name in CONTENDER_NAMES
        if Cell(name, setting) in found
    }


def _of_output(units: results.Results, key: str) -> results.Results:
    """The units that have a number of a name, with it in the place of the accuracy."""
    return {
        seed: {"accuracy": unit[key]} for seed, unit in units.items() if key in unit
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [results.cells(row) | {"seeds": row["seeds"]} for row in rows]
    for cell, row in zip(cells, rows, strict=True):
        if "accuracy_slow" in row["outputs"]:
            cell["slow"] = f"{100 * row['outputs']['accuracy_slow']:.2f}"
    given = {k: v for k, v in _COLUMNS.items() if any(k in cell for cell in cells)}
    return records.markdown_table(cells, given | {"accuracy": "test accuracy %"})


def _corrupted(unit: Mapping[str, Any], name: str) -> float:
    """Mean over severities."""
    own = [v for k, v in unit["corrupted"].items() if k.rpartition("-")[0] == name]
    return float(np.mean(own))


def _percent(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, error, _ = records.summarize(values)
    return results.percent(mean, error)


def _draw(
    rows: Sequence[Mapping[str, Any]], found: Found, samples: int, out: records.Run
) -> None:
    crowded = len(rows) > _MOST
    drawn = [row for row in rows if not crowded or row["method"] in _PICTURED]
    figure = plots.accuracy_against_cost(drawn)
    out.save_figure(f"accuracy_against_cost-{samples}", figure)
    bins = {
        name: _add_up([unit["calibration"] for unit in units.values()])
        for name, units in _of_setting(found, Setting(samples)).items()
        if name in _PICTURED
    }
    if bins:
        out.save_figure(f"calibration-{samples}", plots.reliability_diagram(bins))


def _add_up(bins: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, np.ndarray]:
    return {key: np.sum([own[key] for own in bins], axis=0) for key in bins[0]}


def _rank(scores: Mapping[str, list[float]]) -> dict[str, float]:
    """Mean ranks, where there are several methods to compare."""
    if len(scores) < 2:
        return {}
    ranks = plots.average_ranks(np.transpose(list(scores.values())).tolist())
    return dict(zip(scores, ranks.tolist(), strict=True))
