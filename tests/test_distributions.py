"""Budgets: exact totals, and shares against loops and the published algorithms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sparse import distributions, models, tree
from d2sparse.distributions import er, erk, explicit, global_, uniform

LAYERED = [uniform, er, erk]
SPARSITIES = [0.0, 0.1, 0.5, 0.731, 0.9, 0.98, 0.999]
LENET = {"dense1": (784, 300), "dense2": (300, 100), "head": (100, 10)}
# A parameter tree of a convolutional network, with leaves that saturate.
CONVNET = {
    "stem": (3, 3, 1, 16),
    "conv1": (3, 3, 16, 32),
    "conv2": (3, 3, 32, 64),
    "mix": (1, 1, 64, 8),
    "head": (64, 10),
}


def random_shapes(seed):
    rng = np.random.default_rng(seed)
    ranks = rng.integers(1, 5, size=rng.integers(1, 8))
    return {
        f"leaf{i}": tuple(int(n) for n in rng.integers(1, 14, size=rank))
        for i, rank in enumerate(ranks)
    }


# Sparsities of the layers of ResNet-50 by ERK at 90 %, in percent, by the shape of the
# kernel: published with STR (Kusupati et al., arXiv 2002.03231) in
# budgets/SparsityDistributions_90_ResNet50.csv of github.com/RAIVNLab/STR.
PUBLISHED = {
    (7, 7, 3, 64): 58,
    (1, 1, 64, 64): 0,
    (3, 3, 64, 64): 82,
    (1, 1, 64, 256): 4,
    (1, 1, 256, 64): 4,
    (1, 1, 256, 128): 43,
    (3, 3, 128, 128): 91,
    (1, 1, 128, 512): 52,
    (1, 1, 512, 128): 52,
    (1, 1, 256, 512): 71,
    (1, 1, 512, 256): 71,
    (3, 3, 256, 256): 96,
    (1, 1, 256, 1024): 76,
    (1, 1, 1024, 256): 76,
    (1, 1, 512, 1024): 86,
    (1, 1, 1024, 512): 86,
    (3, 3, 512, 512): 98,
    (1, 1, 512, 2048): 88,
    (1, 1, 2048, 512): 88,
    (1, 1, 1024, 2048): 93,
    (2048, 1000): 93,
}
TABLES = [
    ({"mix": 0.0}, uniform),
    ({"conv1": 0.9, "head": 0.25}, erk),
    ({"conv*": 0.8, "conv1": 0.1, "stem": 0.3}, er),
    ({"stem": 1.0, "mix": 0.35}, erk),
    ({"conv2": 0.95, "*": 0.5}, erk),
    ({}, erk),
]
SHAPES = [LENET, CONVNET, *(random_shapes(seed) for seed in range(25))]


def sizes(shapes):
    return {path: math.prod(shape) for path, shape in shapes.items()}


def densities_of_rigl(shapes, sparsity, axes_that_count):
    """RigL's published algorithm: while a density exceeds 1, keep that leaf dense."""
    raw = {}
    for path, shape in shapes.items():
        axes = axes_that_count(shape)
        raw[path] = sum(axes) / math.prod(axes)
    dense = set()
    while len(dense) < len(shapes):
        budget, divisor = 0.0, 0.0
        for path, size in sizes(shapes).items():
            if path in dense:
                budget -= size * sparsity
            else:
                budget += size * (1 - sparsity)
                divisor += raw[path] * size
        scale = budget / divisor
        largest = max(raw[path] for path in shapes if path not in dense)
        if scale * largest <= 1:
            break
        dense |= {path for path in shapes if raw[path] == largest}
    return {path: 1.0 if path in dense else scale * raw[path] for path in shapes}


def expected_densities(distribution, shapes, sparsity):
    if distribution is uniform:
        return dict.fromkeys(shapes, 1 - sparsity)
    axes = {er: lambda shape: shape[-2:], erk: lambda shape: shape}[distribution]
    return densities_of_rigl(shapes, sparsity, axes)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("distribution", LAYERED)
