"""Selection of the largest scores, without sorting."""

import collections
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.masks.layout import linear_index, pieces
from d2sparse.tree import Count, Counts, PyTree

# Digits of the scores, in bits. Wide ones read the scores twice instead of three times,
# which pays where there are more scores than bins to clear and sum.
_WIDE, _NARROW = 16, 11
_WIDE_FROM = 1 << 18
# Scores counted at once where they are counted in pieces: their temporaries stay in the
# second-level cache.
_PIECE = 1 << 16


def top_k(scores: PyTree, k: Count) -> PyTree:
    """The k largest scores of all leaves together, as a mask.

    Exactly `min(k, eligible)` entries are kept. Ties go to the lower index, in the
    order of the leaves. An entry whose score is NaN or `-inf` is not eligible: it is
    never kept. Scores are compared as float32.

    Nothing is sorted: the k-th largest score is found digit by digit in the integer
    view of the floats, by histograms. Those of several leaves, or of the shards of one,
    are added. So `k` may be traced, the function may be vmapped over it, and sharded
    leaves stay where they are (on a mesh whose axes are of type `AxisType.Auto`).

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
    kept = _largest(leaves, (0,) * len(leaves), jnp.asarray(k, jnp.int32)[None], None)
    return jax.tree.unflatten(structure, kept)


def select(
    scores: Mapping[str, jax.Array], counts: Counts, key: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Masks of the largest scores, in each leaf or over all leaves.

    Args:
      scores: float[...] by path.
      counts: numbers of weights to keep by path, as a distribution returns them; or one
        number, for which all leaves compete.
      key: random key of the order in which ties are broken; if not given, they go to
        the lower index.

    Returns:
      bool[...] by path.

    >>> scores = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
    >>> {path: mask.tolist() for path, mask in select(scores, 2).items()}
    {'a': [False, False], 'b': [True, True]}
    >>> {path: mask.tolist() for path, mask in select(scores, {"a": 1, "b": 1}).items()}
    {'a': [False, True], 'b': [False, True]}
    """
    if isinstance(counts, Mapping):
        groups = tuple(range(len(scores)))
        wanted = jnp.stack([jnp.asarray(counts[path], jnp.int32) for path in scores])
    else:
        groups = (0,) * len(scores)
        wanted = jnp.asarray(counts, jnp.int32)[None]
    salts = None if key is None else jax.random.bits(key, wanted.shape)
    kept = _largest(list(scores.values()), groups, wanted, salts)
    return dict(zip(scores, kept, strict=True))


class _Leaf(NamedTuple):
    """Scores to select from.

    Attributes:
      keys: uint32[pieces, ...] that sort as the scores do; 0 is never kept.
      start: the index of the first of them among all that compete.
      group: those of a group compete for one budget.
      salt: uint32[] that ties are shuffled by; None leaves them to the lower index.
    """

    keys: jax.Array
    start: int
    group: int
    salt: jax.Array | None


class _Cut(NamedTuple):
    """Where the kept entries of every group end, as far as the search has come.

    Kept are keys above `key`, and among those equal to it ranks from `rank` on.

    Attributes:
      digit: int32[], how many digits are known: first those of the key, then those of
        the rank, which breaks ties.
      key: uint32[groups].
      rank: uint32[groups].
      wanted: int32[groups], how many entries to keep of those that share all known
        digits with the cut.
      found: int32[groups], how many of them there are.
    """

    digit: jax.Array
    key: jax.Array
    rank: jax.Array
    wanted: jax.Array
    found: jax.Array


# Outside of a compiled function the loop would be compiled at every call.
@functools.partial(jax.jit, static_argnames="groups")
def _largest(
    scores: list[jax.Array],
    groups: tuple[int, ...],
    k: jax.Array,
    salts: jax.Array | None,
) -> list[jax.Array]:
    """Masks of the largest scores of every group of leaves, k[group] of them.

    All leaves are searched in one loop, so that the time to compile it hardly grows
    with their number, and it ends as soon as no group has entries left to choose from.
    """
    sizes = np.bincount(groups, [leaf.size for leaf in scores])
    if sizes.max() >= 2**31:
        raise ValueError(
            "expected fewer than 2**31 scores to compete for one budget, got "
            f"{int(sizes.max())}; share the budget between leaves with a distribution"
        )
    leaves = _leaves(scores, groups, salts)
    bits = _WIDE if sizes.sum() >= _WIDE_FROM else _NARROW
    zero, full = jnp.zeros_like(k, jnp.uint32), jnp.full_like(k, 2**31 - 1)
    cut = jax.lax.while_loop(
        lambda cut: _is_open(cut, bits),
        lambda cut: _next_digit(cut, leaves, bits),
        _Cut(jnp.zeros((), jnp.int32), zero, zero, k, full),
    )
    kept = [_above(leaf, cut) & (k[leaf.group] > 0) for leaf in leaves]
    return [mask.reshape(s.shape) for mask, s in zip(kept, scores, strict=True)]


def _leaves(
    scores: list[jax.Array], groups: tuple[int, ...], salts: jax.Array | None
) -> list[_Leaf]:
    leaves, seen = [], collections.Counter[int]()
    for score, group in zip(scores, groups, strict=True):
        number, keys = pieces(score.size, _PIECE), _ordered_bits(score)
        keys = keys.reshape(number, -1) if number > 1 else keys[None]
        salt = None if salts is None else salts[group]
        leaves.append(_Leaf(keys, seen[group], group, salt))
        seen[group] += score.size
    return leaves


