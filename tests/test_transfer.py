"""A transfer study: its rule of decision, its runs, what it keeps and refuses."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from runs import blank_figures, quick_compilation

from d2sparse import data, models, records, train
from d2sparse.models.mlp import MLP
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


BY_NAME = models.make_model


def one_hidden_layer(name, num_classes, width=None):
    """In place of two, which compile longer; other names are those of the library."""
    if name != TINY.source_model:
        return BY_NAME(name, num_classes, width)
    return models.from_linen(MLP((15,), num_classes))


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with (
        quick_compilation(),
        blank_figures(),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(models, "make_model", one_hidden_layer)
        yield


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


def test_differences_need_both_networks():
    """Of a study that has not finished, what is there is decided."""

    def without_dense(runs):
        return runs[runs["compression"] != "dense"]

    few = [(0.5, 0.3), (0.5, 0.29)]
    for other in (
        without_dense(frame(few, "probed", 1)),
        without_dense(frame(few, "prompted_iterative", 10)),
    ):
        claims = decide(pd.concat([frame(few, "prompted_iterative", 1), other]))
        assert set(claims["claim"]) == {"transfer", "calibration", "likelihood"}
        assert len(claims) == 3
    # A unit that lacks one of the two is none.
    row = verdict_of(decide(frame([*few, (0.5, 0.1)]).iloc[:-1]), "transfer")
    np.testing.assert_allclose(row["difference"], -0.205)
    assert row["units"] == 2
    assert decide(without_dense(frame(few))).empty


def test_calibration_is_claimed_to_get_worse():
    runs = frame([(0.5, 0.5)] * 3)
    pruned = runs["compression"] == "imp80"
    runs.loc[pruned, "ece"] += np.array([0.1, 0.11, 0.12])
    runs.loc[pruned, "nll"] -= np.array([0.1, 0.11, 0.12])
    claims = decide(runs)
    assert verdict_of(claims, "calibration")["verdict"] == "supported"
    assert verdict_of(claims, "likelihood")["verdict"] == "reversed"
    assert verdict_of(claims, "transfer")["verdict"] == "undecided"


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
    dense = runs[runs["compression"] == "dense"]
    # Of all kernels, whose live weights are what has a size.
    np.testing.assert_allclose(
        sparse["source_size"], 0.2 * dense["source_size"], rtol=0.01
    )
    assert set(runs[runs["compression"] == "ptq4"]["source_bits"]) == {4}
    assert runs["temperature"].between(0.01, 100).all()
    summary = json.loads((place / "run" / "summary.json").read_text())
    assert {row["claim"] for row in summary["claims"]} == {
        *("transfer", "prompting", "calibration", "likelihood")
    }
    # Every network is a unit, also where two have the same accuracy.
    assert {row["networks"] for row in summary["sources"]} == {2}
    table = (place / "run" / "table.md").read_text()
    assert "released x 100" in table
    titles = [line for line in table.splitlines() if line.startswith("## ")]
    assert titles[:3] == [
        "## 1 label per class",
        "## Calibration of prompted_iterative, 1 label per class",
        "## Calibration of probed, 1 label per class",
    ]
    assert [title[:6] for title in titles[3:]] == [
        "## (a)",
        "## (b)",
        "## (c)",
        "## (c)",
    ]
    figures = {path.stem for path in (place / "run" / "figures").iterdir()}
    assert {"prompts", "label_map-ptq4", "calibration-probed"} <= figures
    assert "accuracy_against_compression-ptq-1" in figures


def written(place):
    return {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()}


def test_networks_and_runs_are_kept(study, monkeypatch):
    config, runs, place = study
    sources, units = written(place / "sources"), written(place / "run" / "units")
    assert len(units) == 12

    def refuse(*args, **kwargs):
        raise AssertionError("something is trained anew")

    monkeypatch.setattr(records.Run, "save_figure", lambda *given: None)
    monkeypatch.setattr(train, "fit", refuse)
    with monkeypatch.context() as without_runs:
        without_runs.setattr(train, "fit_together", refuse)
        again = run(config)
    np.testing.assert_array_equal(again["accuracy"], runs["accuracy"])
    assert units == written(place / "run" / "units")
    # A study elsewhere reads the networks, and has the same runs.
    few = {"compression": ("ptq4",), "source_seed": (1,), "samples_per_class": (1,)}
    other = dataclasses.replace(
        config, workdir=str(place / "other"), methods=("probed",), axes=few
    )
    (found,) = run(other)["accuracy"]
    chosen = (runs["method"] == "probed") & (runs["compression"] == "ptq4")
    (own,) = runs[chosen & (runs["source_seed"] == 1)]["accuracy"]
    assert found == own
    # Of other steps are other networks, which a dry run does not train.
    dry = {"workdir": str(place / "dry"), "source_steps": 7, "dry_run": True}
    assert not len(run(dataclasses.replace(other, **dry)))
    assert sources == written(place / "sources")
    assert not (place / "dry").exists()


def test_what_cannot_be_transferred_is_said(tmp_path):
    with pytest.raises(ValueError, match="RigL trains from the beginning"):
        dataclasses.replace(TINY, axes={}, source="net.npz", compression="rigl80")
    with pytest.raises(ValueError, match="expected the path of a file"):
        run(dataclasses.replace(TINY, source=str(tmp_path / "net.npz")))
    with pytest.raises(ValueError, match="source networks come from --source"):
        run(dataclasses.replace(TINY, ticket="somewhere"))
    with pytest.raises(ValueError, match="prompt_size"):
        dataclasses.replace(TINY, prompt_size=-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_size": 17}, "expected inner of at most 16 x 16"),
        (
            {"axes": {**AXES, "prompt_size": (4, 17)}, "prompt": "patch"},
            "at most 16 x 16",
        ),
        ({"classes": "", "source_dataset": "digits"}, "at most 10 target classes"),
        ({"classes": "10-12"}, "expected classes FIRST-LAST of 0 to 11"),
        ({"source_model": "resnet9"}, "unknown model 'resnet9'"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_trained(
    changes, message, tmp_path
):
    images = np.zeros((24, 8, 8, 1), np.uint8)
    labels = np.arange(24, dtype=np.int32) % 12
    target = data.from_arrays(images, labels, images, labels)
    places = {"workdir": str(tmp_path / "run"), "sources": str(tmp_path / "sources")}
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(TINY, **places, **changes), target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ptq9", "qat1", "imp80_ptq2", ""])
def test_compressions_that_are_none_are_refused(name):
    with pytest.raises(ValueError, match=f"expected compression of .* got '{name}'"):
        dataclasses.replace(TINY, axes={}, compression=name)
    for changes in (
        *({"source_rounds": 0}, {"further_steps": 0}, {"source_seed": -1}),
        {"source_prunable": "heads"},
    ):
        with pytest.raises(ValueError, match=next(iter(changes))):
            dataclasses.replace(TINY, axes={}, **changes)
