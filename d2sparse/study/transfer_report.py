"""The report of a transfer study: its tables, its claims, its figures."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from d2sparse import plots, records
from d2sparse.checks import optional
from d2sparse.study.frames import summarise, with_difference
from d2sparse.study.reporting import Comparison, write
from d2sparse.study.runner import judged
from d2sparse.study.sources import COMPRESSIONS
from d2sparse.study.tables import percent

with optional(__name__):
    import pandas as pd

DENSE = "dense"
_BY = ("method", "compression", "samples_per_class")
_MATCHED = 0.01  # Source accuracies that differ by less are called equal.
_PROMPT = "prompted_iterative"
_PROBE = "probed"
_DRAWN = (_PROMPT, _PROBE, "fine_tuned")


def report(comparison: Comparison) -> dict[str, Any]:
    """Writes summary, tables and figures of the finished runs, and prints the tables.

    Returns:
      The summary, as in summary.json: "rows", means by way, compression and number of
      labels; "sources"; and "claims", see `decide`.
    """
    if not len(comparison.runs):
        return write(comparison, {"rows": []}, "No run has a result.")
    runs = units_of(comparison.runs)
    rows = summarise(runs, _BY)
    for column in ("accuracy", "ece", "nll"):
        dense = f"dense_{column}", {"compression": DENSE}
        rows = with_difference(rows, runs, *dense, _BY, column)
    sources = _sources(runs)
    claims = decide(runs)
    tables = [
        *(
            "Source networks, on the test set of their own task.",
            _source_table(sources),
        ),
        *_accuracy_tables(comparison, rows),
        *_calibration_tables(rows),
        *_claim_tables(claims),
    ]
    results = {
        "rows": rows.to_dict("records"),
        "sources": sources.to_dict("records"),
        "claims": claims.to_dict("records"),
    }
    summary = write(comparison, results, "\n\n".join(tables))
    _draw(comparison, rows)
    _draw_calibration(comparison)
    _draw_prompts(comparison)
    return summary


def units_of(runs: "pd.DataFrame") -> "pd.DataFrame":
    """Runs averaged over what is no replication of the question.

    With several source networks of a compression, a unit is a source seed: runs that
    share a network are averaged. With a single one, such as a file of others, it is a
    seed of the target.

    Returns:
      A row a unit, with its number in the column seed.
    """
    unit = "source_seed" if runs["source_seed"].nunique() > 1 else "seed"
    by = [name for name in (*_BY, unit) if name in runs.columns]
    numeric = [
        c for c in runs.select_dtypes("number").columns if c not in (*by, "seed")
    ]
    means = runs.groupby(by, sort=False)[numeric].mean().reset_index()
    return means.rename(columns={unit: "seed"}) if unit != "seed" else means


def decide(runs: "pd.DataFrame") -> "pd.DataFrame":
    """The claims, each by a rule that was fixed in advance.

    A claim is supported where the mean of a difference that is paired by unit has the
    claimed sign and exceeds twice its standard error, and reversed where it has the
    other sign and does.

    * "transfer": accuracy minus that of the dense network, claimed negative.
    * "few labels": that difference with the fewest labels minus that with the most,
      claimed negative.
    * "prompting": that difference of a prompt minus that of a linear probe, claimed
      negative.
    * "calibration": ECE minus that of the dense network, claimed positive. "likelihood"
      is the same of the NLL.

    Args:
      runs: from `units_of`.

    Returns:
      A row a decision: claim, method, compression, samples_per_class (NaN where it is
      about several), difference, error, units and verdict.
    """
    table = runs.pivot_table(index="seed", columns=list(_BY))
    rows = []
    known = list(runs[list(_BY)].drop_duplicates().itertuples(index=False, name=None))
    shots = _shots(runs)

    def apart(column: str, method: str, own: str, samples: int) -> Any:
        return (
            table[column, method, own, samples] - table[column, method, DENSE, samples]
        )

    # Of runs that have finished: a dense network may still be missing.
    paired = [
        (method, own, samples)
        for method, own, samples in known
        if own != DENSE and (method, DENSE, samples) in known
    ]
    for method, own, samples in paired:
        place = {"method": method, "compression": own, "samples_per_class": samples}
        hurt = apart("accuracy", method, own, samples)
        rows.append({"claim": "transfer", **place, **_verdict(hurt, -1)})
        for claim, column in (("calibration", "ece"), ("likelihood", "nll")):
            worse = apart(column, method, own, samples)
            rows.append({"claim": claim, **place, **_verdict(worse, 1)})
        most = (method, own, shots[-1])
        if samples == shots[0] and len(shots) > 1 and most in paired:
            grown = hurt - apart("accuracy", *most)
            wide = {**place, "samples_per_class": np.nan}
            rows.append({"claim": "few labels", **wide, **_verdict(grown, -1)})
        if method == _PROMPT and (_PROBE, own, samples) in paired:
            more = hurt - apart("accuracy", _PROBE, own, samples)
            rows.append({"claim": "prompting", **place, **_verdict(more, -1)})
    return pd.DataFrame(rows, columns=_CLAIM)


_CLAIM = (
    *("claim", *_BY),
    *("difference", "error", "units", "verdict"),
)


def _verdict(differences: Any, sign: int) -> dict[str, Any]:
    values = differences.dropna()
    mean, count = float(values.mean()), len(values)
    error = float(values.std(ddof=1) / np.sqrt(count)) if count > 1 else np.nan
    verdict = "undecided"
    if count > 1 and abs(mean) > 2 * error:
        verdict = "supported" if sign * mean > 0 else "reversed"
    return {"difference": mean, "error": error, "units": count, "verdict": verdict}


def _sources(runs: "pd.DataFrame") -> "pd.DataFrame":
    """Means of what is known of the source networks, a row a compression."""
    columns = [name for name in runs.columns if name.startswith("source_")]
    # Where seeds of the target are the units, all of them share a network.
    network = "source_seed" if "source_seed" in runs.columns else "seed"
    each = runs.drop_duplicates(["compression", network])
    groups = each.groupby("compression", sort=False)
    found = groups[columns].mean()
    found["error"] = groups["source_accuracy"].std(ddof=1) / np.sqrt(groups.size())
    found["networks"] = groups.size()
    return found.reset_index()


def _source_table(sources: "pd.DataFrame") -> str:
    dense = sources[sources["compression"] == DENSE]["source_accuracy"]
    cells = []
    for row in sources.to_dict("records"):
        apart = row["source_accuracy"] - float(dense.iloc[0]) if len(dense) else 0.0
        cells.append(
            {
                "compression": row["compression"]
                + ("*" if abs(apart) > _MATCHED else ""),
                "accuracy": percent(row["source_accuracy"], row["error"]),
                "ece": f"{100 * row['source_ece']:.1f}",
                "sparsity": f"{100 * row['source_sparsity']:.1f}",
                "bits": f"{row['source_bits']:.0f}",
                "size": f"{row['source_size'] / 8192:,.1f}",
            }
        )
    titles = {
        **{"compression": "source network", "accuracy": "accuracy %", "ece": "ECE %"},
        **{"sparsity": "sparsity %", "bits": "bits", "size": "KiB of live weights"},
    }
    note = "\n\n\\* more than a point from the dense network."
    return records.markdown_table(cells, titles) + note


def _accuracy_tables(comparison: Comparison, rows: "pd.DataFrame") -> list[str]:
    """Accuracies, and differences to the dense network, a pair of tables a budget."""
    tables = []
    for samples in _shots(rows):
        own = rows[rows["samples_per_class"] == samples]
        title = _labels(samples)
        tables += [
            f"## {title}",
            f"{judged(comparison.config).capitalize()} accuracy in %, mean ± standard "
            f"error over {int(own['seeds'].max())} networks or seeds.",
            _pivot(own, "accuracy", "standard_error"),
        ]
        if own["minus_dense_accuracy"].notna().any():
            tables += [
                "The same minus that of the dense network, paired.",
                _pivot(own, "minus_dense_accuracy", "minus_dense_accuracy_error", True),
            ]
    return tables


def _pivot(rows: "pd.DataFrame", value: str, error: str, signed: bool = False) -> str:
    """Source networks by ways."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows.to_dict("records"):
        own = cells.setdefault(row["compression"], {"compression": row["compression"]})
        own[row["method"]] = percent(row[value], row[error], signed)
    methods = dict.fromkeys(rows["method"])
    if signed:
        cells.pop(DENSE, None)
    filled = [
        {"compression": "", **dict.fromkeys(methods, ""), **c} for c in cells.values()
    ]
    titles = {"compression": "source network", **{name: name for name in methods}}
    return records.markdown_table(filled, titles)