def _ordered_bits(scores: jax.Array) -> jax.Array:
    """uint32 keys that sort as the scores do; 0 for what must never be kept."""
    scores = scores.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    bits = jnp.where(bits == sign, jnp.uint32(0), bits)  # -0.0 and 0.0 are one score
    keys = jnp.where(bits >= sign, ~bits, bits | sign)
    return jnp.where(scores > -jnp.inf, keys, jnp.uint32(0))


def _ranks(leaf: _Leaf, shape: tuple[int, ...], first: int | jax.Array) -> jax.Array:
    """Distinct uint32 by which ties are broken: falling with the index, or shuffled."""
    index = (
        linear_index(shape) + jnp.asarray(first, jnp.uint32) + jnp.uint32(leaf.start)
    )
    return ~index if leaf.salt is None else _shuffled(index ^ leaf.salt)


def _shuffled(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3, a permutation of uint32 that looks random.

    It costs a fraction of random numbers from `jax.random`.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _above(leaf: _Leaf, cut: _Cut) -> jax.Array:
    key, rank = cut.key[leaf.group], cut.rank[leaf.group]
    tied = (leaf.keys == key) & (_ranks(leaf, leaf.keys.shape, 0) >= rank)
    return ((leaf.keys > key) | tied) & (leaf.keys > 0)


def _is_open(cut: _Cut, bits: int) -> jax.Array:
    undecided = jnp.any((cut.found > cut.wanted) & (cut.wanted > 0))
    return undecided & (cut.digit < 2 * _digits(bits))


def _digits(bits: int) -> int:
    return -(-32 // bits)


def _next_digit(cut: _Cut, leaves: list[_Leaf], bits: int) -> _Cut:
    """Finds the next digit of the cut of every group, from the histograms of it."""
    counts: list[Any] = [0] * len(cut.wanted)
    for leaf in leaves:
        counts[leaf.group] += _histogram(leaf, cut, bits)
    digit, wanted, found = _digit_of_kth(jnp.stack(counts), cut.wanted)
    by_key, shift = _position(cut, bits)
    digit = digit.astype(jnp.uint32) << shift
    return _Cut(
        cut.digit + 1,
        jnp.where(by_key, cut.key | digit, cut.key),
        jnp.where(by_key, cut.rank, cut.rank | digit),
        wanted,
        found,
    )


def _position(cut: _Cut, bits: int) -> tuple[jax.Array, jax.Array]:
    """Whether the next digit is one of the key, and how many bits are below it."""
    place = _digits(bits) - 1 - cut.digit % _digits(bits)
    return cut.digit < _digits(bits), (bits * place).astype(jnp.uint32)


def _histogram(leaf: _Leaf, cut: _Cut, bits: int) -> jax.Array:
    """How often each next digit occurs among entries that share the known ones."""
    by_key, shift = _position(cut, bits)
    cut_key = cut.key[leaf.group]
    known = jnp.where(by_key, cut_key, cut.rank[leaf.group]) >> shift >> bits
    number, *shape = leaf.keys.shape

    def count_piece(i: int | jax.Array, counts: jax.Array) -> jax.Array:
        keys = leaf.keys[i]
        value = jax.lax.cond(
            by_key,
            lambda: keys,
            lambda: _ranks(leaf, tuple(shape), i * math.prod(shape)),
        )
        digit = (value >> shift) & jnp.uint32((1 << bits) - 1)
        # What cannot be kept is not counted: it often is most of a leaf, and a bin that
        # every other entry hits is slow.
        counted = jnp.where(by_key, keys > 0, keys == cut_key)
        counted &= value >> shift >> bits == known
        digit = jnp.where(counted, digit, jnp.uint32(1 << bits))
        return counts.at[digit].add(1, mode="drop")

    empty = jnp.zeros(1 << bits, jnp.int32)
    if number == 1:
        return count_piece(0, empty)
    return jax.lax.fori_loop(0, number, count_piece, empty)


def _digit_of_kth(
    counts: jax.Array, k: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The digit of the k-th largest, its rank among those with it, their number.

    The search goes by blocks of bins: a running sum over all of 2**16 bins would cost
    more than the histogram of a small leaf.
    """
    groups, bins = counts.shape
    blocks = counts.reshape(groups, -1, 1 << (bins.bit_length() // 2))
    block, k, _ = _bin_of_kth(jnp.sum(blocks, axis=2), k)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    digit, k, found = _bin_of_kth(inside, k)
    return block * inside.shape[1] + digit, k, found


def _bin_of_kth(
    counts: jax.Array, k: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    at_least = jnp.cumsum(counts[:, ::-1], axis=1)[:, ::-1]
    chosen = jnp.maximum(jnp.sum(at_least >= k[:, None], axis=1) - 1, 0)[:, None]
    found = jnp.take_along_axis(counts, chosen, axis=1)[:, 0]
    above = jnp.take_along_axis(at_least, chosen, axis=1)[:, 0] - found
    return chosen[:, 0], k - above, found