def test_totals_are_exact_and_each_leaf_is_within_one_of_its_share(
    distribution, sparsity
):
    for shapes in SHAPES:
        counts = distribution(shapes, sparsity)
        n = sum(sizes(shapes).values())
        total = round((1 - sparsity) * n)
        assert list(counts) == list(shapes)
        assert sum(counts.values()) == total
        density = expected_densities(distribution, shapes, 1 - total / n)
        shares = {path: density[path] * size for path, size in sizes(shapes).items()}
        # The largest leaf gives what leaves need whose share rounds to nothing.
        lifted = sum(counts[path] == 1 and share < 1 for path, share in shares.items())
        largest = max(shares, key=shares.get)
        for path, size in sizes(shapes).items():
            assert 0 <= counts[path] <= size
            given = lifted if shares[path] > shares[largest] - 1 else 0
            assert abs(counts[path] - shares[path]) < 1 + given + 1e-6
        if total >= len(shapes):
            assert min(counts.values()) >= 1


@functools.cache
def compiled(distribution, case):
    """Counts of one case for many sparsities, which are traced."""
    return jax.jit(jax.vmap(lambda sparsity: distribution(SHAPES[case], sparsity)))


@pytest.mark.parametrize(
    "distribution", [uniform, pytest.param(er, marks=pytest.mark.slow), erk]
)
def test_traced_sparsities_keep_the_total(distribution):
    sparsities = np.float32(SPARSITIES)
    for case in range(6):
        shapes = SHAPES[case]
        counts = compiled(distribution, case)(sparsities)
        n = sum(sizes(shapes).values())
        totals = np.round((1 - sparsities) * np.float32(n))
        np.testing.assert_array_equal(sum(counts.values()), totals)
        for row, sparsity in enumerate(SPARSITIES):
            known = distribution(shapes, sparsity)
            for path, size in sizes(shapes).items():
                assert 0 <= counts[path][row] <= size
                assert abs(counts[path][row] - known[path]) <= 1


def test_the_global_budget_is_one_number():
    for shapes in SHAPES:
        n = sum(sizes(shapes).values())
        for sparsity in SPARSITIES:
            assert global_(shapes, sparsity) == round((1 - sparsity) * n)
    kept = jax.jit(lambda sparsity: global_(LENET, sparsity))(0.75)
    assert kept.dtype == jnp.int32
    assert kept == 66550


@pytest.mark.parametrize("distribution", LAYERED)
def test_a_jax_number_that_is_not_traced_will_do(distribution):
    assert sum(distribution(CONVNET, jnp.float32(0.75)).values()) == 6084
    assert sum(distribution(CONVNET, np.float64(0.75)).values()) == 6084


def test_largest_remainder_by_hand():
    # Ideals 1.5, 1.5, 2: two floors of 1 leave one weight, for the first remainder.
    shapes = {"a": (3,), "b": (3,), "c": (4,)}
    assert list(uniform(shapes, 0.5).values()) == [2, 1, 2]
    # Ideals 0.9, 2.1, 1.2, 1.8: the floors leave two, for remainders 0.9 and 0.8.
    shapes = {"a": (3,), "b": (7,), "c": (4,), "d": (6,)}
    assert list(uniform(shapes, 0.7).values()) == [1, 2, 1, 2]


def test_densities_by_hand():
    # Of (4, 4) and (16, 16) the weights are 1/2 and 1/8: 0.25 * 272 = 68 are kept, the
    # scale is 68 / (8 + 32), the densities 0.85 and 0.2125, the counts 13.6 and 54.4.
    expected = {"a": 14, "b": 54}
    assert er({"a": (4, 4), "b": (16, 16)}, 0.75) == expected
    assert erk({"a": (4, 4), "b": (16, 16)}, 0.75) == expected


def test_leaves_saturate_and_the_others_share_the_rest():
    counts = erk(CONVNET, 0.5)
    dense = {path for path, size in sizes(CONVNET).items() if counts[path] == size}
    assert dense == {"stem", "mix", "head"}
    assert sum(counts.values()) == round(0.5 * sum(sizes(CONVNET).values()))


@pytest.mark.parametrize("distribution", LAYERED)
def test_a_dense_network_stays_dense(distribution):
    for shapes in SHAPES:
        assert distribution(shapes, 0.0) == sizes(shapes)
        assert distribution(shapes, 0) == sizes(shapes)


@pytest.mark.parametrize("distribution", LAYERED)
def test_shares_fall_with_sparsity_up_to_the_rounding(distribution):
    for shapes in SHAPES[:8]:
        rows = [distribution(shapes, s) for s in np.linspace(0, 0.99, 60)]
        counts = np.array([list(row.values()) for row in rows])
        assert np.all(np.diff(counts.sum(axis=1)) <= 0)
        assert np.all(np.diff(counts, axis=0) <= 1)