_CALIBRATION: Mapping[str, tuple[str, float]] = {
    "ece": ("ECE %", 100),
    "ece_mass": ("by mass %", 100),
    "signed_gap": ("confidence - accuracy %", 100),
    "nll": ("NLL", 1),
    "temperature": ("temperature", 1),
    "ece_scaled": ("ECE % at it", 100),
    "nll_scaled": ("NLL at it", 1),
    "released_ece": ("released x 100", 100),
    "unvoted": ("classes without a vote", 1),
}


def _calibration_tables(rows: "pd.DataFrame") -> list[str]:
    """Calibration before and after temperature scaling, with the most labels."""
    most = _shots(rows)[-1]
    tables = []
    for method in (_PROMPT, _PROBE):
        own = rows[(rows["method"] == method) & (rows["samples_per_class"] == most)]
        if not len(own):
            continue
        shown = {k: v for k, v in _CALIBRATION.items() if own[k].notna().any()}
        cells = [
            {
                "compression": row["compression"],
                **{
                    k: f"{by * row[k]:.{1 if by > 1 else 2}f}"
                    for k, (_, by) in shown.items()
                },
            }
            for row in own.to_dict("records")
        ]
        titles = {
            "compression": "source network",
            **{k: t for k, (t, _) in shown.items()},
        }
        tables += [
            f"## Calibration of {method}, {_labels(most)}",
            records.markdown_table(cells, titles),
        ]
    return tables


