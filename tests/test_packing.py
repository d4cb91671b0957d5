"""Packed masks against numpy, and compressed weights to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d2sparse import packing
from d2sparse.masks import apply_masks

SHAPES = [(), (1,), (7,), (8,), (9,), (0,), (3, 0, 2), (5, 3), (3, 3, 4, 5)]
DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "int32", "uint8", "bool"]


def draw_masks(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {str(s): jnp.asarray(rng.random(s) < 0.4) for s in shapes}


def bits(array):
    """The bytes of an array, so that NaNs and zeros are compared to the bit."""
    return np.asarray(array).tobytes()


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert bits(a) == bits(b)


@pytest.mark.parametrize("seed", range(3))
def test_pack_is_packbits_and_unpack_its_inverse(seed):
    masks = draw_masks(seed)
    packed = packing.pack(masks)
    for path, mask in masks.items():
        np.testing.assert_array_equal(packed[path], np.packbits(mask))
        assert packed[path].shape == (-(-mask.size // 8),)
    assert_same(packing.unpack(packed, masks), masks)


def test_pack_and_unpack_under_jit_and_vmap():
    masks = jax.tree.map(lambda *m: jnp.stack(m), draw_masks(0), draw_masks(1))
    packed = jax.jit(jax.vmap(packing.pack))(masks)
    for path, mask in masks.items():
        np.testing.assert_array_equal(packed[path][1], np.packbits(mask[1]))
    like = draw_masks(2)
    back = jax.jit(jax.vmap(lambda p: packing.unpack(p, like)))(packed)
    assert_same(back, masks)


def test_shapes_alone_are_enough_to_unpack():
    masks = {"a": {"b": jnp.array([True, False, True])}, "gap": optax.MaskedNode()}
    like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, "float32"), masks)
    assert_same(packing.unpack(packing.pack(masks), like), masks)


@pytest.mark.parametrize(
    ("bits", "shape"),
    [
        (jnp.zeros(3, "uint8"), (5, 2)),
        (jnp.zeros(3, "uint8"), ()),
        (jnp.zeros((1, 2), "uint8"), (5, 2)),
        (jnp.zeros(2, bool), (3, 4)),
    ],
)
def test_bits_that_do_not_fit_are_refused(bits, shape):
    with pytest.raises(ValueError, match="at 'w', the bits of a mask of shape") as info:
        packing.unpack({"w": bits}, {"w": jnp.zeros(shape)})
    assert str(shape) in str(info.value)


def any_bits(rng, shape, dtype):
    """Any pattern of bits: NaNs with payloads, infinities, both zeros."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    raw = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return np.frombuffer(raw.tobytes(), dtype).reshape(shape)


@pytest.mark.parametrize("name", DTYPES)
def test_compressed_weights_come_back_to_the_bit(name):
    rng, dtype, masks = np.random.default_rng(3), jnp.dtype(name), draw_masks(3)
    weights = {p: any_bits(rng, m.shape, dtype) for p, m in masks.items()}
    zero = np.zeros((), dtype)
    params = {p: np.where(m, weights[p], zero).astype(dtype) for p, m in masks.items()}
    sparse = packing.compress(params, masks)
    like = {p: jax.ShapeDtypeStruct(w.shape, dtype) for p, w in params.items()}
    got_params, got_masks = packing.expand(sparse, like)
    assert_same(got_params, params)
    assert_same(got_masks, masks)
    assert_same(packing.expand(sparse, params), (params, masks))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_live_zeros_keep_their_sign_and_nans_their_payload(dtype):
    special = {"float32": [0x7FC00123, 0xFF800001], "bfloat16": [0x7FC1, 0xFF81]}[dtype]
    word = np.uint32 if dtype == "float32" else np.uint16
    nans = np.array(special, word).view(jnp.dtype(dtype))
    params = {"w": np.array([0.0, *nans, -0.0, 0.0], dtype=jnp.dtype(dtype))}
    params["w"].view(word)[1:3] = special
    masks = {"w": np.array([False, True, True, True, True])}
    got, _ = packing.expand(packing.compress(params, masks), params)
    assert got["w"].view(word).tolist() == params["w"].view(word).tolist()


