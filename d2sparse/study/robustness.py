"""Methods under little data: what else is asked of networks, and its summary.

Runs have values of `SETTINGS`. Those of one number of labels are compared on the test
set, on corrupted images of it, and on images outside of the labels, by which designs
are chosen; with wrong labels and long tails; and all by ranks over settings and seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from d2sparse.checks import optional
from d2sparse.constraints import METHODS
from d2sparse.data import CORRUPTIONS
from d2sparse.study.flags import text_of
from d2sparse.study.frames import summarise, with_difference
from d2sparse.study.judging import calibration, corrupted_accuracies
from d2sparse.study.runner import End
from d2sparse.train import accuracy_of

with optional(__name__):
    import pandas as pd

SETTINGS = ("samples_per_class", "label_noise", "imbalance")
# Methods that designs are compared with, on examples outside of the labels.
DESIGNS = ("rigl", "uncoupled_averaged", "d2_annealed", "d2_sparse")
HALF = "rigl_half"  # It has as many weights as one learner of a pair.


def examine(end: End, severities: tuple[int, ...]) -> dict[str, Any]:
    """What is asked of a trained network besides its accuracy on clean images.

    Args:
      end: of a run; at the end of a titled phase nothing is asked.
      severities: of the corruptions, from 1, slight, to 5.

    Returns:
      "calibration", as `metrics.calibration` has it; "corrupted", accuracies by name
      and severity, such as "blur-3", where the data are uint8 images; and "outside",
      the accuracy on training examples outside of the labels, where there are any.
    """
    if end.title:
        return {}
    program, state, splits = end.program, end.state, end.splits
    found: dict[str, Any] = {"calibration": calibration(program, state, splits)}
    images, outside = splits.judge.images, splits.outside
    if images.ndim == 4 and images.dtype == jnp.uint8:
        found["corrupted"] = corrupted_accuracies(
            program, state, splits.judge, severities
        )
    if outside is not None:
        found["outside"] = accuracy_of(program, state, outside)
    return found


def summarise_labels(
    runs: "pd.DataFrame", references: Sequence[str]
) -> "dict[str, pd.DataFrame]":
    """The rows of all tables of one number of labels.

    Args:
      runs: of one number of labels, in the order of the rows.
      references: methods that differences on the test set are taken to.

    Returns:
      "methods": quality, costs and differences; "slow": slow learners alone;
      "conditions": accuracies where something is wrong, a row for every method and
      condition; "designs": accuracies outside of labels and test set.
    """
    plain = clean(runs)
    slow, outside = _measured(plain, "accuracy_slow"), _measured(plain, "outside")
    half = plain[plain["method"] == HALF]
    return {
        "methods": _compared(plain, references),
        "slow": _compared(pd.concat([slow, half]), (HALF,)) if len(slow) else slow,
        "conditions": summarise_conditions(runs),
        "designs": _compared(outside, DESIGNS),
    }


def summarise_conditions(runs: "pd.DataFrame") -> "pd.DataFrame":
    """Accuracies where something is wrong: with the images, or with the labels.

    Args:
      runs: of one number of labels.

    Returns:
      The columns method, condition, accuracy, standard_error and seeds. Corruptions are
      means over severities.
    """
    plain = clean(runs)
    parts = []
    if "corrupted" in plain.columns:
        images = plain[plain["corrupted"].notna()]
        for name in CORRUPTIONS:
            means = [_mean_of(own, name) for own in images["corrupted"]]
            title = name.replace("_", " ")
            parts.append(images.assign(condition=title, accuracy=means))
    wrong = runs.drop(plain.index)
    titles = map(title_of, wrong["label_noise"], wrong["imbalance"])
    parts.append(wrong.assign(condition=list(titles)))
    columns = ["method", "condition", "accuracy", "standard_error", "seeds"]
    every = pd.concat(parts)
    if not len(every):
        return pd.DataFrame(columns=columns)
    return summarise(every, ("method", "condition"))[columns]


def comparable(runs: "pd.DataFrame") -> dict[str, list[float]]:
    """Accuracies by method over seeds of settings, of a table that has no holes.

    Settings that have few methods, or methods that few settings have, are left out: of
    the tables of all seeds with at least so many methods, the one with the most
    accuracies is taken.
    """
    index = [*SETTINGS, "seed"]
    table = runs.pivot(index=index, columns="method", values="accuracy")
    table = table[list(dict.fromkeys(runs["method"]))]
    counts = table.notna().sum(axis=1)
    best = table.iloc[:0, :0]
    for least in sorted(set(counts), reverse=True):
        full = table[counts >= least].dropna(axis=1)
        if full.size > best.size:
            best = full
    return {str(name): column.tolist() for name, column in best.items()}


def clean(runs: "pd.DataFrame") -> "pd.DataFrame":
    """Runs without wrong labels and without a long tail."""
    return runs[(runs["label_noise"] == 0) & (runs["imbalance"] == 1)]


def in_order(runs: "pd.DataFrame") -> "pd.DataFrame":
    """Runs in the order of the table of methods, those that it has not at the end."""
    if not len(runs):
        return runs
    place = {name: number for number, name in enumerate(METHODS)}
    keys = runs["method"].map(place).fillna(len(place))
    order = keys.sort_values(kind="stable").index
    return runs.loc[order].reset_index(drop=True)


def title_of(label_noise: float, imbalance: float) -> str:
    """What a column of wrong labels or of a long tail is called.

    >>> title_of(0.2, 1.0), title_of(0.2, 10.0)
    ('20 % wrong labels', '20 % wrong labels, imbalance 10')
    """
    noise = [f"{100 * label_noise:.12g} % wrong labels"] if label_noise else []
    tail = [f"imbalance {text_of(imbalance)}"] if imbalance > 1 else []
    return ", ".join([*noise, *tail])


def _compared(runs: "pd.DataFrame", references: Sequence[str]) -> "pd.DataFrame":
    """Means by method, with paired differences to the references that there are."""
    if not len(runs):
        return pd.DataFrame(columns=["method"])
    rows, methods = summarise(runs), set(runs["method"])
    for name in references:
        if methods > {name}:
            rows = with_difference(rows, runs, name, {"method": name})
    return rows


def _measured(runs: "pd.DataFrame", column: str) -> "pd.DataFrame":
    """The runs that have a number, in the place of their accuracy."""
    if column not in runs.columns:
        return runs.iloc[:0]
    runs = runs[runs[column].notna()]
    return runs.assign(accuracy=runs[column])


def _mean_of(corrupted: Mapping[str, float], name: str) -> float:
    """Mean over severities."""
    return float(
        np.mean([v for k, v in corrupted.items() if k.rpartition("-")[0] == name])
    )