_ABOUT = {
    "transfer": "(a) Compression hurts transfer: accuracy minus dense, in points.",
    "few labels": "(b) More so with few labels: that with the fewest minus the most.",
    "prompting": "(b) More so by prompts: that of the prompt minus that of the probe.",
    "calibration": "(c) Compression harms calibration: ECE minus dense, in points.",
    "likelihood": "(c) The same of the NLL, times 100.",
}


def _claim_tables(claims: "pd.DataFrame") -> list[str]:
    tables = []
    for claim, about in _ABOUT.items():
        own = claims[claims["claim"] == claim]
        if not len(own):
            continue
        cells = [
            {
                "method": row["method"],
                "compression": row["compression"],
                "labels": ""
                if np.isnan(row["samples_per_class"])
                else _labels(row["samples_per_class"]),
                "difference": percent(row["difference"], row["error"], signed=True),
                "verdict": row["verdict"],
            }
            for row in own.to_dict("records")
            if claim in ("few labels", "prompting")
            or row["method"] in (_PROMPT, _PROBE, "fine_tuned")
        ]
        titles = {
            name: name
            for name in ("method", "compression", "labels", "difference", "verdict")
        }
        tables += [f"## {about}", records.markdown_table(cells, titles)]
    return tables


def _shots(rows: "pd.DataFrame") -> list[int]:
    """Numbers of labels per class, from the fewest on; 0 stands for all."""
    return sorted(set(rows["samples_per_class"]), key=lambda n: n or np.inf)


def _labels(samples: float) -> str:
    if not samples:
        return "all labels"
    return f"{int(samples)} label{'s' if samples > 1 else ''} per class"


def _draw(comparison: Comparison, rows: "pd.DataFrame") -> None:
    """Accuracy against sparsity and bits, a figure a kind and a number of labels."""
    label = f"{judged(comparison.config)} accuracy"
    kinds = rows["compression"].map(_kind)
    for kind in dict.fromkeys(kinds[kinds != ""]):
        for samples in _shots(rows):
            chosen = kinds.isin(["", kind]) & rows["method"].isin(_DRAWN)
            own = rows[chosen & (rows["samples_per_class"] == samples)]
            drawn = [
                {**row, "sparsity": row["source_sparsity"], "bits": row["source_bits"]}
                for row in own.to_dict("records")
            ]
            if drawn:
                figure = plots.accuracy_against_compression(drawn, label)
                name = f"accuracy_against_compression-{kind}-{samples}"
                comparison.out.save_figure(name, figure)


def _kind(compression: str) -> str:
    """How a network was compressed, without how far."""
    own = COMPRESSIONS[compression]
    rounded = ("qat" if own.aware else "ptq") if own.bits and not own.pruning else ""
    return own.pruning or rounded


def _drawn_runs(comparison: Comparison, method: str, column: str) -> "pd.DataFrame":
    """The runs of a way whose results hold what is drawn, with the most labels."""
    runs = comparison.runs
    if column not in runs.columns:
        return runs.iloc[:0]
    own = runs[(runs["method"] == method) & runs[column].notna()]
    return own[own["samples_per_class"].isin(_shots(own)[-1:])]


def _draw_calibration(comparison: Comparison) -> None:
    """Reliability before and after temperature scaling, a panel a compression."""
    for method in (_PROMPT, _PROBE):
        own = _drawn_runs(comparison, method, "reliability_after")
        if len(own):
            names = own["compression"]
            figure = plots.reliability_before_and_after(
                dict(zip(names, own["reliability_before"], strict=True)),
                dict(zip(names, own["reliability_after"], strict=True)),
                dict(zip(names, own["temperature"], strict=True)),
            )
            comparison.out.save_figure(f"calibration-{method}", figure)


def _draw_prompts(comparison: Comparison) -> None:
    """The learned prompts beside each other, and the label map of every network."""
    own = _drawn_runs(comparison, _PROMPT, "prompt")
    if not len(own):
        return
    flags: Any = comparison.config
    is_border = flags.prompt == "border"
    pixels = {row.compression: np.asarray(row.prompt) for row in own.itertuples()}
    if is_border:  # As the network sees it; behind the window nothing was trained.
        shown = {name: 1 / (1 + np.exp(-theta)) for name, theta in pixels.items()}
        where = np.any([(theta != 0).any(-1) for theta in pixels.values()], axis=0)
        figure = plots.prompt_grid(shown, where)
    else:
        figure = plots.prompt_grid(pixels, signed=True)
    comparison.out.save_figure("prompts", figure)
    for row in own.itertuples():
        figure = plots.label_map(row.votes, row.map)
        comparison.out.save_figure(f"label_map-{row.compression}", figure)
