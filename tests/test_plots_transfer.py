"""Figures of transfer: the right numbers, what is missing told, nothing overlapping."""

import itertools
import math

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from d2sparse import plots


@pytest.fixture(autouse=True)
def nothing_global_changes():
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before


def overlapping(texts):
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    return [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


# Reliability before and after


def doubting():
    return {"count": [0, 30, 10], "confidence": [0, 12.0, 8.0], "correct": [0, 24, 9]}


def scaled():
    return {"count": [0, 10, 30], "confidence": [0, 6.0, 27.0], "correct": [0, 6, 27]}


def test_dots_are_bins_as_large_as_their_share():
    figure = plots.reliability_before_and_after(
        {"dense": doubting()}, {"dense": scaled()}, {"dense": 0.3}
    )
    (axes,) = figure.axes
    before, after = axes.collections
    np.testing.assert_allclose(before.get_offsets(), [[0.4, 0.8], [0.8, 0.9]])
    np.testing.assert_allclose(after.get_offsets(), [[0.6, 0.6], [0.9, 0.9]])
    assert np.argmax(before.get_sizes()) == 0
    assert np.argmax(after.get_sizes()) == 1
    colours = [to_hex(dots.get_facecolor()[0]) for dots in (before, after)]
    assert colours == [plots.VERMILLION.lower(), plots.BLUE.lower()]
    title = axes.get_title(loc="left")
    assert title == f"dense, T = 0.3\nECE {100 * 13 / 40:.1f}% → 0.0%"
    assert legend_of(figure) == ["before", "after"]


@pytest.mark.parametrize("networks", [1, 6])
def test_every_network_has_a_panel_and_titles_do_not_meet(networks):
    names = [f"IMP {i}0%" for i in range(networks)]
    figure = plots.reliability_before_and_after(
        dict.fromkeys(names, doubting()), dict.fromkeys(names, scaled())
    )
    figure.draw_without_rendering()
    shown = [axes for axes in figure.axes if axes.axison]
    titles = [
        text
        for axes in shown
        for text in axes.findobj(Text)
        if text.get_text() == axes.get_title(loc="left")
    ]
    assert [t.get_text().split("\n")[0] for t in titles] == names
    assert overlapping([*titles, *figure.legends[0].get_texts()]) == []


def test_networks_before_and_after_are_the_same():
    with pytest.raises(
        ValueError, match=r"same networks before .*\['dense', 'sparse'\]"
    ):
        plots.reliability_before_and_after(
            {"dense": doubting()}, {"sparse": doubting()}
        )
    with pytest.raises(ValueError, match=r"got \['dense'\] once"):
        plots.reliability_before_and_after(
            {"dense": doubting()}, {"dense": doubting()}, {"sparse": 1.0}
        )
    empty = {key: [0, 0] for key in doubting()}
    with pytest.raises(ValueError, match="expected examples in the bins"):
        plots.reliability_before_and_after({"dense": empty}, {"dense": doubting()})


# Accuracy against compression


def network(method, sparsity, bits, accuracy=0.5, error=0.02):
    return {
        "method": method,
        "sparsity": sparsity,
        "bits": bits,
        "accuracy": accuracy,
        "standard_error": error,
    }


def test_panels_are_sparse_quantised_and_both_and_begin_dense():
    places = [(0.8, 4), (0.9, 32), (0, 4), (0, 32), (0.8, 32), (0, 8)]
    rows = [
        network(method, *place, accuracy=0.3 + 0.1 * i + 0.01 * j)
        for i, method in enumerate(("prompt", "probe"))
        for j, place in enumerate(places)
    ]
    figure = plots.accuracy_against_compression(rows)
    figure.draw_without_rendering()
    ticks = [[t.get_text() for t in axes.get_xticklabels()] for axes in figure.axes]
    assert ticks == [
        ["dense", "80%", "90%"],
        ["dense", "8 bit", "4 bit"],
        ["dense", "80%\n4 bit"],
    ]
    expected = [[0.33, 0.34, 0.31], [0.33, 0.35, 0.32], [0.33, 0.30]]
    for axes, y in zip(figure.axes, expected, strict=True):
        prompt, probe = axes.get_lines()
        np.testing.assert_allclose(prompt.get_ydata(), y)
        np.testing.assert_allclose(probe.get_ydata(), np.array(y) + 0.1)
        assert (probe.get_xdata() > prompt.get_xdata()).all()
        assert overlapping(axes.get_xticklabels()) == []
        ends = np.array(axes.collections[0].get_segments())[:, :, 1]
        np.testing.assert_allclose(ends, np.add.outer(y, [-0.02, 0.02]))
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["sparsity", "bits of a weight", "sparsity and bits"]
    assert legend_of(figure) == ["prompt", "probe"]


def test_one_kind_one_seed_and_a_method_that_lacks_a_network():
    rows = [network("prompt", 0, 32), network("prompt", 0, 4, error=math.nan)]
    rows += [network("probe", 0, 4)]
    (axes,) = plots.accuracy_against_compression(rows).axes
    assert [len(line.get_xdata()) for line in axes.get_lines()] == [2, 1]
    (axes,) = plots.accuracy_against_compression(rows[:1]).axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["dense"]


def test_means_of_networks_are_asked_for():
    with pytest.raises(ValueError, match="at least one, got 0 rows"):
        plots.accuracy_against_compression([])
    with pytest.raises(ValueError, match="2 rows for 1; take the means"):
        plots.accuracy_against_compression([network("prompt", 0.5, 32)] * 2)
    for place in ((1.0, 32), (0.5, 0), (0.5, 64)):
        with pytest.raises(ValueError, match="sparsities in"):
            plots.accuracy_against_compression([network("prompt", *place)])


# Prompts


def test_prompts_are_shown_pixel_by_pixel_and_the_rest_is_white():
    rng = np.random.default_rng(0)
    prompts = {"dense": rng.random((6, 5, 3)), "grey": rng.random((6, 5, 1))}
    where = rng.random((6, 5)) < 0.5
    figure = plots.prompt_grid(prompts, where)
    for axes, (name, prompt) in zip(figure.axes, prompts.items(), strict=True):
        (image,) = axes.get_images()
        expected = np.where(where[..., None], prompt + np.zeros(3), 1)
        np.testing.assert_allclose(image.get_array(), expected)
        assert axes.get_title(loc="left") == name


def test_a_signed_prompt_is_grey_where_it_is_zero():
    prompt = np.zeros((4, 4, 1))
    prompt[0, :3, 0] = 1.5, -3.0, 9.0
    where = np.ones((4, 4), bool)
    where[0, 2] = False  # What does not belong to the prompt sets no scale.
    (axes,) = plots.prompt_grid({"frame": prompt}, where, signed=True).axes
    (image,) = axes.get_images()
    np.testing.assert_allclose(image.get_array()[0, :, 0], [0.75, 0, 1, 0.5])
    assert axes.get_title(loc="left") == "frame\n±3"
    nothing = plots.prompt_grid({"new": np.zeros((4, 4, 3))}, signed=True)
    assert (nothing.axes[0].get_images()[0].get_array() == 0.5).all()


def test_prompts_fill_rows_and_others_are_refused():
    figure = plots.prompt_grid({str(i): np.full((2, 2, 3), 0.5) for i in range(8)})
    assert sum(axes.axison for axes in figure.axes) == 8
    with pytest.raises(ValueError, match="at least one prompt"):
        plots.prompt_grid({})
    with pytest.raises(ValueError, match=r"\[height, width, 1 or 3\], got \(4, 4\)"):
        plots.prompt_grid({"dense": np.zeros((4, 4))})
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"values in \[0, 1\].*give signed=True"):
            plots.prompt_grid({"dense": np.full((4, 4, 3), value)})