@pytest.mark.parametrize("distribution", [global_, *LAYERED])
@pytest.mark.parametrize("sparsity", [1.0, -0.1, 90, math.nan, jnp.float32(1.0)])
def test_sparsities_outside_of_0_to_1_are_refused(distribution, sparsity):
    with pytest.raises(ValueError, match=r"expected a sparsity in \[0, 1\), .* got"):
        distribution(LENET, sparsity)


def test_more_weights_than_an_int32_counts():
    shapes = {"table": (50_000, 40_000), "more": (50_000, 20_000)}
    assert uniform(shapes, 0.1) == {"table": 1_800_000_000, "more": 900_000_000}
    assert global_(shapes, 0.1) == 2_700_000_000


def test_hand_out_equals_a_loop():
    rng = np.random.default_rng(0)
    jitted = jax.jit(distributions.hand_out)
    for _ in range(40):
        limits = rng.integers(0, 9, size=5)
        counts = rng.integers(0, limits + 1)
        change = int(rng.integers(-counts.sum(), (limits - counts).sum() + 1))
        expected = counts.copy()
        for _ in range(abs(change)):
            room = limits > expected if change > 0 else expected > 0
            expected[np.argmax(room)] += np.sign(change)
        np.testing.assert_array_equal(jitted(change, counts, limits), expected)
        by_numpy = distributions.hand_out(change, counts, limits, np)
        np.testing.assert_array_equal(by_numpy, expected)


@functools.cache
def resnet50_shapes():
    model = models.resnet50(num_classes=1000, stem="imagenet")
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params, _ = jax.eval_shape(model.init, jax.random.key(0), x)
    return tree.shapes(params)


def layer_table(shapes, sparsity):
    """Densities of RigL's formula; where one exceeds 1 the leaf is dense, and again."""
    dense = set()
    while True:
        budget = (1 - sparsity) * sum(sizes(shapes).values())
        shares = {}
        for path, shape in shapes.items():
            *kernel, n_in, n_out = shape
            if path in dense:
                budget -= math.prod(shape)
            else:
                shares[path] = (n_in + n_out + sum(kernel)) / math.prod(shape)
        eps = budget / sum(shares[path] * math.prod(shapes[path]) for path in shares)
        above = {path for path in shares if eps * shares[path] > 1}
        if not above:
            return {path: eps * shares.get(path, 1 / eps) for path in shapes}
        dense |= above


@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
def test_the_layer_table_of_resnet50_is_that_of_the_formula(sparsity):
    shapes = resnet50_shapes()
    assert len(shapes) == 54
    counts = erk(shapes, sparsity)
    assert sum(counts.values()) == round((1 - sparsity) * 25_502_912)
    for path, density in layer_table(shapes, sparsity).items():
        assert abs(counts[path] - density * math.prod(shapes[path])) <= 1


def test_the_layer_table_of_resnet50_is_the_published_one():
    shapes = resnet50_shapes()
    counts = erk(shapes, 0.9)
    assert set(shapes.values()) == set(PUBLISHED)
    for path, shape in shapes.items():
        sparsity = 1 - counts[path] / math.prod(shape)
        assert round(100 * sparsity) == PUBLISHED[shape]


@pytest.mark.parametrize("distribution", LAYERED)
def test_scalars_and_leaves_without_entries_take_their_share(distribution):
    shapes = {"scale": (), "none": (0,), "kernel": (4, 4), "gap": (3, 0), "bias": (5,)}
    for sparsity in (0.0, 0.3, 0.5, 0.96):
        counts = distribution(shapes, sparsity)
        assert sum(counts.values()) == round((1 - sparsity) * 22)
        assert counts["none"] == counts["gap"] == 0
    assert distribution({"none": (0, 3)}, 0.5) == {"none": 0}


@pytest.mark.parametrize("distribution", [global_, *LAYERED, explicit({"*": 0.9})])
def test_a_traced_sparsity_of_too_many_weights_is_refused(distribution):
    with pytest.raises(
        ValueError, match=r"fewer than 2\*\*31 weights .* got 2500000000"
    ):
        distribution({"table": (50_000, 50_000)}, jnp.float32(0.9))
    kept = distribution({"table": (50_000, 50_000)}, 0.1)
    assert (kept if distribution is global_ else kept["table"]) == 2_250_000_000


