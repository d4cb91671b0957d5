"""Selection against a plain sort in numpy, and the algebra of masks against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from d2sparse import masks
from d2sparse.masks import layout, search, selection, top_k

TREES = {
    "leaves": [(7, 5), (11,), (), (0, 3), (2, 3, 4)],
    "large": [(300, 40), (7,), (2, 7106)],
}
SPECIAL = [np.nan, np.inf, -np.inf, -0.0, 0.0, 1.0, -1.0, 1e-40, -1e-40, 3e38, -3e38]
SELECT = jax.jit(top_k)


def expected_top_k(leaves, k):
    """The definition: sort what is eligible by score, and by index where they tie."""
    flat = np.concatenate([np.ravel(leaf).astype(np.float32) for leaf in leaves])
    eligible = np.flatnonzero(flat > -np.inf)
    order = np.argsort(-flat[eligible], kind="stable")
    kept = np.zeros(flat.size, bool)
    kept[eligible[order[:k]]] = True
    ends = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]
    parts = np.split(kept, ends)
    return [part.reshape(np.shape(x)) for part, x in zip(parts, leaves, strict=True)]


def assert_selects(leaves, k, select=SELECT):
    for got, expected in zip(select(leaves, k), expected_top_k(leaves, k), strict=True):
        np.testing.assert_array_equal(got, expected)


def draw(rng, kind, shape):
    if kind == "distinct":
        return rng.permutation(np.prod(shape, dtype=int)).reshape(shape) - np.float32(9)
    if kind == "ties":
        return np.round(rng.normal(size=shape), 1).astype(np.float32)
    if kind == "special":
        return rng.choice(np.float32(SPECIAL), shape)
    return np.full(shape, 0.5, np.float32)


@pytest.fixture(scope="module", params=[1, 8])
def select(request):
    """`top_k`, compiled as on one device and as on several."""

    def traced(leaves, k):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "device_count", lambda: request.param)
            # Not the compiled function, which may have been traced the other way.
            patch.setattr(selection, "largest", search.largest.__wrapped__)
            return top_k(leaves, k)

    return jax.jit(traced)


@pytest.mark.parametrize("kind", ["distinct", "ties", "special", "constant"])
@pytest.mark.parametrize("name", TREES)
def test_top_k_equals_a_sort(select, name, kind):
    rng = np.random.default_rng(0)
    for _ in range(4):
        leaves = [draw(rng, kind, shape) for shape in TREES[name]]
        n = sum(leaf.size for leaf in leaves)
        eligible = sum(int(np.sum(leaf > -np.inf)) for leaf in leaves)
        for k in {0, 1, eligible - 1, eligible, eligible + 1, n, n + 5, n // 3}:
            assert_selects(leaves, k, select)


def test_among_bools_the_first_of_the_eligible_are_kept(select):
    leaves = [np.array([True, False, True]), np.array([[True], [False], [True]])]
    scores = [np.where(leaf, np.float32(0), -np.inf) for leaf in leaves]
    for k in range(7):
        expected = expected_top_k(scores, k)
        for got, mask in zip(select(leaves, k), expected, strict=True):
            np.testing.assert_array_equal(got, mask)


def test_top_k_orders_every_number_of_16_bits():
    rng = np.random.default_rng(2)
    patterns = [rng.permutation(2**16).astype(np.uint16) for _ in range(2)]
    leaves = [patterns[0].view(jnp.bfloat16), patterns[1].view(jnp.float16)]
    for k in (1, 1000, 63000, 80000, 2**17):
        assert_selects(leaves, k)


def test_top_k_takes_integers_and_a_single_array():
    kept = top_k(jnp.array([3, -1, 7, 3, 0, 3]), 3)
    assert kept.tolist() == [True, False, True, True, False, False]


def test_top_k_is_the_same_compiled_or_not():
    # XLA may drop the addition of a zero and flush denormal numbers when it compiles.
    scores = np.float32([-0.0, 0.0, 1e-40, -1e-40, -0.0, 2e-40])
    for k in range(7):
        assert_selects([scores], k, top_k)
        assert_selects([scores], k, SELECT)


def test_top_k_under_vmap_over_scores_and_over_k():
    rng = np.random.default_rng(3)
    scores = np.stack([draw(rng, "special", (6, 7)) for _ in range(5)])
    ks = np.array([0, 3, 20, 42, 11])
    together = jax.jit(jax.vmap(top_k))(scores, ks)
    swept = jax.jit(jax.vmap(top_k, in_axes=(None, 0)))(scores[0], ks)
    for i, k in enumerate(ks):
        np.testing.assert_array_equal(together[i], expected_top_k([scores[i]], k)[0])
        np.testing.assert_array_equal(swept[i], expected_top_k([scores[0]], k)[0])


def test_top_k_refuses_more_scores_than_it_can_count():
    def shape_of_masks(*shape):
        return jax.eval_shape(top_k, jax.ShapeDtypeStruct(shape, jnp.float32), 1)

    assert shape_of_masks(2**31 - 1).shape == (2**31 - 1,)
    with pytest.raises(ValueError, match="expected fewer than 2\\*\\*31 scores"):
        shape_of_masks(2**16, 2**15)


def spread(array, spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.device_put(array, NamedSharding(mesh, spec))


def gathers(compiled):
    moves = ("all-gather", "all-to-all", "collective-permute")
    return any(move in compiled.as_text() for move in moves)


@pytest.mark.parametrize(
    ("shapes", "specs"),
    [
        ([(64, 40), (30, 64), (5,)], [P("data", None), P(None, "data"), P()]),
        pytest.param([(512, 512)], [P(None, "data")], marks=pytest.mark.slow),
    ],
)
def test_top_k_leaves_shards_where_they_are(shapes, specs):
    rng = np.random.default_rng(4)
    leaves = [draw(rng, "ties", shape) for shape in shapes]
    sharded = [spread(leaf, spec) for leaf, spec in zip(leaves, specs, strict=True)]
    compiled = SELECT.lower(sharded, 700).compile()
    assert not gathers(compiled)
    assert "all-reduce" in compiled.as_text()
    for k in (0, 1, 700, 2000):
        assert_selects(leaves, k, lambda _, k: compiled(sharded, k))
    for mask, leaf in zip(compiled(sharded, 700), sharded, strict=True):
        assert mask.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def test_a_selection_that_gathers_is_noticed():
    sort = jax.jit(lambda x: jnp.sort(x.ravel()))
    assert gathers(sort.lower(spread(jnp.zeros((64, 40)), P("data", None))).compile())


def test_select_in_each_leaf_or_over_all_of_them():
    rng = np.random.default_rng(5)
    scores = {path: draw(rng, "ties", (6,)) for path in ("b", "a/kernel")}
    by_leaf = masks.select(scores, {"a/kernel": 3, "b": np.int32(6)})
    together = masks.select(scores, jnp.asarray(5))
    assert by_leaf.keys() == together.keys() == scores.keys()
    for path, count in (("a/kernel", 3), ("b", 6)):
        (expected,) = expected_top_k([scores[path]], count)
        np.testing.assert_array_equal(by_leaf[path], expected)
    first, second = expected_top_k([scores["b"], scores["a/kernel"]], 5)
    np.testing.assert_array_equal(together["b"], first)
    np.testing.assert_array_equal(together["a/kernel"], second)
    # Ties between leaves go to the leaf that is named first.
    alike = masks.select({"b": np.ones(6), "a/kernel": np.ones(6)}, 8)
    assert alike["b"].all()
    assert alike["a/kernel"].tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("kind", ["ties", "special", "constant"])
def test_select_searches_leaves_of_any_count_at_once(kind):
    rng = np.random.default_rng(9)
    shapes = {"a": (3, 5), "b": (21,), "c": (2, 2, 4), "d": (1,)}
    select = jax.jit(masks.select)
    for _ in range(10):
        scores = {path: draw(rng, kind, shape) for path, shape in shapes.items()}
        counts = {
            path: int(rng.integers(0, leaf.size + 3)) for path, leaf in scores.items()
        }
        kept = select(scores, counts)
        for path, leaf in scores.items():
            (expected,) = expected_top_k([leaf], counts[path])
            np.testing.assert_array_equal(kept[path], expected)


def test_ties_go_to_random_entries_by_a_key():
    scores = {
        "a": jnp.array([[2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, -jnp.inf]]),
        "b": jnp.ones((2, 4)),
    }
    counts = {"a": 3, "b": 2}
    drawn = jax.jit(jax.vmap(lambda key: masks.select(scores, counts, key)))(
        jax.random.split(jax.random.key(0), 2000)
    )
    for path, count in counts.items():
        np.testing.assert_array_equal(jnp.sum(drawn[path], axis=(1, 2)), count)
    # The deviation of a frequency is at most sqrt(0.4 * 0.6 / 2000) = 0.011.
    frequencies = {path: mask.mean(axis=0) for path, mask in drawn.items()}
    expected = [[1.0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.0, 0.0]]
    np.testing.assert_allclose(frequencies["a"], expected, atol=0.055)
    np.testing.assert_allclose(frequencies["b"], 0.25, atol=0.055)


def test_ties_of_all_leaves_together_go_to_random_entries_by_a_key():
    scores = {"a": jnp.ones(10), "b": jnp.ones(30)}
    kept = [masks.select(scores, 20, jax.random.key(seed)) for seed in range(40)]
    assert {int(mask["a"].sum() + mask["b"].sum()) for mask in kept} == {20}
    # The deviation of the mean is sqrt(20 * 1/4 * 3/4 * 20/39 / 40) = 0.22.
    assert abs(np.mean([mask["a"].sum() for mask in kept]) - 5) < 1.1


def test_dense_masks_are_true_on_every_leaf():
    params = {"w": jnp.zeros((2, 3), jnp.bfloat16), "n": [jnp.zeros((), jnp.int32)]}
    dense = masks.dense_masks(params)
    assert jax.tree.structure(dense) == jax.tree.structure(params)
    for mask, leaf in zip(jax.tree.leaves(dense), jax.tree.leaves(params), strict=True):
        assert mask.dtype == bool
        assert mask.shape == leaf.shape
        assert mask.all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_apply_masks_sets_zeros_and_keeps_the_bits_of_the_rest(dtype):
    param = jnp.asarray([[1.5, -2.0], [3.0, 0.1]], dtype)
    mask = jnp.array([[True, False], [False, True]])
    masked = jax.jit(masks.apply_masks)({"w": param}, {"w": mask})["w"]
    assert masked.dtype == dtype
    assert masked[0, 1] == 0 == masked[1, 0]
    assert (masked[0, 0], masked[1, 1]) == (param[0, 0], param[1, 1])


def test_apply_masks_removes_what_is_not_a_number():
    params = {"w": jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1.0])}
    masked = masks.apply_masks(params, {"w": jnp.array([False, False, False, True])})
    assert masked["w"].tolist() == [0.0, 0.0, 0.0, 1.0]


def test_apply_masks_passes_over_what_partition_hides():
    params = {"w": jnp.ones(2), "rest": {"b": jnp.ones(3)}}
    hidden = {"w": jnp.array([True, False]), "rest": optax.MaskedNode()}
    assert masks.apply_masks(params, hidden)["rest"] is params["rest"]
    assert masks.apply_masks(params, hidden)["w"].tolist() == [1.0, 0.0]
    assert masks.is_gap(hidden["rest"])
    assert not masks.is_gap(hidden["w"])


def test_masks_that_do_not_fit_are_refused():
    params = {"dense": {"w": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match=r"shape \(2, 3\) at 'dense/w', got \(3,\)"):
        masks.apply_masks(params, {"dense": {"w": jnp.ones(3, bool)}})
    mask = jnp.ones((2, 3), bool)
    for other in ({"dense": {}}, {"dense": {"v": mask}}, {}, {"dense": mask}, [mask]):
        message = r"got none for \['dense/w'\] and unknown ones for"
        with pytest.raises(ValueError, match=message):
            masks.apply_masks(params, other)
        with pytest.raises(ValueError, match=message):
            masks.copy_masks(other, params)
    both = {"dense": {"w": mask, "v": mask}}
    with pytest.raises(
        ValueError, match=r"for \[\] and unknown ones for \['dense/v'\]"
    ):
        masks.copy_masks(both, params)


def test_counts_density_and_sparsity_of_the_prunable_leaves():
    rng = np.random.default_rng(6)
    tree = {
        "conv": {"kernel": rng.random((3, 3, 2, 4)) < 0.3, "bias": np.ones(4, bool)},
        "head": {"kernel": rng.random((4, 5)) < 0.5},
    }
    kernels = {f"{name}/kernel": layer["kernel"] for name, layer in tree.items()}
    live = {path: int(kernel.sum()) for path, kernel in kernels.items()}
    counted = jax.jit(masks.count)(tree)
    assert {path: int(n) for path, n in counted.items()} == live
    density = sum(live.values()) / (72 + 20)
    np.testing.assert_allclose(jax.jit(masks.density)(tree), density, rtol=1e-6)
    np.testing.assert_allclose(masks.sparsity(tree), 1 - density, rtol=1e-6)


def test_density_by_a_predicate_and_at_the_ends():
    tree = {"w": jnp.zeros((2, 2), bool), "b": jnp.ones(4, bool)}
    assert masks.density(tree) == 0
    assert masks.sparsity(tree) == 1
    assert masks.density(tree, prunable=lambda path, leaf: path == "b") == 1
    assert masks.density(tree, prunable=lambda path, leaf: True) == 0.5
    with pytest.raises(ValueError, match="at least one prunable leaf"):
        masks.density({"b": jnp.ones(4, bool)})


def test_density_over_runs_by_vmap():
    runs = {"w": np.random.default_rng(7).random((5, 4, 6)) < 0.4}
    densities = jax.vmap(masks.density)(runs)
    np.testing.assert_allclose(densities, runs["w"].mean(axis=(1, 2)), rtol=1e-6)


def test_density_passes_over_what_partition_hides():
    tree = {"w": jnp.eye(2, dtype=bool), "rest": optax.MaskedNode()}
    assert masks.density(tree) == 0.5


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (1, 5, 1)])
def test_linear_index_is_row_major(shape):
    expected = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    index = layout.linear_index(shape)
    assert index.dtype == jnp.uint32
    np.testing.assert_array_equal(index, expected)