# Label maps


def test_a_label_map_frames_chosen_cells_and_tells_of_missing_votes():
    votes = np.array([[3, 0, 0], [1, 0, 0], [0, 0, 0], [4, 5, 0]])
    figure = plots.label_map(
        votes, [1, 3, 2], sources=list("abcd"), targets=list("xyz")
    )
    axes, bar = figure.axes
    figure.draw_without_rendering()
    assert [t.get_text() for t in axes.get_yticklabels()] == ["b", "d", "c", "a"]
    ticks = [t.get_text() for t in axes.get_xticklabels()]
    assert ticks == ["x", "y", "z (no examples)"]
    shares = axes.get_images()[0].get_array()
    expected = np.array([[1 / 8, 0, 0], [1 / 2, 1, 0], [0, 0, 0], [3 / 8, 0, 0]])
    np.testing.assert_allclose(shares.filled(0), expected)
    np.testing.assert_array_equal(shares.mask, expected == 0)
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert [frame.get_xy() for frame in frames] == [
        (i - 0.5, i - 0.5) for i in range(3)
    ]
    colours = [to_hex(frame.get_edgecolor()) for frame in frames]
    assert colours == [plots.BLACK, plots.BLACK, plots.VERMILLION.lower()]
    (cross,) = axes.get_lines()
    np.testing.assert_array_equal(cross.get_xydata(), [[2, 2]])
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["chosen, with votes: 2", "chosen, no votes: 1"]
    assert bar.get_ylabel() == "share of the target class"
    assert axes.get_ylabel() == "source label"


def test_of_many_source_labels_the_chosen_and_the_most_voted_are_shown():
    rng = np.random.default_rng(0)
    votes = rng.poisson(0.1, (1000, 12))
    chosen = rng.permutation(1000)[:12]
    figure = plots.label_map(votes, chosen)
    axes = figure.axes[0]
    figure.draw_without_rendering()
    shown = [int(t.get_text()) for t in axes.get_yticklabels()]
    assert shown[:12] == chosen.tolist()
    assert len(set(shown)) == len(shown) == 40
    totals = votes.sum(1)
    hidden = np.setdiff1d(np.arange(1000), shown)
    assert totals[shown[12:]].min() >= totals[hidden].max()
    assert axes.get_ylabel() == "source label (40 of 1000)"
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert overlapping(labels) == []


def test_maps_that_do_not_fit_their_votes_are_refused():
    votes = np.ones((4, 2))
    for wrong in (votes[0], -votes, np.full((4, 2), math.nan)):
        with pytest.raises(ValueError, match=r"votes of shape \[sources, targets\]"):
            plots.label_map(wrong, [0, 1])
    for chosen in ([0], [0, 4], [-1, 0]):
        with pytest.raises(ValueError, match="2 source labels below 4"):
            plots.label_map(votes, chosen)
    with pytest.raises(ValueError, match="expected 4 names as sources, got 1"):
        plots.label_map(votes, [0, 1], sources=["cat"])
