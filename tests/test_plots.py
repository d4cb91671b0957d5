"""What the figures show: the right numbers, named, legible and without side effects."""

import io
import itertools
import math

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from scipy import stats
from sklearn.isotonic import IsotonicRegression

from d2sparse import plots
from d2sparse.plots.labels import spread

STEPS = (0, 50, 100, 150, 200)
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


def measure(method, value, seeds=3):
    """Measurements of `value(seed, step)`."""
    return [
        {"method": method, "seed": seed, "step": step, "accuracy": value(seed, step)}
        for seed in range(seeds)
        for step in STEPS
    ]


def row(method, accuracy, macs, error=0.01):
    return {
        "method": method,
        "accuracy": accuracy,
        "standard_error": error,
        "relative_macs": macs,
    }


def sparse_row(method, sparsity, accuracy=0.9, deviation=0.01):
    return {
        "method": method,
        "sparsity": sparsity,
        "accuracy": accuracy,
        "deviation": deviation,
    }


def names(axes):
    """The texts in the axes with their boxes in pixels, without leader lines."""
    axes.figure.draw_without_rendering()
    texts = [text for text in axes.texts if text.get_text()]
    return {text.get_text(): Text.get_window_extent(text) for text in texts}


def overlapping(boxes):
    pairs = itertools.combinations(boxes, 2)
    return [(a, b) for a, b in pairs if a.overlaps(b)]


def rendered(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def nothing_global_changes():
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before


# Learning curves


def test_a_curve_is_the_mean_in_a_band_of_its_standard_error():
    rng = np.random.default_rng(0)
    values = rng.uniform(size=(4, len(STEPS)))
    metrics = measure("rigl", lambda s, t: values[s, STEPS.index(t)], seeds=4)
    (axes,) = plots.learning_curves(metrics[::-1], "accuracy", "accuracy").axes
    (line,) = axes.get_lines()
    np.testing.assert_allclose(line.get_xdata(), np.array(STEPS) / STEPS[-1])
    np.testing.assert_allclose(line.get_ydata(), values.mean(0))
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    for step, mean, error in zip(STEPS, values.mean(0), stats.sem(values), strict=True):
        heights = corners[corners[:, 0] == step / STEPS[-1], 1]
        assert heights.min() == pytest.approx(mean - error)
        assert heights.max() == pytest.approx(mean + error)


def test_every_method_has_a_line_a_colour_and_a_name():
    methods = [f"method {i}" for i in range(10)]
    metrics = [
        line
        for i, method in enumerate(methods)
        for line in measure(method, lambda s, t, i=i: i / 100 + t / 1000)
    ]
    (axes,) = plots.learning_curves(metrics, "accuracy", "test accuracy").axes
    lines = axes.get_lines()
    assert [line.get_label() for line in lines] == methods
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == len(methods)
    assert list(names(axes)) == methods
    assert axes.get_xlabel() == "part of the method's training steps"
    assert axes.get_ylabel() == "test accuracy"


def test_names_of_lines_with_one_end_do_not_overlap_or_leave_the_figure():
    metrics = [
        line
        for i in range(8)
        for line in measure(f"method {i}", lambda s, t, i=i: t / 200 - i / 1e4)
    ]
    figure = plots.learning_curves(metrics, "accuracy", "accuracy")
    boxes = names(figure.axes[0])
    assert overlapping(boxes.values()) == []
    lowest, *_, highest = sorted(boxes, key=lambda name: boxes[name].y0)
    assert (lowest, highest) == ("method 7", "method 0")
    assert all(figure.bbox.contains(box.x1, box.y1) for box in boxes.values())


def test_percentages_and_the_late_part_of_training_are_shown():
    metrics = measure("rigl", lambda s, t: 0.1 if t == 0 else 0.8 + t / 2000)
    figure = plots.learning_curves(metrics, "accuracy", "accuracy", percent=True)
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert 0.8 < low < 0.825
    assert 0.9 < high < 0.91
    rendered(figure)
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    assert {"84%", "86%"} <= set(ticks)


def test_one_seed_one_level_and_diverged_runs_can_be_drawn():
    metrics = measure("one seed", lambda s, t: 0.5, seeds=1)
    metrics += measure("diverges", lambda s, t: 0.5 if t < 100 else math.nan)
    metrics += measure("diverged", lambda s, t: math.nan)
    figure = plots.learning_curves(metrics, "accuracy", "accuracy")
    assert list(names(figure.axes[0])) == ["one seed", "diverges"]
    assert rendered(figure).startswith(b"\x89PNG")


def test_measurements_without_the_key_are_left_out_unless_all_are():
    metrics = [*measure("rigl", lambda s, t: t), {"method": "set", "step": 0, "nll": 1}]
    (axes,) = plots.learning_curves(metrics, "accuracy", "accuracy").axes
    assert list(names(axes)) == ["rigl"]
    with pytest.raises(ValueError, match=r"no measurement has the key 'ece', only"):
        plots.learning_curves(metrics, "ece", "calibration error")


def test_names_move_apart_as_little_as_possible():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7):
        heights = rng.uniform(0.4, 0.6, size=n)
        moved = spread(heights, 0.07)
        order, gaps = np.argsort(heights), 0.07 * np.arange(n)
        fitted = IsotonicRegression().fit_transform(range(n), heights[order] - gaps)
        np.testing.assert_allclose(moved[order], fitted + gaps)
    np.testing.assert_allclose(spread([0.9, 0.1], 0.07), [0.9, 0.1])
    np.testing.assert_allclose(spread([1, 1, 0, 0], 0.1), [0.9, 1, 0, 0.1])


