"""The experiment of compression: what is measured of a network, its tables, figures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import read

from d2sparse import models, plots, train
from d2sparse.models.gates import Gates
from d2sparse.models.mlp import MLP
from d2sparse.study import compression
from experiments import compress

NETWORK = models.from_linen(MLP((6, 5), 10))
NUMBERS = 64 * 6 + 6 + 6 * 5 + 5 + 5 * 10 + 10
TINY = compress.Config(
    methods=("dense", "imp"),
    sparsity=0.75,
    steps=6,
    rounds=2,
    seeds=2,
    shift=0,
    report_every=6,
    workers=1,
    progress=False,
)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with runs.quick_compilation(), runs.blank_figures():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory, the frame, and every network that was examined."""
    place, ends = tmp_path_factory.mktemp("compress") / "run", []
    examine = compression.examine

    def remember(end):
        found = examine(end)
        ends.append((end, found))
        return found

    config = dataclasses.replace(TINY, workdir=str(place))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "examine", remember)
        frame = compress.run(config, model=NETWORK)
    return place, frame, ends


def test_every_network_on_the_way_is_a_row(finished):
    place, frame, _ = finished
    assert sorted(frame["method"]) == ["dense", "dense", "imp", "imp"]
    summary = read(place / "summary.json")
    parts = {(row["method"], row["part"]): row for row in summary["parts"]}
    assert list(parts) == [("dense", 0), *(("imp", n) for n in range(3))]
    assert parts["imp", 0]["accuracy"] == parts["dense", 0]["accuracy"]
    compressions = [parts["imp", n]["compression"] for n in range(3)]
    weights = NUMBERS - 21  # All but biases.
    left = [weights, round(0.5 * weights), round(0.25 * weights)]
    np.testing.assert_allclose(compressions, [NUMBERS / (n + 21) for n in left])
    table = (place / "table.md").read_text()
    assert "## Along the way" in table
    assert "neurons %" in table
    figures = {path.stem for path in (place / "figures").iterdir()}
    assert {"accuracy_against_compression", "entropy_of_layers"} <= figures
    assert "accuracy_against_depth" not in figures  # It has not changed.


def binary_entropy(p):
    return sum(-q * np.log2(q) if q > 0 else 0.0 for q in (p, 1 - p))


def test_entropies_are_those_of_numpy_over_all_examples(finished):
    end, found = finished[2][-1]
    x = np.asarray(train.inputs(end.splits.train)).reshape(-1, 64)
    params = jax.device_get(end.state.params)
    for layer in ("1", "2"):
        own = params[f"dense{layer}"]
        z = x @ own["kernel"] + own["bias"]
        mean = np.mean([binary_entropy(p) for p in (z > 0).mean(axis=0)])
        np.testing.assert_allclose(found["entropies"][f"relu{layer}"], mean, atol=0.02)
        x = np.maximum(z, 0)
    assert found["activations"] == 2
    np.testing.assert_allclose(
        found["entropy"], np.mean([*found["entropies"].values()])
    )


def test_neurons_without_a_live_incoming_weight_are_gone(finished):
    end, found = finished[2][-1]
    params = jax.device_get(end.state.params)
    live = [np.any(params[name]["kernel"], axis=0) for name in ("dense1", "dense2")]
    assert found["neurons"] == np.concatenate(live).mean()
    masks = {"a": {"kernel": np.ones((3, 3, 2, 4), bool)}, "head": {"kernel": live[0]}}
    masks["a"]["kernel"][..., 1] = False
    assert compression.live_neurons(masks, ["a/kernel"]) == 0.75


def test_networks_without_modules_or_in_pairs_have_no_entropies(tmp_path):
    config = compress.Config(
        methods=("dense_mutual",),
        steps=2,
        seeds=1,
        shift=0,
        progress=False,
        workdir=str(tmp_path / "run"),
    )
    with runs.linear_networks():
        frame = compress.run(config)
    assert np.isnan(frame["activations"]).all()
    assert frame["compression"].tolist() == [0.5]  # Two networks are stored.


def test_lines_go_through_networks_in_their_order():
    rows = [
        {"method": "a", "accuracy": 0.9, "deviation": 0.01, "neurons": 0.5},
        {"method": "a", "accuracy": 0.8, "deviation": 0.01, "neurons": 0.25},
        {"method": "b", "accuracy": 0.7, "deviation": np.nan, "neurons": 1.0},
        {"method": "c", "accuracy": 0.7, "deviation": np.nan, "neurons": np.nan},
    ]
    (axes,) = plots.accuracy_against(rows, "neurons", "neurons left").axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    np.testing.assert_allclose(lines["a"].get_xydata(), [[0.5, 0.9], [0.25, 0.8]])
    assert lines["b"].get_fillstyle() == "none"
    assert "c" not in lines
    with pytest.raises(ValueError, match="expected rows with 'depth', got none"):
        plots.accuracy_against(rows, "depth", "depth")


def test_a_panel_a_method_has_a_line_a_layer():
    rows = [
        {"method": "a", "part": n, "entropies": {"relu1": 0.5, "relu2": 0.1 * n}}
        for n in range(3)
    ]
    figure = plots.entropies_of_layers([*rows, {**rows[0], "method": "b"}])
    panels = [axes.get_title(loc="left") for axes in figure.axes]
    assert panels == ["a", "b"]
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    np.testing.assert_allclose(lines["relu2"].get_ydata(), [0, 0.1, 0.2])
    with pytest.raises(ValueError, match="got none"):
        plots.entropies_of_layers([])


def test_names_of_many_layers_stay_inside_of_the_figure():
    bits = {f"stage{n}_block{n}/relu1": 0.5 for n in range(25)}
    figure = plots.entropies_of_layers([{"method": "a", "part": 0, "entropies": bits}])
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.y0 >= 0
    assert box.y1 <= figure.bbox.y1


def test_decays_are_compared_at_three_strengths_or_those_that_are_given(monkeypatch):
    asked = []
    monkeypatch.setattr(compress.study, "compare", lambda c, e, model: asked.append(c))
    compress.run(compress.Config())
    compress.run(compress.Config(decay_strength=4e-4))
    compress.run(compress.Config(methods=("dense", "imp")))
    compress.run(compress.Config(axes={"weight_decay": (0.0, 0.1)}))
    strengths = {"decay_strength": compress.STRENGTHS}
    assert [c.axes for c in asked] == [
        strengths,
        {},
        {},
        {"weight_decay": (0.0, 0.1)} | strengths,
    ]


def test_activations_are_gone_that_are_linear_or_in_a_dropped_block():
    gates = Gates(
        {"stem": jnp.array(True), "block/relu": jnp.array(True), "last": False},
        {},
        {"block": jnp.array(False), "blocks": jnp.array(True)},
    )
    state = {"own": 0, "gates": gates}
    names = ["stem", "block/relu", "blocks/relu", "last"]
    assert compression._gone(state, names) == {"block/relu", "last"}
    assert compression._gone({"mean": jnp.zeros(2)}, names) == set()
