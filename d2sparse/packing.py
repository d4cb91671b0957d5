"""Packing: masks as bits, and sparse weights as their live values.

`pack` and `unpack` run on the device and under `jax.jit`; `compress` and `expand` run
on the host, since the number of live weights is a shape.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import tree
from d2sparse.masks import apply_masks, refuse_other_paths
from d2sparse.tree import PyTree


def pack(masks: PyTree) -> PyTree:
    """Masks with one bit per weight, an eighth of their size in memory.

    The entries of a leaf are read in row-major order, the first one into the highest
    bit, as `numpy.packbits` does.

    Args:
      masks: tree of bool[...].

    Returns:
      The same tree of uint8[ceil(size / 8)].

    Raises:
      ValueError: a leaf is neither of bool nor of integers.

    >>> pack({"w": jnp.array([[True, False], [False, True]])})
    {'w': Array([144], dtype=uint8)}
    """

    def leaf(path: str, mask: jax.Array) -> jax.Array:
        if not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)):
            raise ValueError(
                f"expected a mask of bool at {path!r}, got {mask.dtype}; pass masks "
                "such as `params != 0`, or `compress` the weights themselves"
            )
        return jnp.packbits(jnp.ravel(mask))

    return tree.map_with_path(leaf, masks)


def unpack(packed: PyTree, like: PyTree) -> PyTree:
    """The masks that were packed.

    Args:
      packed: what `pack` returned.
      like: parameters, masks or `jax.ShapeDtypeStruct`s, for their shapes.

    Returns:
      Tree of bool with the structure and the shapes of `like`.

    Raises:
      ValueError: the structures differ, or a leaf has bits for another number of
        weights.

    >>> masks = {"w": jnp.array([[True, False], [False, True]])}
    >>> unpack(pack(masks), like=masks)["w"].tolist()
    [[True, False], [False, True]]
    """

    def leaf(path: Any, model: Any, bits: jax.Array) -> jax.Array:
        _check_bits(tree.path_name(path), bits, model.shape)
        flat = jnp.unpackbits(bits, count=math.prod(model.shape))
        return flat.astype(bool).reshape(model.shape)

    refuse_other_paths(packed, like)
    return jax.tree_util.tree_map_with_path(leaf, like, packed)


class SparseTree(NamedTuple):
    """Sparse parameters without their zeros, by path, as numpy arrays.

    Attributes:
      values: the live weights of every leaf in row-major order, [live]; a leaf that is
        live throughout is stored whole, [...].
      masks: uint8[ceil(size / 8)], packed as by `pack`, of the other leaves.
      shapes: int64[dimensions] of the leaves in `masks`. Bits alone do not tell a
        kernel from its transpose.
    """

    values: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    shapes: dict[str, np.ndarray]


def compress(params: PyTree, masks: PyTree) -> SparseTree:
    """Live values and packed masks of sparse parameters.

    Args:
      params: parameters that are 0 wherever their masks are False.
      masks: tree of bool like the parameters. A leaf where it holds
        `optax.MaskedNode` is live throughout.

    Raises:
      ValueError: the structures or shapes differ, or a pruned weight is not 0.

    >>> params = {"w": jnp.array([[0.5, 0.0], [0.0, -2.0]]), "b": jnp.zeros(2)}
    >>> masks = {"w": jnp.eye(2, dtype=bool), "b": jnp.ones(2, bool)}
    >>> sparse = compress(params, masks)
    >>> {path: values.tolist() for path, values in sparse.values.items()}
    {'b': [0.0, 0.0], 'w': [0.5, -2.0]}
    >>> sparse.masks
    {'w': array([144], dtype=uint8)}
    """
    jax.eval_shape(apply_masks, params, masks)  # Complains where they do not fit.
    leaves, live = tree.flatten(params), tree.flatten(masks)
    sparse = SparseTree({}, {}, {})
    for path, leaf in leaves.items():
        weights = np.asarray(leaf)
        mask = np.asarray(live.get(path, True), bool)
        if mask.all():
            sparse.values[path] = weights.copy()
            continue
        _check_pruned(path, weights[~mask])
        sparse.values[path] = weights[mask]
        sparse.masks[path] = np.packbits(mask)
        sparse.shapes[path] = np.array(mask.shape, np.int64)
    return sparse


def expand(sparse: SparseTree, like: PyTree) -> tuple[PyTree, PyTree]:
    """The parameters and masks that were compressed, to the bit.

    NaNs keep their payload and live zeros their sign; a pruned weight is +0.

    Args:
      sparse: what `compress` returned.
      like: parameters or `jax.ShapeDtypeStruct`s of the model they belong to.

    Returns:
      `(params, masks)` with the structure, shapes and types of `like`, as numpy arrays,
      to be put on devices as you like.

    Raises:
      ValueError: a leaf is missing, unknown, or of another shape or type.

    >>> params = {"w": jnp.array([0.5, 0.0, -2.0])}
    >>> sparse = compress(params, {"w": params["w"] != 0})
    >>> params, masks = expand(sparse, {"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
    >>> params["w"].tolist(), masks["w"].tolist()
    ([0.5, 0.0, -2.0], [True, False, True])
    """
    model = tree.flatten(like)
    if set(sparse.values) != set(model):
        raise ValueError(
            f"expected the leaves {sorted(model)}, got {sorted(sparse.values)}; pass "
            "the parameters of the model that was compressed"
        )
    leaves = {path: _expand_leaf(sparse, path, leaf) for path, leaf in model.items()}
    params = tree.replace(like, {path: params for path, (params, _) in leaves.items()})
    masks = tree.replace(like, {path: mask for path, (_, mask) in leaves.items()})
    return params, masks


def nbytes(sparse: SparseTree) -> int:
    """Bytes of the compressed form: of the live values, and of the bits of the masks.

    With `n` weights of `b` bytes at density `d` that is `d * n * b + n / 8`, so that
    float32 is smaller than dense from a sparsity of 1/32 on. The shapes do not count.

    >>> nbytes(compress({"w": jnp.array([0.5, 0.0])}, {"w": jnp.array([True, False])}))
    5
    """
    return sum(x.nbytes for x in [*sparse.values.values(), *sparse.masks.values()])


def _check_bits(path: str, bits: Any, shape: tuple[int, ...]) -> None:
    expected = (-(-math.prod(shape) // 8),)
    if bits.shape != expected or bits.dtype != jnp.uint8:
        raise ValueError(
            f"expected uint8{list(expected)} at {path!r}, the bits of a mask of shape "
            f"{shape}, got {bits.dtype}{list(bits.shape)}; pass the parameters of the "
            "model whose masks were packed"
        )


def _check_pruned(path: str, pruned: np.ndarray) -> None:
    count = np.count_nonzero(pruned)
    if count:
        raise ValueError(
            f"expected pruned weights to be 0 at {path!r}, got {count} that are not "
            "and would be lost; compress `apply_masks(params, masks)`"
        )


def _expand_leaf(
    sparse: SparseTree, path: str, like: Any
) -> tuple[np.ndarray, np.ndarray]:
    values = sparse.values[path]
    masked = path in sparse.masks
    shape = tuple(sparse.shapes[path].tolist()) if masked else values.shape
    if shape != like.shape or values.dtype != like.dtype:
        raise ValueError(
            f"expected {like.dtype}{list(like.shape)} at {path!r}, got {values.dtype}"
            f"{list(shape)}; pass the parameters of the model that was compressed"
        )
    if not masked:
        return values.copy(), np.ones(shape, bool)
    bits = sparse.masks[path]
    _check_bits(path, bits, shape)
    mask = np.unpackbits(bits, count=math.prod(shape)).astype(bool).reshape(shape)
    params = np.zeros(shape, values.dtype)
    if values.shape != (mask.sum(),):
        raise ValueError(
            f"expected {mask.sum()} values at {path!r}, as many as its mask of shape "
            f"{shape} has live, got {list(values.shape)}; compress the model again"
        )
    params[mask] = values
    return params, mask