def test_the_values_are_those_of_live_weights_in_row_major_order():
    params = {"w": jnp.array([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]), "b": jnp.zeros(3)}
    masks = {
        "w": jnp.array([[True, False, True], [True, False, True]]),
        "b": jnp.ones(3, bool),
    }
    sparse = packing.compress(params, masks)
    assert sparse.values["w"].tolist() == [1.0, 2.0, 0.0, 3.0]
    assert sparse.values["b"].tolist() == [0.0, 0.0, 0.0]
    assert sparse.masks["w"].tolist() == [0b10110100]
    assert set(sparse.masks) == set(sparse.shapes) == {"w"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_size_is_that_of_live_values_and_bits(dtype):
    masks = draw_masks(4) | {"dense": jnp.ones((6, 5), bool)}
    params = {p: m.astype(dtype) for p, m in masks.items()}
    itemsize = jnp.dtype(dtype).itemsize
    expected = 0
    for mask in masks.values():
        expected += int(mask.sum()) * itemsize
        expected += 0 if mask.all() else -(-mask.size // 8)
    assert packing.nbytes(packing.compress(params, masks)) == expected


def test_nothing_is_shared_with_what_was_compressed():
    params = {"w": np.ones(4, np.float32)}
    sparse = packing.compress(params, {"w": np.ones(4, bool)})
    params["w"][:] = 7
    got, _ = packing.expand(sparse, params)
    got["w"][0] = 5
    assert sparse.values["w"].tolist() == [1, 1, 1, 1]


def test_leaves_hidden_by_a_partition_are_stored_whole():
    params = {"w": jnp.array([1.0, 0.0]), "b": jnp.array([0.0, 2.0])}
    masks = {"w": jnp.array([True, False]), "b": optax.MaskedNode()}
    sparse = packing.compress(params, masks)
    assert set(sparse.masks) == {"w"}
    got, dense = packing.expand(sparse, params)
    assert_same(got, jax.tree.map(np.asarray, params))
    assert dense["b"].tolist() == [True, True]


@pytest.mark.parametrize("value", [1.0, np.nan, 1e-40, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pruned_weight_that_would_be_lost_is_refused(value, dtype):
    params = {"w": jnp.array([1.0, value], dtype)}
    masks = {"w": jnp.array([True, False])}
    with pytest.raises(ValueError, match="pruned weights to be 0 at 'w', got 1 that"):
        packing.compress(params, masks)
    packing.compress(apply_masks(params, masks), masks)


def test_a_pruned_zero_has_no_sign():
    params = {"w": np.float32([1, -0.0])}
    sparse = packing.compress(params, {"w": np.array([True, False])})
    assert bits(packing.expand(sparse, params)[0]["w"]) == bits(np.float32([1, 0]))


def test_masks_of_other_parameters_are_refused():
    params = {"w": jnp.zeros((2, 3))}
    with pytest.raises(ValueError, match="expected a mask of shape \\(2, 3\\) at 'w'"):
        packing.compress(params, {"w": jnp.ones((3, 2), bool)})
    message = r"got none for \['w'\] and unknown ones for \['v'\]"
    with pytest.raises(ValueError, match=message):
        packing.compress(params, {"v": jnp.ones((2, 3), bool)})
    with pytest.raises(ValueError, match=message):
        packing.unpack({"v": jnp.zeros(1, jnp.uint8)}, params)


def test_only_masks_are_packed():
    with pytest.raises(ValueError, match="mask of bool at 'w', got float32"):
        packing.pack({"w": jnp.zeros((2, 3))})


SPARSE = packing.compress(
    {"w": jnp.eye(4), "b": jnp.ones((2, 3))},
    {"w": jnp.eye(4, dtype=bool), "b": jnp.ones((2, 3), bool)},
)
LIKE = {"w": jnp.zeros((4, 4)), "b": jnp.zeros((2, 3))}


@pytest.mark.parametrize(
    ("path", "leaf", "message"),
    [
        ("w", jnp.zeros((8, 2)), "float32\\[8, 2\\] at 'w', got float32\\[4, 4\\]; pa"),
        ("w", jnp.zeros((5, 4)), "float32\\[5, 4\\] at 'w', got float32\\[4, 4\\]; pa"),
        ("b", jnp.zeros((3, 2)), "float32\\[3, 2\\] at 'b', got float32\\[2, 3\\]; pa"),
        ("w", jnp.zeros((4, 4), "bfloat16"), "bfloat16\\[4, 4\\] at 'w', got float32"),
        ("b", jnp.zeros((2, 3), "int32"), "int32\\[2, 3\\] at 'b', got float32"),
        ("head", jnp.zeros(2), "expected the leaves \\['b', 'head', 'w'\\], got \\['b"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(path, leaf, message):
    with pytest.raises(ValueError, match=message):
        packing.expand(SPARSE, {**LIKE, path: leaf})
    packing.expand(SPARSE, LIKE)


def test_a_leaf_that_the_model_lacks_is_refused():
    with pytest.raises(
        ValueError, match="expected the leaves \\['w'\\], got \\['b', 'w"
    ):
        packing.expand(SPARSE, {"w": LIKE["w"]})


@pytest.mark.parametrize(
    ("field", "array", "message"),
    [
        ("values", np.ones(5, np.float32), "expected 4 values at 'w', as many as its"),
        ("masks", np.ones(3, np.uint8), "expected uint8\\[2\\] at 'w', the bits of a"),
        ("masks", np.ones(2, np.int8), "expected uint8\\[2\\] at 'w', .*, got int8"),
    ],
)
def test_counts_that_contradict_each_other_are_refused(field, array, message):
    broken = SPARSE._replace(**{field: {**getattr(SPARSE, field), "w": array}})
    with pytest.raises(ValueError, match=message):
        packing.expand(broken, LIKE)
