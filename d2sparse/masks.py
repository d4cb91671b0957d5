"""Masks: which weights are live. Selection of the largest scores, and mask algebra.

A mask tree has the structure and the shapes of the parameters and dtype bool on every
leaf; a leaf that is never pruned is all True. Sparsity is the fraction of zeros and
density = 1 - sparsity, both over the prunable leaves unless said otherwise.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2sparse import tree
from d2sparse.tree import Count, Counts, Prunable, PyTree, is_kernel

# Two histograms of 2**16 bins read a score twice. Below this size clearing and summing
# so many bins costs more than reading the scores a third time.
_WIDE_FROM = 1 << 18
_WIDE, _NARROW = (16, 16), (11, 11, 10)


def top_k(scores: PyTree, k: Count) -> PyTree:
    """The k largest scores of all leaves together, as a mask.

    Exactly `min(k, eligible)` entries are kept. Ties go to the lower index, in the
    order of the leaves. An entry whose score is NaN or `-inf` is not eligible: it is
    never kept. Scores are compared as float32.

    Nothing is sorted. The k-th largest score is found digit by digit in the integer
    view of the floats, with one histogram of each leaf per digit; histograms of several
    leaves, or of the shards of one leaf, are added. So `k` may be traced, the function
    may be vmapped over it, and sharded leaves stay where they are.

    Args:
      scores: tree of float[...]; a single array is a tree too.
      k: number of entries to keep, from 0; may be traced.

    Returns:
      A tree of bool[...] like `scores`.

    Raises:
      ValueError: the leaves hold 2**31 entries or more.

    >>> top_k(jnp.array([3.0, 1.0, 2.0, 3.0]), 2).tolist()
    [True, False, False, True]
    """
    leaves, structure = jax.tree.flatten(scores)
    if tree.size(leaves) >= 2**31:
        raise ValueError(
            f"expected fewer than 2**31 scores in one selection, got "
            f"{tree.size(leaves)}; share the budget between leaves with a distribution"
        )
    keys = [_ordered_bits(leaf) for leaf in leaves]
    return jax.tree.unflatten(structure, _largest(keys, jnp.asarray(k, jnp.int32)))


def select(scores: Mapping[str, jax.Array], counts: Counts) -> dict[str, jax.Array]:
    """Masks of the largest scores, in each leaf or over all leaves.

    Args:
      scores: float[...] by path.
      counts: numbers of weights to keep by path, as a distribution returns them; or one
        number, for which all leaves compete.

    Returns:
      bool[...] by path.

    >>> scores = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
    >>> {path: mask.tolist() for path, mask in select(scores, 2).items()}
    {'a': [False, False], 'b': [True, True]}
    >>> {path: mask.tolist() for path, mask in select(scores, {"a": 1, "b": 1}).items()}
    {'a': [False, True], 'b': [False, True]}
    """
    if isinstance(counts, Mapping):
        return {path: top_k(leaf, counts[path]) for path, leaf in scores.items()}
    return top_k(dict(scores), counts)


def dense_masks(params: PyTree) -> PyTree:
    """The mask tree under which every weight is live.

    >>> dense_masks({"bias": jnp.zeros(2)})["bias"].tolist()
    [True, True]
    """
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Parameters with every pruned weight set to exactly 0.

    Args:
      params: tree of parameters, or anything of their structure (gradients, moments).
      masks: tree of bool with the same structure. Where it holds `optax.MaskedNode`, as
        the masks of one branch of `optax.partition` do, the parameters are kept.

    Raises:
      ValueError: the structures or shapes differ.

    >>> apply_masks({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})
    {'w': Array([1., 0.], dtype=float32)}
    """

    def leaf(path: Any, mask: Any, param: Any) -> Any:
        if is_gap(mask):
            return param
        if mask.shape != param.shape:
            raise ValueError(
                f"expected a mask of shape {param.shape} at "
                f"{jax.tree_util.keystr(path, simple=True, separator='/')!r}, got "
                f"{mask.shape}; take the masks from the state of these parameters"
            )
        return jnp.where(mask, param, jnp.zeros_like(param))

    return jax.tree_util.tree_map_with_path(leaf, masks, params, is_leaf=is_gap)


def is_gap(node: Any) -> bool:
    """Whether a node stands where a wrapper such as `optax.partition` hid a leaf.

    >>> is_gap(optax.MaskedNode())
    True
    """
    return isinstance(node, optax.MaskedNode)


def count(masks: PyTree, prunable: Prunable = is_kernel) -> dict[str, jax.Array]:
    """Number of live weights in every prunable leaf, by path.

    >>> {p: int(n) for p, n in count({"kernel": jnp.eye(3, dtype=bool)}).items()}
    {'kernel': 3}
    """
    leaves = tree.flatten(masks)
    return {p: jnp.sum(leaves[p], dtype=jnp.int32) for p in _paths(masks, prunable)}