# Accuracy against cost


def test_points_stand_where_the_rows_say():
    rows = [row("dense", 0.9, 1.0), row("rigl", 0.91, 0.25, error=math.nan)]
    figure = plots.accuracy_against_cost(rows)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    points = [bar.lines[0].get_xydata()[0].tolist() for bar in axes.containers]
    assert points == [[1.0, 0.9], [0.25, 0.91]]
    (segment,) = axes.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(segment[:, 1], [0.89, 0.91])
    rendered(figure)
    low, high = axes.get_xlim()
    ticks = [t.get_text() for t in axes.get_xticklabels()]
    assert {"0.5", "1"} <= set(ticks)
    assert low < 0.25 < 1 < high


def test_colours_agree_with_those_of_the_learning_curves():
    methods = ["dense", "set", "rigl"]
    metrics = [line for m in methods for line in measure(m, lambda s, t: t)]
    (curves,) = plots.learning_curves(metrics, "accuracy", "accuracy").axes
    (costs,) = plots.accuracy_against_cost([row(m, 0.5, 1) for m in methods]).axes
    lines = [to_hex(line.get_color()) for line in curves.get_lines()]
    points = [to_hex(bar.lines[0].get_color()) for bar in costs.containers]
    assert lines == points


@pytest.mark.parametrize("seed", range(4))
def test_names_of_points_overlap_neither_each_other_nor_the_points(seed):
    rng = np.random.default_rng(seed)
    rows = [
        row(f"method {i}", rng.uniform(0.85, 0.95), 10 ** rng.uniform(-0.7, 0.7))
        for i in range(7)
    ]
    figure = plots.accuracy_against_cost(rows)
    (axes,) = figure.axes
    boxes = names(axes)
    assert list(boxes) == [r["method"] for r in rows]
    assert overlapping(boxes.values()) == []
    points = axes.transData.transform(
        [(r["relative_macs"], r["accuracy"]) for r in rows]
    )
    assert not any(box.contains(*point) for box in boxes.values() for point in points)
    assert all(axes.bbox.contains(box.x0, box.y0) for box in boxes.values())


def test_a_covered_point_is_a_ring_around_those_that_cover_it():
    rows = [row("set", 0.9, 0.3), row("rigl", 0.9, 0.3), row("static", 0.9, 0.3)]
    figure = plots.accuracy_against_cost([*rows, row("dense", 0.92, 1.0)])
    points = figure.axes[0].containers
    sizes = [point.lines[0].get_markersize() for point in points]
    assert sizes[0] > sizes[1] + 2 > sizes[2] + 4
    assert sizes[2] == sizes[3]
    widths = [point.lines[2][0].get_linewidth()[0] for point in points]
    assert widths[0] > widths[1] + 2 > widths[2] + 4
    places = [point.lines[0].get_xydata()[0].tolist() for point in points[:3]]
    assert places == [[0.3, 0.9]] * 3


