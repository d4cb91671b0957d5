"""Patterns against loops over their groups in numpy: budgets, ties, NaN and -inf."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sparse import masks
from d2sparse.distributions import erk, global_, uniform
from d2sparse.masks import blocks, channels, n_of_m

SHAPES = {"conv": (3, 3, 4, 8), "head": (12, 4)}
SPARSITIES = np.float32([0.0, 0.3, 0.5, 0.8, 0.97])
DISTRIBUTIONS = [uniform, erk, global_]
LOWEST = np.finfo(np.float32).min  # What rules make of NaN.


def blocks_of(shape, rows, columns):
    """Index of every block of the last two axes, in row-major order."""
    corners = itertools.product(
        *(range(n) for n in shape[:-2]),
        range(0, shape[-2], rows),
        range(0, shape[-1], columns),
    )
    return [(*at, slice(i, i + rows), slice(j, j + columns)) for *at, i, j in corners]


def channels_of(shape, axis):
    axis %= len(shape)
    return [(slice(None),) * axis + (slice(i, i + 1),) for i in range(shape[axis])]


def neighbours_of(shape, m, axis):
    """Index of every group of m entries along an axis."""
    axis %= len(shape)
    starts = [range(0, n, m if a == axis else 1) for a, n in enumerate(shape)]
    return [
        (*at[:axis], slice(at[axis], at[axis] + m), *at[axis + 1 :])
        for at in itertools.product(*starts)
    ]


def order_of(values):
    """Indices by falling value, without those that are NaN or -inf; stable."""
    values = np.asarray(values, np.float32)
    eligible = np.flatnonzero(values > -np.inf)
    return eligible[np.argsort(-values[eligible], kind="stable")]


def mean_score(entries):
    entries = entries.astype(np.float64)
    if not np.any(entries > -np.inf):
        return -np.inf
    mean = np.mean(np.where(entries > -np.inf, entries, 0))
    return np.clip(mean, LOWEST, np.inf)


def half_up(count, step):
    """The nearest number of steps, but none only where none is asked for."""
    return max(int((2 * int(count) + step) // (2 * step)), int(count > 0))


def lift_the_best(values, paths):
    """Values in which the best group of every leaf stands before all others."""
    values = values.copy()
    for path in set(paths):
        own = [g for g in order_of(values) if paths[g] == path]
        values[own[:1]] = np.inf
    return values


def expected_whole(groups_of, scores, counts):
    """The definition of whole groups, from the indices of those of every leaf."""
    groups = [(p, i) for p, x in scores.items() for i in groups_of(x.shape)]
    values = np.array([mean_score(scores[path][i]) for path, i in groups])
    sizes = np.array([scores[path][i].size for path, i in groups])
    kept = {path: np.zeros(score.shape, bool) for path, score in scores.items()}
    if isinstance(counts, dict):
        left = {
            path: half_up(counts[path], scores[path][groups_of(x.shape)[0]].size)
            for path, x in scores.items()
        }
    else:
        values = lift_the_best(values, [path for path, _ in groups])
    spent, begun = 0, set()
    for g in order_of(values):
        path, i = groups[g]
        if isinstance(counts, dict):
            chosen, left[path] = left[path] > 0, left[path] - 1
        else:
            chosen = counts and (spent < counts or path not in begun)
            spent += sizes[g]
            begun.add(path)
        kept[path][i] = chosen
    return {path: kept[path] & (score > -np.inf) for path, score in scores.items()}


def expected_n_of_m(m, axis, scores, counts):
    if not isinstance(counts, dict):
        flat = np.concatenate([score.ravel() for score in scores.values()])
        top = np.isin(np.arange(flat.size), order_of(flat)[:counts])
        parts = np.split(top, np.cumsum([score.size for score in scores.values()]))
        counts = {
            p: max(x.sum(), counts > 0) for p, x in zip(scores, parts, strict=False)
        }
    kept = {path: np.zeros(score.shape, bool) for path, score in scores.items()}
    for path, score in scores.items():
        n = half_up(counts[path], score.size // m)
        for i in neighbours_of(score.shape, m, axis):
            kept[path][i] = np.isin(np.arange(m), order_of(score[i])[:n])
    return kept


def whole(groups_of, *args):
    return functools.partial(expected_whole, lambda shape: groups_of(shape, *args))


PATTERNS = {
    "2 of 4 inputs": (n_of_m(4), functools.partial(expected_n_of_m, 4, -2)),
    "n of 2 outputs": (n_of_m(2, axis=-1), functools.partial(expected_n_of_m, 2, -1)),
    "blocks": (blocks((2, 4)), whole(blocks_of, 2, 4)),
    "channels": (channels(0), whole(channels_of, 0)),
}


def draw(rng, kind, shape):
    """Scores whose sums are exact, or as in blocks of 8 the sums of their eighths."""
    size = int(np.prod(shape))
    if kind == "distinct":
        return rng.permutation(size).reshape(shape).astype(np.float32) - 9
    if kind == "ties":
        return rng.integers(0, 3, shape).astype(np.float32)
    special = np.float32([np.nan, -np.inf, -np.inf, np.inf, -1, 0, 1, 2, 3, 4])
    return rng.choice(special, shape)


@functools.cache
def compiled(name):
    """Masks for many counts, which are traced."""
    return jax.jit(jax.vmap(PATTERNS[name][0], in_axes=(None, 0)))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_equal_a_loop_over_their_groups(name, distribution):
    rng = np.random.default_rng(0)
    rows = [distribution(SHAPES, sparsity) for sparsity in SPARSITIES]
    counts = jax.tree.map(lambda *numbers: np.array(numbers), *rows)
    for kind in ("distinct", "ties", "special"):
        scores = {path: draw(rng, kind, shape) for path, shape in SHAPES.items()}
        kept = jax.device_get(compiled(name)(scores, counts))
        for row, given in enumerate(rows):
            for path, mask in PATTERNS[name][1](scores, given).items():
                assert kept[path].dtype == bool
                np.testing.assert_array_equal(kept[path][row], mask)


@pytest.mark.parametrize(
    ("name", "distribution"),
    [
        ("2 of 4 inputs", erk),
        pytest.param("blocks", global_, marks=pytest.mark.slow),
    ],
)
def test_a_sparsity_is_swept_by_vmap(name, distribution):
    rng = np.random.default_rng(1)
    scores = {path: draw(rng, "ties", shape) for path, shape in SHAPES.items()}
    selection, expected = PATTERNS[name]

    @jax.jit
    @jax.vmap
    def sweep(sparsity):
        return selection(scores, distribution(SHAPES, sparsity), None)

    kept = sweep(np.float32([0.25, 0.5, 0.75]))
    for row, sparsity in enumerate([0.25, 0.5, 0.75]):
        given = distribution(SHAPES, sparsity)
        for path, mask in expected(scores, given).items():
            np.testing.assert_array_equal(kept[path][row], mask)


def test_patterns_outside_of_a_compiled_function():
    rng = np.random.default_rng(1)
    scores = {path: draw(rng, "ties", shape) for path, shape in SHAPES.items()}
    selection, expected = PATTERNS["n of 2 outputs"]
    for given in (uniform(SHAPES, 0.4), 250, np.int64(220)):
        kept = selection(scores, given)
        for path, mask in expected(scores, given).items():
            np.testing.assert_array_equal(kept[path], mask)


def test_half_sparsity_under_uniform_is_2_of_4():
    rng = np.random.default_rng(2)
    scores = {path: draw(rng, "distinct", shape) for path, shape in SHAPES.items()}
    kept = n_of_m(4)(scores, uniform(SHAPES, 0.5), None)
    for path, shape in SHAPES.items():
        groups = [kept[path][i].sum() for i in neighbours_of(shape, 4, -2)]
        assert groups == [2] * (kept[path].size // 4)


def test_divisible_counts_are_exact():
    shapes = {"a": (8, 8), "b": (2, 4, 8)}
    rng = np.random.default_rng(3)
    scores = {path: rng.normal(size=shape) for path, shape in shapes.items()}
    kept = blocks((2, 4))(scores, uniform(shapes, 0.5), None)
    assert {path: int(mask.sum()) for path, mask in kept.items()} == {"a": 32, "b": 32}


def test_counts_are_rounded_half_up_to_whole_groups():
    scores = {"w": np.arange(32, dtype=np.float32).reshape(8, 4)}
    for pattern in (blocks((2, 4)), n_of_m(4)):
        # As a selection, it never rounds to nothing what it cannot look at.
        select = jax.jit(lambda n, f=pattern: f(scores, {"w": n}))
        for count, blocks_kept in [(0, 0), (3, 0), (4, 1), (11, 1), (12, 2), (32, 4)]:
            kept = pattern.choose(scores, {"w": jnp.int32(count)}, None)
            assert kept["w"].sum() == 8 * blocks_kept
            kept = select(count)
            assert kept["w"].sum() == 8 * max(blocks_kept, count > 0)
    # Rounding must not overflow where a leaf has nearly 2**31 weights.
    half = 2**31 - 2**26
    mask = jax.eval_shape(
        lambda x: channels()({"w": x}, {"w": jnp.int32(half)}),
        jax.ShapeDtypeStruct((2**20, 2**10), jnp.float32),
    )
    assert mask["w"].shape == (2**20, 2**10)


def test_scores_as_low_as_a_float_goes_stay_eligible():
    low = {"w": np.full((27, 9), LOWEST), "v": np.full((27, 3), -np.inf)}
    low["w"][:, 4] = LOWEST / 2
    for selection in (channels(), blocks((27, 1))):
        kept = selection(low, {"w": 243, "v": 81}, None)
        assert kept["w"].all()
        assert not kept["v"].any()
        assert selection(low, 400, None)["w"].all()
    first = channels()(low, {"w": 27, "v": 0}, None)["w"]
    assert np.flatnonzero(first.all(axis=0)).tolist() == [4]


def test_large_scores_do_not_overflow_and_small_ones_do_not_vanish():
    high = np.full((4, 3), 2e38, np.float32) * np.float32([[1.0, 1.5, 1.25]])
    low = np.full((4, 3), 2e-38, np.float32) * np.float32([[1.0, 1.5, 1.25]])
    select = jax.jit(lambda scores: channels()(scores, {"w": 8}, None))
    for scores in (high, low):
        kept = select({"w": scores})["w"]
        assert kept.all(axis=0).tolist() == [False, True, True]


def test_a_dead_weight_stays_dead_in_a_live_block():
    scores = np.full((4, 4), 1.0, np.float32)
    scores[0, 0], scores[2:, 2:] = -np.inf, -np.inf
    kept = blocks((2, 2))({"w": scores}, {"w": 16}, None)["w"]
    np.testing.assert_array_equal(kept, scores > -np.inf)
    # The other blocks have the larger mean.
    kept = blocks((2, 2))({"w": scores}, {"w": 8}, None)["w"]
    assert not kept[:2, :2].any()


def drawn(selection, scores, counts, number=200):
    keys = jax.random.split(jax.random.key(0), number)
    return jax.jit(jax.vmap(lambda key: selection(scores, counts, key)))(keys)


@pytest.mark.parametrize(
    ("selection", "groups", "counts"),
    [
        (blocks((2, 2)), blocks_of((4, 8), 2, 2), {"a": 8, "b": 8}),
        (channels(), channels_of((4, 8), -1), 16),
    ],
)
def test_ties_go_to_random_whole_groups_by_a_key(selection, groups, counts):
    scores = {"a": jnp.ones((4, 8)), "b": jnp.ones((4, 8))}
    kept = drawn(selection, scores, counts)
    live = np.stack([kept[p][:, *i].reshape(200, 4) for p in kept for i in groups])
    assert np.all(live.all(axis=2) == live.any(axis=2))
    np.testing.assert_array_equal(live.all(axis=2).sum(axis=0), 4)
    # The deviation of a frequency is sqrt(1/4 * 3/4 / 200) = 0.031.
    np.testing.assert_allclose(live.all(axis=2).mean(axis=1), 0.25, atol=0.13)
    if isinstance(counts, dict):
        assert np.any(kept["a"] != kept["b"])


@pytest.mark.parametrize(
    "counts", [{"a": 16, "b": 16}, pytest.param(32, marks=pytest.mark.slow)]
)
def test_ties_inside_a_group_go_to_random_weights_by_a_key(counts):
    scores = {"a": jnp.ones((4, 8)), "b": jnp.ones((2, 4, 4))}
    kept = drawn(n_of_m(4), scores, counts)
    share = {"a": kept["a"].sum(axis=(1, 2)), "b": kept["b"].sum(axis=(1, 2, 3))}
    if isinstance(counts, dict):
        assert set(share["a"].tolist()) == set(share["b"].tolist()) == {16}
        pairs = kept["a"][:, :, 0] @ jnp.array([8, 4, 2, 1])
        values, times = np.unique(pairs, return_counts=True)
        assert values.tolist() == [3, 5, 6, 9, 10, 12]
        np.testing.assert_allclose(times / 200, 1 / 6, atol=0.11)
    np.testing.assert_allclose(kept["a"].mean(axis=0), 0.5, atol=0.15)
    np.testing.assert_allclose(kept["b"].mean(axis=0), 0.5, atol=0.15)
    without_key = n_of_m(4)(scores, {"a": 16, "b": 16}, None)
    assert without_key["a"][:, 3].tolist() == [True, True, False, False]


def test_larger_scores_win_before_ties_are_drawn():
    scores = {"w": jnp.array([[2.0], [1.0], [1.0], [1.0]])}
    kept = drawn(n_of_m(4), scores, {"w": 2})["w"][:, :, 0]
    np.testing.assert_allclose(kept.mean(axis=0), [1, 1 / 3, 1 / 3, 1 / 3], atol=0.14)


def expected_by_size(scores, sizes, count):
    flat = np.concatenate([score.ravel() for score in scores.values()])
    size = np.concatenate([np.full(x.size, sizes[p]) for p, x in scores.items()])
    order = order_of(flat)
    before = np.cumsum(size[order]) - size[order]
    kept = np.zeros(flat.size, bool)
    kept[order[before < count]] = True
    parts = np.split(kept, np.cumsum([score.size for score in scores.values()]))
    return {p: x.reshape(scores[p].shape) for p, x in zip(scores, parts, strict=False)}


# So few entries that the counts of three thresholds share an integer, and more.
@pytest.mark.parametrize("shape", [(7, 5), (1 << 10, 2)])
def test_select_counts_an_entry_as_its_size(shape):
    rng = np.random.default_rng(5)
    scores = {"a": draw(rng, "special", shape), "b": draw(rng, "ties", (11,))}
    sizes = {"a": 5, "b": 36}
    select = jax.jit(lambda count: masks.select(scores, count, None, sizes))
    total = sum(sizes[path] * score.size for path, score in scores.items())
    for count in (0, 1, 37, total // 2, total):
        kept = select(count)
        for path, mask in expected_by_size(scores, sizes, count).items():
            np.testing.assert_array_equal(kept[path], mask)


def test_select_counts_entries_as_their_size_in_each_leaf_too():
    scores = {"a": jnp.ones((7, 5)), "b": jnp.arange(11.0)}
    kept = masks.select(scores, {"a": 23, "b": 73}, None, {"a": 5, "b": 36})
    assert {path: int(mask.sum()) for path, mask in kept.items()} == {"a": 5, "b": 3}


def test_select_refuses_more_weights_than_it_can_count():
    scores = {"w": jnp.zeros(2**11)}
    with pytest.raises(ValueError, match="expected fewer than 2\\*\\*31 scores"):
        masks.select(scores, 1, None, {"w": 2**20})


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (
            n_of_m(4),
            r"axis -2 divisible by 4, got shape \(27, 64\) at 'conv1/kernel'; "
            "choose another axis or leave this leaf dense with `prunable`",
        ),
        (n_of_m(5, axis=1), r"axis 1 divisible by 5, got shape \(27, 64\) at 'conv1"),
        (n_of_m(1, axis=2), r"axis 2 divisible by 1, got shape \(27, 64\) at 'conv1"),
        (blocks(), r"divisible by 32 and 32, got shape \(27, 64\) at 'conv1/kernel'"),
        (blocks((9, 48)), r"divisible by 9 and 48, got shape \(27, 64\) at 'conv1"),
        (channels(2), r"needs axis 2, got shape \(27, 64\) at 'conv1/kernel'"),
    ],
)
def test_leaves_that_a_pattern_does_not_fit_are_named(selection, message):
    scores = {"conv1/kernel": jnp.ones((27, 64))}
    for counts in ({"conv1/kernel": 64}, 64):
        with pytest.raises(ValueError, match=message):
            selection(scores, counts, None)


@pytest.mark.parametrize("selection", [n_of_m(4), blocks((1, 1)), channels(-3)])
def test_a_leaf_of_too_few_axes_is_named(selection):
    with pytest.raises(ValueError, match=r"got shape \(4,\) at 'bias'"):
        selection({"bias": jnp.ones(4)}, {"bias": 4}, None)


def test_leaves_that_would_die_are_named():
    scores = {"a": np.ones((4, 4)), "b": np.ones((4, 8)), "c": np.ones((4, 2))}
    counts = {"a": 1, "b": np.int64(3), "c": 2}
    message = (
        r"got 1 weights at 'a' \(the fewest it can keep are 4, sparsity 0.75\), "
        r"3 weights at 'b' \(the fewest it can keep are 8, sparsity 0.75\); lower"
    )
    with pytest.raises(ValueError, match=message):
        n_of_m(4)(scores, counts, None)
    with pytest.raises(ValueError, match=r"1 weights at 'a' .* are 16, sparsity 0\)"):
        blocks((4, 4))({"a": scores["a"]}, {"a": 1}, None)
    with pytest.raises(ValueError, match=r"3 weights at 'b' .* are 8, .* leave"):
        channels(0)(scores, {"a": 2, "b": 3, "c": 2}, None)
    # Known are the numbers of JAX too, outside of compiled functions.
    of_jax = {path: jnp.int32(n) for path, n in counts.items()}
    with pytest.raises(ValueError, match=message):
        n_of_m(4)(scores, of_jax, None)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: n_of_m(4)(scores, of_jax, None))
    # No weight at all may be asked for.
    assert not n_of_m(4)(scores, dict.fromkeys(scores, 0), None)["b"].any()
    assert not blocks((4, 2))(scores, 0, None)["b"].any()


@pytest.mark.parametrize("name", PATTERNS)
def test_one_budget_that_is_less_than_a_step_of_every_leaf_is_refused(name):
    pattern, expected = PATTERNS[name]
    scores = {p: draw(np.random.default_rng(4), "ties", s) for p, s in SHAPES.items()}
    fewest = sum(pattern.step(path, shape) for path, shape in SHAPES.items())
    message = f"expected at least {fewest} weights for the leaves .*, got {fewest - 1}"
    for count in (fewest - 1, jnp.int32(fewest - 1)):
        with pytest.raises(ValueError, match=message):
            pattern(scores, count)
    kept = compiled(name)(scores, np.array([0, fewest, 1, 1, 1]))
    for row, count in enumerate((0, fewest)):
        for path, mask in expected(scores, count).items():
            np.testing.assert_array_equal(kept[path][row], mask)
    # Where it is traced, every leaf keeps what it must and no more.
    assert {path: int(mask[2].sum()) for path, mask in kept.items()} == {
        path: pattern.step(path, shape) for path, shape in SHAPES.items()
    }


def test_sizes_of_patterns_are_positive():
    for m in (0, 2.5, "2:4", None):
        with pytest.raises(ValueError, match="of at least 1 as `m`, got"):
            n_of_m(m)
    with pytest.raises(ValueError, match="at least 1 as `columns of a block`, got 0"):
        blocks((4, 0))
    with pytest.raises(ValueError, match=r"a shape such as \(32, 32\), got 4"):
        blocks(4)
    with pytest.raises(ValueError, match="of at least -9 as `axis`, got 'out'"):
        channels("out")