def named_by(table, shapes):
    """Sparsity of the first pattern of every leaf that has one, for plain globs."""
    named = {}
    for path in shapes:
        for pattern, sparsity in reversed(table.items()):
            if pattern == path or (
                pattern[-1] == "*" and path.startswith(pattern[:-1])
            ):
                named[path] = sparsity
    return named


@pytest.mark.parametrize("sparsity", SPARSITIES[:4])
@pytest.mark.parametrize(("table", "rest"), TABLES)
def test_a_table_is_met_and_the_others_share_what_remains(table, rest, sparsity):
    counts = explicit(table, rest)(CONVNET, sparsity)
    size, named = sizes(CONVNET), named_by(table, CONVNET)
    zeros = sum(size.values()) - round((1 - sparsity) * sum(size.values()))
    assert list(counts) == list(CONVNET)
    assert sum(size[path] - counts[path] for path in CONVNET) == zeros
    by_table = {path: round(size[path] * s) for path, s in named.items()}
    scale = min(1, zeros / max(1, sum(by_table.values())))
    for path, n in by_table.items():
        tolerance = 0 if scale == 1 else 1 - 1e-9
        assert abs(size[path] - counts[path] - scale * n) <= tolerance
    others = {path: CONVNET[path] for path in CONVNET if path not in named}
    if others:
        left = zeros - sum(size[path] - counts[path] for path in named)
        shares = rest(others, left / sum(sizes(others).values()))
        assert {path: counts[path] for path in others} == shares


def test_a_table_by_hand():
    shapes = {"a/w": (10, 10), "a/v": (10, 10), "b": (20, 10)}
    distribution = explicit({"a/*": 0.9}, uniform)
    # 200 zeros: 90 and 90 by the table, 20 are left for the other leaf.
    assert distribution(shapes, 0.5) == {"a/w": 10, "a/v": 10, "b": 180}
    # 180 zeros are those of the table; of 60 each takes a half, of 81 one takes more.
    assert distribution(shapes, 0.45) == {"a/w": 10, "a/v": 10, "b": 200}
    assert distribution(shapes, 0.15) == {"a/w": 70, "a/v": 70, "b": 200}
    assert distribution(shapes, 81 / 400) == {"a/w": 59, "a/v": 60, "b": 200}
    assert distribution(shapes, 0.0) == {"a/w": 100, "a/v": 100, "b": 200}
    # The last weight of the others goes at 380 zeros.
    assert distribution(shapes, 379 / 400) == {"a/w": 10, "a/v": 10, "b": 1}
    assert distribution(shapes, 380 / 400) == {"a/w": 10, "a/v": 10, "b": 0}


def test_the_first_pattern_that_matches_counts():
    shapes = {"block1/w": (10, 10), "block2/w": (10, 10), "Block1/w": (20, 10)}
    first = explicit({"block1/*": 0.2, "block?/w": 0.6})(shapes, 0.5)
    assert (first["block1/w"], first["block2/w"]) == (80, 40)
    first = explicit({"block?/w": 0.6, "block1/*": 0.2})(shapes, 0.5)
    assert (first["block1/w"], first["block2/w"], first["Block1/w"]) == (40, 40, 120)


def test_a_schedule_moves_each_leaf_little_by_little_to_the_table():
    table = {"conv1": 0.9, "conv2": 0.8, "head": 0.5}
    end = explicit(table)(CONVNET, 0.81)
    for path, sparsity in table.items():
        size = math.prod(CONVNET[path])
        assert end[path] == size - round(sparsity * size)
    rows = [explicit(table)(CONVNET, s) for s in np.linspace(0, 0.81, 200)]
    counts = np.array([list(row.values()) for row in rows])
    assert rows[0] == sizes(CONVNET)
    assert np.all(np.diff(counts, axis=0) <= 1)
    # The total falls by 99 a step: no leaf falls faster, up to the rounding.
    assert np.all(np.diff(counts, axis=0) >= -101)


def test_a_table_of_all_leaves_reaches_its_own_sparsity():
    for shapes in SHAPES:
        n = sum(sizes(shapes).values())
        for sparsity in (0.5, 0.7, 0.731, 0.9):
            counts = explicit({"*": sparsity})(shapes, sparsity)
            assert sum(counts.values()) == round((1 - sparsity) * n)
            for path, size in sizes(shapes).items():
                # Half a weight by the rounding of the table, one by that of the total.
                assert abs(counts[path] - (1 - sparsity) * size) <= 1.5