def test_lines_lead_to_points_that_are_close_from_names_that_hide_nothing():
    rows = [row(f"method {i}", 0.9, 0.3) for i in range(4)]
    rows += [row("close", 0.9, 0.301), row("dense", 0.92, 1.0)]
    (axes,) = plots.accuracy_against_cost(rows).axes
    boxes = names(axes)
    circles = [point.lines[0].get_window_extent() for point in axes.containers]
    assert overlapping(boxes.values()) == []
    assert not any(b.overlaps(c) for b in boxes.values() for c in circles)
    leaders = [text.arrow_patch for text in axes.texts if not text.get_text()]
    colours = [point.lines[0].get_color() for point in axes.containers]
    drawn = [to_hex(leader.get_edgecolor()) for leader in leaders]
    assert drawn == [to_hex(colour) for colour in colours[:5]]


# Accuracy against sparsity


def test_a_line_goes_through_its_sparsities_in_rising_order():
    rng = np.random.default_rng(0)
    accuracies, deviations = rng.uniform(0.1, 0.9, size=(2, len(SPARSITIES)))
    columns = zip(SPARSITIES, accuracies, deviations, strict=True)
    rows = [sparse_row("rigl", *numbers) for numbers in columns]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    (axes,) = plots.accuracy_against_sparsity(rows, "validation accuracy").axes
    (line,) = axes.get_lines()
    assert line.get_label() == "rigl"
    np.testing.assert_allclose(line.get_xdata(), 1 - np.array(SPARSITIES))
    np.testing.assert_allclose(line.get_ydata(), accuracies)
    (bars,) = axes.collections
    ends = np.array(bars.get_segments())[:, :, 1]
    expected = np.stack([accuracies - deviations, accuracies + deviations], axis=1)
    np.testing.assert_allclose(ends, expected)
    low, high = axes.get_ylim()
    assert low < expected.min() < expected.max() < high
    assert axes.get_ylabel() == "validation accuracy"


def test_every_sparsity_is_a_tick_on_a_log_scale_of_density():
    rows = [sparse_row("set", s) for s in SPARSITIES[::2]]
    rows += [sparse_row("rigl", s) for s in SPARSITIES[1::2]]
    rows += [sparse_row("static", float(np.float32(0.9)))]
    figure = plots.accuracy_against_sparsity(rows)
    (axes,) = figure.axes
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["50%", "80%", "90%", "95%", "98%", "99%"]
    np.testing.assert_allclose(axes.get_xticks(), 1 - np.array(SPARSITIES), rtol=1e-6)
    figure.draw_without_rendering()
    x = [axes.transData.transform((1 - s, 0.9))[0] for s in (0.8, 0.9, 0.95)]
    assert x[2] - x[1] == pytest.approx(x[1] - x[0])
    assert x[1] > x[0]


@pytest.mark.parametrize("sparsities", [SPARSITIES, (0.9,), (0.98, 0.99, 0.991)])
@pytest.mark.parametrize("methods", [1, pytest.param(2, marks=pytest.mark.slow), 8])
def test_error_bars_stand_beside_each_other_and_near_their_sparsity(
    methods, sparsities
):
    rows = [sparse_row(f"m{i}", s) for i in range(methods) for s in sparsities]
    figure = plots.accuracy_against_sparsity(rows)
    (axes,) = figure.axes
    figure.draw_without_rendering()
    x = np.array(
        [axes.transData.transform(line.get_xydata())[:, 0] for line in axes.get_lines()]
    )
    ticks = np.array([(1 - s, 0.9) for s in sparsities])
    places = axes.transData.transform(ticks)[:, 0]
    np.testing.assert_allclose(x.mean(axis=0), places)
    # A bar is 1.2 points wide.
    apart = np.diff(x, axis=0) * 72 / figure.dpi
    assert (apart > 1.5).all()
    assert (apart < 6).all()
    nearest = np.abs(x[:, :, None] - places).argmin(axis=-1)
    assert (nearest == np.arange(len(sparsities))).all()
    assert axes.bbox.x0 < x.min()
    assert x.max() < axes.bbox.x1
    segments = np.array([bars.get_segments() for bars in axes.collections])
    points = np.array([line.get_xdata() for line in axes.get_lines()])
    np.testing.assert_allclose(segments[:, :, 0, 0], points)