def density(masks: PyTree, prunable: Prunable = is_kernel) -> jax.Array:
    """Fraction of the prunable weights that is live.

    >>> print(density({"kernel": jnp.eye(4, dtype=bool), "bias": jnp.ones(4, bool)}))
    0.25
    """
    leaves = tree.flatten(masks)
    total = sum(leaves[path].size for path in _paths(masks, prunable))
    live = sum(count(masks, prunable).values(), jnp.zeros((), jnp.int32))
    return live / jnp.float32(total)


def sparsity(masks: PyTree, prunable: Prunable = is_kernel) -> jax.Array:
    """Fraction of the prunable weights that is zero: one minus the density.

    >>> print(sparsity({"kernel": jnp.eye(4, dtype=bool), "bias": jnp.ones(4, bool)}))
    0.75
    """
    return 1 - density(masks, prunable)


def linear_index(shape: tuple[int, ...]) -> jax.Array:
    """Row-major index of every entry, uint32[shape], built without a reshape.

    >>> linear_index((2, 3)).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]))
        index += stride * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index


def _paths(masks: PyTree, prunable: Prunable) -> list[str]:
    # The predicate asks for parameters: show it the shapes with a floating dtype.
    as_params = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, "float32"), masks)
    return list(tree.prunable_leaves(as_params, prunable))


def _ordered_bits(scores: jax.Array) -> jax.Array:
    """uint32 keys that sort as the scores do; 0 for what must never be kept."""
    scores = scores.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    sign = jnp.uint32(1 << 31)  # Alone it is -0.0, which gets the key of 0.0.
    keys = jnp.where(bits > sign, ~bits, bits | sign)
    return jnp.where(scores > -jnp.inf, keys, jnp.uint32(0))


@jax.jit  # An eager cond would be compiled anew at every call.
def _largest(keys: list[jax.Array], k: jax.Array) -> list[jax.Array]:
    """Masks of the k largest keys, ties to the lower index, key 0 never."""
    threshold, missing = _kth_largest(keys, k)
    tied = [key == threshold for key in keys]
    ties = _total(jnp.sum(tie, dtype=jnp.int32) for tie in tied)

    def lowest_indices() -> list[jax.Array]:
        order = jax.tree.map(lambda tie, i: jnp.where(tie, i, 0), tied, _ranks(keys))
        last, _ = _kth_largest(order, missing)
        return jax.tree.map(lambda tie, i: tie & (i >= last), tied, order)

    tied = jax.lax.cond(ties == missing, lambda: tied, lowest_indices)
    valid = jnp.where(k > 0, jnp.uint32(0), ~jnp.uint32(0))
    return jax.tree.map(
        lambda key, tie: ((key > threshold) | tie) & (key > valid), keys, tied
    )


def _ranks(keys: list[jax.Array]) -> list[jax.Array]:
    """Distinct uint32 that are larger the lower the index, through all leaves."""
    sizes = np.array([key.size for key in keys])
    starts = jnp.asarray(np.cumsum(sizes) - sizes, jnp.uint32)
    return [~(linear_index(k.shape) + s) for k, s in zip(keys, starts, strict=True)]


def _kth_largest(keys: list[jax.Array], k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The k-th largest key, and how many of its equals belong to the k largest."""
    total = sum(key.size for key in keys)
    prefix, shift = jnp.uint32(0), 32
    for width in _WIDE if total >= _WIDE_FROM else _NARROW:
        shift -= width
        counts = _total(_histogram(key, prefix, shift, width) for key in keys)
        digit, k = _digit_of_kth(counts, k)
        prefix = (prefix << width) | digit.astype(jnp.uint32)
    return prefix, k


def _total(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _histogram(key: jax.Array, prefix: jax.Array, shift: int, width: int) -> jax.Array:
    """How often each digit occurs, among the keys whose higher digits are `prefix`."""
    bins = 1 << width
    digit = (key >> shift) & jnp.uint32(bins - 1)
    if shift + width < 32:
        digit = jnp.where(key >> (shift + width) == prefix, digit, jnp.uint32(bins))
    return jnp.zeros(bins, jnp.int32).at[digit].add(1, mode="drop")


def _digit_of_kth(counts: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The digit of the k-th largest key, and its rank among the keys with that digit.

    The search goes by blocks of bins: a running sum over 2**16 bins would cost more
    than the histogram of a small leaf.
    """
    blocks = counts.reshape(-1, 1 << (int(counts.size).bit_length() // 2))
    block, k = _bin_of_kth(jnp.sum(blocks, axis=1), k)
    digit, k = _bin_of_kth(blocks[block], k)
    return block * blocks.shape[1] + digit, k


def _bin_of_kth(counts: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    at_least = jnp.cumsum(counts[::-1])[::-1]
    chosen = jnp.maximum(jnp.sum(at_least >= k) - 1, 0)
    return chosen, k - (at_least[chosen] - counts[chosen])