@pytest.mark.parametrize(("table", "rest"), TABLES[1:5])
def test_traced_sparsities_meet_the_table_too(table, rest):
    distribution = explicit(table, rest)
    sparsities = np.float32(SPARSITIES[:4])
    counts = jax.jit(jax.vmap(lambda s: distribution(CONVNET, s)))(sparsities)
    n = sum(sizes(CONVNET).values())
    totals = np.round((1 - sparsities) * np.float32(n))
    np.testing.assert_array_equal(sum(counts.values()), totals)
    for row, sparsity in enumerate(sparsities):
        known = distribution(CONVNET, float(sparsity))
        for path in CONVNET:
            assert counts[path].dtype == jnp.int32
            assert abs(counts[path][row] - known[path]) <= 1


def test_totals_are_exact_in_float32_too():
    shapes = resnet50_shapes()
    distribution = explicit({"stage4*": 0.95, "head/*": 0.8}, rest=erk)
    counts = jax.jit(lambda s: distribution(shapes, s))(0.9)
    total = jax.jit(lambda s: global_(shapes, s))(0.9)
    assert sum(int(n) for n in counts.values()) == total
    # The total in float32 asks for a zero more than the table has.
    shapes = {"w": (5000, 5000)}
    kept = jax.jit(lambda s: explicit({"w": 0.6})(shapes, s))(0.6)["w"]
    assert kept == jax.jit(lambda s: global_(shapes, s))(0.6) == 9_999_999


def test_a_sparsity_beyond_the_table_is_refused():
    shapes = {"a": (10, 10), "b": (10, 10), "c": (20, 10)}
    distribution = explicit({"a": 0.5, "b": 0.2})
    assert distribution(shapes, 0.675) == {"a": 50, "b": 80, "c": 0}
    message = (
        r"at most 0\.675, got 0\.7, which takes 10 more weights than there are: "
        r"\['a', 'b'\] are at their sparsities in the table and \['c'\] are empty"
    )
    for sparsity in (0.7, jnp.float32(0.7), np.float64(0.7)):
        with pytest.raises(ValueError, match=message):
            distribution(shapes, sparsity)
    with pytest.raises(
        ValueError, match=r"at most 0\.4, got 0\.9, .* 200 more weights"
    ):
        explicit({"*": 0.4})(shapes, 0.9)
    # Where it is traced, all goes that may.
    counts = jax.jit(lambda sparsity: distribution(shapes, sparsity))(0.9)
    assert counts == {"a": 50, "b": 80, "c": 0}


def test_a_table_that_does_not_fit_is_refused():
    for value in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"in \[0, 1\], .* got .* for 'head'"):
            explicit({"head": value})
    message = r"match a prunable leaf, got 'Head'; the prunable leaves are \['conv1',"
    with pytest.raises(ValueError, match=message):
        explicit({"head": 0.5, "Head": 0.5})(CONVNET, 0.5)
    with pytest.raises(
        ValueError, match="expected `rest` to return a number for every"
    ):
        explicit({"head": 0.5}, rest=global_)(CONVNET, 0.5)
    with pytest.raises(ValueError, match=r"expected a sparsity in \[0, 1\), .* got"):
        explicit({"head": 0.5})(CONVNET, 1.0)


def test_heads_and_features_of_attention_are_one_axis():
    heads = {"query": (32, 4, 8), "key": (32, 4, 8), "value": (32, 4, 8)}
    heads = {f"a/{name}/kernel": shape for name, shape in heads.items()}
    shapes = {**heads, "a/out/kernel": (4, 8, 32), "mlp": (32, 64)}
    flat = dict.fromkeys(shapes, (32, 32)) | {"mlp": (32, 64)}
    for distribution in (er, erk):
        assert distribution(shapes, 0.8) == distribution(flat, 0.8)
    # A convolution over one axis has three axes too.
    assert erk({"out": (4, 8, 32), "b": (64, 64)}, 0.8) != erk(
        {"out": (32, 32), "b": (64, 64)}, 0.8
    )


def test_erdos_renyi_knows_the_layout_of_equinox():
    ours, theirs = {"conv/kernel": (3, 3, 8, 16)}, {"conv/weight": (16, 8, 3, 3)}
    dense = {"head": (16, 64)}
    expected = [int(n) for n in er({**ours, **dense}, 0.8).values()]
    assert [int(n) for n in er({**theirs, **dense}, 0.8).values()] == expected