@pytest.mark.parametrize("sparsities", [SPARSITIES, (0.9,)])
@pytest.mark.parametrize("methods", [1, pytest.param(2, marks=pytest.mark.slow), 8])
def test_names_of_methods_that_meet_neither_overlap_nor_are_cut(methods, sparsities):
    rows = [
        sparse_row(f"sparse momentum {i}", s, 0.9 - i / 1e4 - s / 10)
        for i in range(methods)
        for s in sparsities
    ]
    dense = sparse_row("dense", None, 0.9 - max(sparsities) / 10 + 0.001)
    figure = plots.accuracy_against_sparsity(rows, reference=dense)
    (axes,) = figure.axes
    boxes = names(axes)
    downward = sorted(boxes, key=lambda name: -boxes[name].y0)
    assert downward == ["dense", *dict.fromkeys(row["method"] for row in rows)]
    assert all(box.x0 > axes.bbox.x1 for box in boxes.values())
    ticks = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert overlapping([*boxes.values(), *ticks]) == []
    extent = axes.get_tightbbox()
    assert all(figure.bbox.contains(*corner) for corner in extent.corners())


def test_names_of_crowded_ticks_are_left_out_but_not_the_ticks():
    sparsities = [1 - 0.8**i for i in range(1, 25)]
    figure = plots.accuracy_against_sparsity([sparse_row("lth", s) for s in sparsities])
    (axes,) = figure.axes
    figure.draw_without_rendering()
    assert len(axes.get_xticks()) == 24
    shown = [label for label in axes.get_xticklabels() if label.get_visible()]
    assert 6 < len(shown) < 24
    assert overlapping([label.get_window_extent() for label in shown]) == []


def test_the_reference_is_a_level_in_a_band_across_the_figure():
    dense = {"method": "dense", "accuracy": 0.93, "deviation": 0.02}
    rows = [sparse_row("rigl", s) for s in SPARSITIES]
    (axes,) = plots.accuracy_against_sparsity(rows, reference=dense).axes
    _, level = axes.get_lines()
    assert level.get_xdata().tolist() == list(axes.get_xlim())
    assert set(level.get_ydata()) == {0.93}
    _, band = axes.collections
    corners = band.get_paths()[0].vertices
    np.testing.assert_allclose(np.unique(corners[:, 1]), [0.91, 0.95])
    assert {corners[:, 0].min(), corners[:, 0].max()} == set(axes.get_xlim())
    assert list(names(axes)) == ["rigl", "dense"]
    assert axes.get_ylim()[1] > 0.95


def test_one_seed_and_diverged_methods_can_be_drawn_against_sparsity():
    rows = [sparse_row("one seed", s, deviation=math.nan) for s in SPARSITIES]
    rows += [
        sparse_row("diverges", s, 0.9 if s < 0.9 else math.nan) for s in SPARSITIES
    ]
    rows += [sparse_row("diverged", 0.9, math.nan, math.nan)]
    dense = {"method": "dense", "accuracy": 0.93, "deviation": math.nan}
    figure = plots.accuracy_against_sparsity(rows, reference=dense)
    (axes,) = figure.axes
    assert list(names(axes)) == ["one seed", "diverges", "dense"]
    first, *_ = axes.collections
    assert not any(len(segment) for segment in first.get_segments())
    assert rendered(figure).startswith(b"\x89PNG")


def test_colours_of_methods_do_not_depend_on_the_kind_of_figure():
    methods = [f"method {i}" for i in range(10)]
    rows = [sparse_row(method, s) for s in SPARSITIES for method in methods]
    (sparse,) = plots.accuracy_against_sparsity(rows).axes
    (costs,) = plots.accuracy_against_cost([row(m, 0.5, 1) for m in methods]).axes
    lines = [to_hex(line.get_color()) for line in sparse.get_lines()]
    assert lines == [to_hex(bar.lines[0].get_color()) for bar in costs.containers]
    bars = [to_hex(bar.get_color()[0]) for bar in sparse.collections]
    assert lines == bars
    looks = {(line.get_color(), line.get_linestyle()) for line in sparse.get_lines()}
    assert len(looks) == len(methods)


