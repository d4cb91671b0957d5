"""A transfer study: its rule of decision, its runs, what it keeps and refuses."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from d2sparse.study.transfer_report import decide, units_of
from experiments.transfer import Config, run

AXES = {
    "compression": ("dense", "one_shot80", "ptq4"),
    "source_seed": (0, 1),
    "samples_per_class": (1,),
}
TINY = Config(
    methods=("prompted_iterative", "probed"),
    axes=AXES,
    steps=4,
    source_steps=6,
    further_steps=4,
    source_width=0.05,
    report_every=4,
    workers=1,
    progress=False,
)


def frame(accuracies, method="probed", samples=1, ece=0.1):
    """Runs of a dense and a pruned network, by unit."""
    rows = []
    for unit, (dense, pruned) in enumerate(accuracies):
        for name, accuracy in (("dense", dense), ("imp80", pruned)):
            row = {"method": method, "compression": name, "seed": unit}
            numbers = {"accuracy": accuracy, "ece": ece, "nll": 1.0}
            rows.append(row | {"samples_per_class": samples} | numbers)
    return pd.DataFrame(rows)


def verdict_of(claims, claim):
    (row,) = claims[claims["claim"] == claim].to_dict("records")
    return row


@pytest.mark.parametrize(
    ("pruned", "verdict"),
    [((0.4, 0.5, 0.3), "supported"), ((0.7, 0.8, 0.9), "reversed")],
)
def test_a_difference_beyond_twice_its_error_decides(pruned, verdict):
    claims = decide(frame([(0.6, own) for own in pruned]))
    row = verdict_of(claims, "transfer")
    differences = np.array(pruned) - 0.6
    np.testing.assert_allclose(row["difference"], differences.mean())
    np.testing.assert_allclose(row["error"], differences.std(ddof=1) / 3**0.5)
    assert (row["verdict"], row["units"]) == (verdict, 3)
    # Equal calibration errors decide nothing.
    assert verdict_of(claims, "calibration")["verdict"] == "undecided"


def test_within_twice_its_error_or_of_one_unit_nothing_is_decided():
    unsure = decide(frame([(0.6, 0.5), (0.6, 0.68)]))
    assert verdict_of(unsure, "transfer")["verdict"] == "undecided"
    single = verdict_of(decide(frame([(0.6, 0.1)])), "transfer")
    assert single["verdict"] == "undecided"
    assert np.isnan(single["error"])


def test_few_labels_and_prompts_are_differences_of_differences():
    few = [(0.5, 0.3), (0.5, 0.29)]
    most = [(0.8, 0.8), (0.8, 0.79)]
    runs = pd.concat(
        [
            frame(few, "prompted_iterative", 1),
            frame(most, "prompted_iterative", 0),
            frame([(0.5, 0.5), (0.5, 0.49)], "probed", 1),
        ]
    )
    claims = decide(runs)
    row = verdict_of(claims, "few labels")  # 0 stands for all labels.
    np.testing.assert_allclose(row["difference"], -0.2)
    assert row["verdict"] == "supported"
    row = verdict_of(claims, "prompting")
    np.testing.assert_allclose(row["difference"], -0.2)
    assert row["samples_per_class"] == 1


def test_runs_that_share_a_network_are_one_unit():
    runs = pd.concat(
        [
            frame([(0.5, 0.4)]).assign(source_seed=s, seed=t)
            for s in (0, 1)
            for t in (0, 1)
        ]
    )
    runs["accuracy"] += 0.1 * runs["seed"]
    units = units_of(runs)
    assert len(units) == 4
    dense = units[(units["compression"] == "dense")]["accuracy"]
    np.testing.assert_allclose(dense, 0.55)
    one = units_of(runs[runs["source_seed"] == 0])
    assert sorted(one["seed"]) == [0, 0, 1, 1]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    place = tmp_path_factory.mktemp("transfer")
    config = dataclasses.replace(
        TINY, workdir=str(place / "run"), sources=str(place / "sources")
    )
    return config, run(config), place


def test_every_way_and_network_has_a_row_and_a_verdict(study):
    _, runs, place = study
    assert len(runs) == 2 * 3 * 2
    sparse = runs[runs["compression"] == "one_shot80"]
    np.testing.assert_allclose(sparse["source_sparsity"], 0.8, atol=0.01)
    assert set(runs[runs["compression"] == "ptq4"]["source_bits"]) == {4}
    assert runs["temperature"].between(0.01, 100).all()
    summary = json.loads((place / "run" / "summary.json").read_text())
    assert {row["claim"] for row in summary["claims"]} == {
        *("transfer", "prompting", "calibration", "likelihood")
    }
    table = (place / "run" / "table.md").read_text()
    assert "released x 100" in table
    figures = {path.stem for path in (place / "run" / "figures").iterdir()}
    assert {"prompts", "label_map-ptq4", "calibration-probed"} <= figures
    assert "accuracy_against_compression-ptq-1" in figures


def test_networks_and_runs_are_kept(study):
    config, runs, place = study
    before = {p: p.stat().st_mtime_ns for p in (place / "sources").rglob("*")}
    again = run(config)
    np.testing.assert_array_equal(again["accuracy"], runs["accuracy"])
    assert before == {p: p.stat().st_mtime_ns for p in (place / "sources").rglob("*")}
    # Of other steps are other networks.
    dry = dataclasses.replace(
        config, workdir=str(place / "dry"), source_steps=7, dry_run=True
    )
    assert not len(run(dry))
    assert before.keys() == set((place / "sources").rglob("*"))


def test_what_cannot_be_transferred_is_said(tmp_path):
    with pytest.raises(ValueError, match="RigL trains from the beginning"):
        dataclasses.replace(TINY, axes={}, source="net.npz", compression="rigl80")
    with pytest.raises(ValueError, match="expected the path of a file"):
        run(dataclasses.replace(TINY, source=str(tmp_path / "net.npz")))
    with pytest.raises(ValueError, match="source networks come from --source"):
        run(dataclasses.replace(TINY, ticket="somewhere"))
    with pytest.raises(ValueError, match="prompt_size"):
        dataclasses.replace(TINY, prompt_size=-1)