def test_against_sparsity_there_must_be_rows_with_sparsities():
    with pytest.raises(ValueError, match="expected at least one row"):
        plots.accuracy_against_sparsity([])
    for sparsity in (1.0, -0.1, math.nan):
        rows = [sparse_row("set", 0.5), sparse_row("rigl", sparsity)]
        with pytest.raises(ValueError, match=r"expected a sparsity in \[0, 1\)"):
            plots.accuracy_against_sparsity(rows)


# Masks


def test_weights_have_the_colour_of_the_networks_that_keep_them():
    fast = np.array([[True, True, False], [False, True, False]])
    slow = np.array([[True, False, True], [False, True, False]])
    left, _ = plots.mask_pair(fast, slow, [0, 1], [0.5, 0.4], 0.3).axes
    (image,) = left.get_images()
    black, orange, blue, grey = "#000000", "#e69f00", "#0072b2", "#f4f4f4"
    shown = [
        [to_hex(colour) for colour in line]
        for line in image.to_rgba(image.get_array(), norm=True)
    ]
    assert shown == [[black, orange, blue], [grey, black, grey]]
    legend = left.get_legend()
    entries = {
        text.get_text(): to_hex(patch.get_facecolor())
        for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)
    }
    assert entries == {
        "both 33.3%": black,
        "fast only 16.7%": orange,
        "slow only 16.7%": blue,
        "neither 33.3%": grey,
    }


def test_of_a_large_layer_a_part_is_shown_and_all_of_it_counted():
    fast = np.zeros((100, 300), bool)
    fast[90:] = True
    left, _ = plots.mask_pair(fast, fast, [0], [1.0], 0.1).axes
    (image,) = left.get_images()
    assert image.get_array().shape == (64, 128)
    assert not image.get_array().any()
    assert left.get_xlabel() == "output unit (first 128 of 300)"
    assert left.get_ylabel() == "input unit (first 64 of 100)"
    assert left.get_legend().get_texts()[0].get_text() == "both 10.0%"


@pytest.mark.parametrize("overlap", [[0.3, 0.1], [0.3, 0.4]])
def test_the_overlap_is_drawn_next_to_its_chance_level(overlap):
    masks = np.eye(3, dtype=bool)
    figure = plots.mask_pair(masks, masks, [0, 50], overlap, 0.2)
    _, right = figure.axes
    curve, chance = right.get_lines()
    np.testing.assert_array_equal(
        curve.get_xydata(), [[0, overlap[0]], [50, overlap[1]]]
    )
    assert set(chance.get_ydata()) == {0.2}
    (box,) = names(right).values()
    level = right.transData.transform((0, 0.2))[1]
    assert (box.y0 > level) == (overlap[-1] < 0.2)
    assert right.get_ylim()[0] == 0
    assert right.get_ylim()[1] > max(overlap)
    assert rendered(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("shapes", [((3, 4), (4, 3)), ((2, 2, 2), (2, 2, 2))])
def test_masks_are_matrices_of_one_shape(shapes):
    fast, slow = (np.ones(shape, bool) for shape in shapes)
    with pytest.raises(ValueError, match="two matrices of one shape, got shapes"):
        plots.mask_pair(fast, slow, [0], [1.0], 0.5)


# Ranks


def random_scores(methods=5, comparisons=12, gap=0.3):
    rng = np.random.default_rng(0)
    return {
        f"method{i}": rng.normal(gap * i, 1, comparisons).tolist()
        for i in range(methods)
    }


def test_mean_ranks_are_those_of_a_loop():
    scores = np.round(np.transpose(list(random_scores().values())), 0)  # With ties.
    expected = [
        np.mean(
            [
                1 + np.sum(row > row[m]) + (np.sum(row == row[m]) - 1) / 2
                for row in scores
            ]
        )
        for m in range(scores.shape[1])
    ]
    np.testing.assert_allclose(plots.average_ranks(scores.tolist()), expected)


@pytest.mark.parametrize(
    ("methods", "quantile"),
    [(2, 1.960), (5, 2.728), (10, 3.164)],  # Demsar (2006), table 5.
)
def test_the_critical_difference_is_that_of_the_table(methods, quantile):
    expected = quantile * math.sqrt(methods * (methods + 1) / (6 * 20))
    actual = plots.critical_difference(methods, 20)
    assert actual == pytest.approx(expected, rel=1e-3)


def test_bars_join_what_lies_within_the_critical_difference():
    scores = random_scores(gap=0.8)
    (axes,) = plots.rank_diagram(scores).axes
    ranks = np.sort(plots.average_ranks(np.transpose(list(scores.values())).tolist()))
    apart = plots.critical_difference(5, 12)
    bars = [line.get_xdata() for line in axes.get_lines() if line.get_linewidth() == 3]
    joined = {
        (i, j)
        for first, last in bars
        for i, j in itertools.combinations(range(5), 2)
        if first <= ranks[i] and ranks[j] <= last
    }
    close = {
        (i, j)
        for i, j in itertools.combinations(range(5), 2)
        if ranks[j] - ranks[i] < apart
    }
    assert joined == close
    assert 0 < len(close) < 10


@pytest.mark.parametrize("methods", [2, 5, 28])
def test_every_method_is_named_with_its_rank(methods):
    scores = random_scores(methods)
    (axes,) = plots.rank_diagram(scores).axes
    ranks = plots.average_ranks(np.transpose(list(scores.values())).tolist())
    boxes = names(axes)
    for name, rank in zip(scores, ranks, strict=True):
        assert {f"{name}  {rank:.2f}", f"{rank:.2f}  {name}"} & set(boxes)
    assert not overlapping(boxes.values())


def test_methods_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="at least two methods with as many"):
        plots.rank_diagram({"rigl": [0.5]})
    with pytest.raises(ValueError, match="at least two methods with as many"):
        plots.rank_diagram({"rigl": [0.5], "dense": [0.5, 0.6]})
    with pytest.raises(ValueError, match=r"finite scores of shape \(comparisons, meth"):
        plots.average_ranks([[0.5, math.nan]])
    with pytest.raises(ValueError, match="at least 2 methods, 1 comparison and alpha"):
        plots.critical_difference(1, 5)


# Calibration


def own_bins():
    return {
        "count": [0, 10, 20, 40],
        "confidence": [0, 4.0, 13.0, 36.0],
        "correct": [0, 5, 10, 30],
    }


def test_a_bar_is_the_accuracy_of_a_bin_and_a_dot_its_confidence():
    (axes,) = plots.reliability_diagram({"rigl": own_bins()}).axes
    heights = [patch.get_height() for patch in axes.patches]
    np.testing.assert_allclose(heights, [0.5, 0.5, 0.75])
    np.testing.assert_allclose([p.get_x() for p in axes.patches], [0.25, 0.5, 0.75])
    *_, dots = axes.get_lines()
    np.testing.assert_allclose(dots.get_xdata(), [0.4, 0.65, 0.9])
    np.testing.assert_allclose(dots.get_ydata(), heights)
    alphas = [patch.get_alpha() for patch in axes.patches]
    assert alphas == sorted(alphas)
    assert axes.get_title(loc="left") == f"rigl\nECE {100 * (1 + 3 + 6) / 70:.1f}%"


@pytest.mark.parametrize("methods", [1, pytest.param(4, marks=pytest.mark.slow), 6])
def test_every_method_has_a_panel(methods):
    bins = {f"method{i}": own_bins() for i in range(methods)}
    figure = plots.reliability_diagram(bins)
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left").split("\n")[0] for axes in shown] == list(bins)
    assert rendered(figure).startswith(b"\x89PNG")


def test_bins_without_examples_are_refused():
    with pytest.raises(ValueError, match="bins of at least one method, got none"):
        plots.reliability_diagram({})
    empty = {key: [0, 0] for key in own_bins()}
    with pytest.raises(ValueError, match=r"expected examples .*none of \['rigl'\]"):
        plots.reliability_diagram({"rigl": empty})
