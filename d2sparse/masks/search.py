"""The search for the k largest of many scores, digit by digit, without sorting.

Scores are read as integers that sort alike. A histogram of their first digit tells in
which bin the k-th largest lies; of the entries in that bin the next digit is counted,
and so on. Entries that are equal to the last digit are ties, and the search continues
with the digits of their rank.
"""

import collections
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.masks.layout import (
    Lazy,
    linear_index,
    may_be_cut,
    ordered_bits,
    tie_order,
)
from d2sparse.meshes import common_zero, on_auto_axes

# Digits, in bits. Wide ones read the scores twice instead of three times, which pays
# where there are many more scores than bins to clear and sum.
_WIDE, _NARROW = 16, 11
# Scores counted at once where they are counted in pieces: their temporaries stay in the
# second-level cache. Pieces of small leaves are smaller, since the last is filled up.
_PIECES = tuple(1 << bits for bits in range(15, 6, -1))


class _Block(NamedTuple):
    """Leaves that are counted by one loop: one in one piece, or many in equal pieces.

    Attributes:
      leaves: their scores.
      groups: the groups that they belong to. Those of a group compete.
      size: entries of a piece.
      leaf: int[pieces], which of the leaves a piece is of.
      row: int[pieces], which of the groups it belongs to.
      begin: int[pieces], its first entry in the leaf.
      skip: int[pieces], how many of its first entries the piece before it has too.
      end: int[pieces], how many entries the leaf has from there on, at most the size.
      start: uint[pieces], the index of its first entry among all that compete.
      unit: int[pieces], how much of the budget each of its entries takes.
    """

    leaves: list[Lazy]
    groups: np.ndarray
    size: int
    leaf: np.ndarray
    row: np.ndarray
    begin: np.ndarray
    skip: np.ndarray
    end: np.ndarray
    start: np.ndarray
    unit: np.ndarray


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
      found: int32[groups], how many of them there are. Both are counted in units.
    """

    digit: jax.Array
    key: jax.Array
    rank: jax.Array
    wanted: jax.Array
    found: jax.Array


# Outside of a compiled function the loop would be compiled at every call.
@functools.partial(jax.jit, static_argnames=("groups", "units"))
def largest(
    scores: Sequence[jax.Array | Lazy],
    groups: tuple[int, ...],
    k: jax.Array,
    salts: jax.Array | None = None,
    units: tuple[int, ...] | None = None,
) -> list[jax.Array]:
    """Masks of the largest scores of every group of leaves, k[group] of them.

    An entry of a leaf counts as its unit, 1 if not given. The search finds the entry
    that holds the k-th unit: what is kept may exceed k by less than one entry.

    All leaves are searched in one loop, which ends as soon as no group has entries left
    to choose from; where leaves may be cut, one loop body serves them all, so that the
    time to compile it hardly grows with their number.

    Args:
      scores: float[...] or bool[...], of which True is eligible and all ties.
      groups: of every leaf, from 0.
      k: int32[groups].
      salts: uint32[groups] that ties are shuffled by; None leaves them to the lower
        index.
      units: of every leaf.

    Raises:
      ValueError: the leaves of a group hold 2**31 units or more.

    >>> (mask,) = largest([jnp.array([3.0, 1.0, 2.0, 3.0])], (0,), jnp.array([2]))
    >>> mask.tolist()
    [True, False, False, True]
    """
    if not scores:
        return []
    leaves = [_lazy(leaf) for leaf in scores]
    units = units or (1,) * len(scores)

    def search(
        leaves: list[Lazy], k: jax.Array, salts: jax.Array | None
    ) -> list[jax.Array]:
        return _search(leaves, groups, k, salts, units)

    return on_auto_axes(search, leaves, leaves, k, salts)


def _search(
    leaves: list[Lazy],
    groups: tuple[int, ...],
    k: jax.Array,
    salts: jax.Array | None,
    units: tuple[int, ...],
) -> list[jax.Array]:
    shapes = [leaf.shape for leaf in leaves]
    # Under `jax.shard_map` the loops carry what varies as all that they look at.
    k = k + common_zero((leaves, k, salts))
    sizes = np.array([leaf.size for leaf in leaves])
    totals = np.bincount(groups, sizes * units)
    if totals.max() >= 2**31:
        raise ValueError(
            "expected fewer than 2**31 scores to compete for one budget, got "
            f"{int(totals.max())}; share the budget between leaves with a distribution"
        )
    starts = _starts(sizes, groups)
    if may_be_cut():
        leaves = [leaf.flat(0) for leaf in leaves]
        blocks = [_cut_up(leaves, groups, starts, units)]
    else:
        each = zip(leaves, groups, starts, units, strict=True)
        blocks = [_whole(*leaf) for leaf in each]
    bits = _WIDE if sizes.sum() >= len(totals) << (_WIDE + 2) else _NARROW
    cut = jax.lax.while_loop(
        lambda cut: _is_open(cut, bits),
        lambda cut: _next_digit(cut, blocks, salts, bits),
        _begin(k, all(_is_bool(leaf) for leaf in leaves), bits),
    )
    kept = [
        _above(leaf, start, cut, group, salts) & (k[group] > 0)
        for leaf, start, group in zip(leaves, starts, groups, strict=True)
    ]
    return [m.reshape(shape) for m, shape in zip(kept, shapes, strict=True)]


def _starts(sizes: np.ndarray, groups: Sequence[int]) -> list[int]:
    """The index of every leaf's first entry among all that compete with it."""
    starts, seen = [], collections.Counter[int]()
    for size, group in zip(sizes.tolist(), groups, strict=True):
        starts.append(seen[group])
        seen[group] += size
    return starts


def _lazy(scores: jax.Array | Lazy) -> Lazy:
    return scores if isinstance(scores, Lazy) else Lazy((scores,), jnp.asarray)


def _is_bool(scores: Lazy) -> bool:
    return bool(jax.eval_shape(scores.value).dtype == bool)


def _whole(leaf: Lazy, group: int, start: int, unit: int) -> _Block:
    """A block of one leaf, which is read at once and stays where it is."""
    one = np.zeros(1, np.int32)
    return _Block(
        leaves=[leaf],
        groups=np.array([group]),
        size=leaf.size,
        leaf=one,
        row=one,
        begin=one,
        skip=one,
        end=one,
        start=np.array([start], np.uint32),
        unit=np.array([unit], np.int32),
    )


def _cut_up(
    scores: Sequence[Lazy],
    groups: Sequence[int],
    starts: Sequence[int],
    units: Sequence[int],
) -> _Block:
    """One block of all leaves; the last pieces of a leaf may have entries in common."""
    sizes = np.array([leaf.size for leaf in scores])
    piece = min(_piece(sizes), max(int(sizes.max()), 1))
    pieces = np.maximum(-(-sizes // piece), 1)
    leaf = np.repeat(np.arange(len(scores)), pieces)
    number = np.arange(len(leaf)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = np.minimum(piece * number, np.maximum(sizes - piece, 0)[leaf])
    return _Block(
        leaves=[score.flat(piece) for score in scores],
        groups=np.arange(max(groups) + 1),
        size=piece,
        leaf=leaf.astype(np.int32),
        row=np.array(groups, np.int32)[leaf],
        begin=begin.astype(np.int32),
        skip=(piece * number - begin).astype(np.int32),
        end=np.minimum(sizes, piece)[leaf].astype(np.int32),
        start=(np.array(starts)[leaf] + begin).astype(np.uint32),
        unit=np.array(units, np.int32)[leaf],
    )


def _piece(sizes: np.ndarray) -> int:
    """The largest piece with which filling up the leaves costs little."""
    for piece in _PIECES:
        filling = int((-sizes % piece).sum())
        if 8 * filling <= sizes.sum():
            return piece
    return _PIECES[-1]


def _begin(k: jax.Array, only_ties: bool, bits: int) -> _Cut:
    zero, full = jnp.zeros_like(k, jnp.uint32), jnp.full_like(k, 2**31 - 1)
    if only_ties:
        return _Cut(jnp.int32(_digits(bits)), zero + 1, zero, k, full)
    return _Cut(jnp.int32(0), zero, zero, k, full)


def _above(
    scores: Lazy, start: int, cut: _Cut, group: int, salts: jax.Array | None
) -> jax.Array:
    keys, key = ordered_bits(scores.value()), cut.key[group]
    index = linear_index(scores.shape) + jnp.uint32(start)
    rank = tie_order(index, None if salts is None else salts[group])
    return ((keys > key) | (keys == key) & (rank >= cut.rank[group])) & (keys > 0)


def _is_open(cut: _Cut, bits: int) -> jax.Array:
    return jnp.any(_undecided(cut)) & (cut.digit < 2 * _digits(bits))


def _undecided(cut: _Cut) -> jax.Array:
    return (cut.found > cut.wanted) & (cut.wanted > 0)


def _digits(bits: int) -> int:
    return -(-32 // bits)


def _next_digit(
    cut: _Cut, blocks: Sequence[_Block], salts: jax.Array | None, bits: int
) -> _Cut:
    """Finds the next digit of the cut of every group, from the histograms of it."""
    found = [_histograms(block, cut, salts, bits) for block in blocks]
    if len(blocks) == 1:
        (counts,) = found
    else:
        counts = jnp.zeros((len(cut.wanted), 1 << bits), jnp.int32)
        for block, part in zip(blocks, found, strict=True):
            counts = counts.at[block.groups].add(part)
    digit, wanted, shared = _digit_of_kth(counts, cut.wanted)
    by_key, shift = _position(cut, bits)
    digit = digit.astype(jnp.uint32) << shift
    return _Cut(
        cut.digit + 1,
        jnp.where(by_key, cut.key | digit, cut.key),
        jnp.where(by_key, cut.rank, cut.rank | digit),
        wanted,
        shared,
    )


def _position(cut: _Cut, bits: int) -> tuple[jax.Array, jax.Array]:
    """Whether the next digit is one of the key, and how many bits are below it."""
    place = _digits(bits) - 1 - cut.digit % _digits(bits)
    return cut.digit < _digits(bits), (bits * place).astype(jnp.uint32)


def _histograms(
    block: _Block, cut: _Cut, salts: jax.Array | None, bits: int
) -> jax.Array:
    """How often each next digit occurs among entries that share the known ones.

    Returns:
      int32[groups of the block, digits].
    """
    by_key, shift = _position(cut, bits)
    bins, groups = 1 << bits, jnp.asarray(block.groups)
    total = len(groups) * bins
    row, start, unit = map(jnp.asarray, (block.row, block.start, block.unit))

    zero = jnp.zeros_like(cut.key, shape=())  # Varies as all that is looked at.

    def count_piece(i: int | jax.Array, counts: jax.Array) -> jax.Array:
        group = groups[row[i]]
        salt = None if salts is None else salts[group]
        keys = _keys(block, i) + zero
        index = linear_index(keys.shape) + (start[i] + zero)
        value = jax.lax.cond(by_key, lambda: keys, lambda: tie_order(index, salt))
        known = jnp.where(by_key, cut.key[group], cut.rank[group]) >> shift >> bits
        # What cannot be kept is not counted: it often is most of a leaf, and a bin that
        # every other entry hits is slow.
        counted = jnp.where(by_key, keys > 0, keys == cut.key[group])
        counted &= value >> shift >> bits == known
        digit = ((value >> shift) & jnp.uint32(bins - 1)).astype(jnp.int32)
        place = jnp.where(counted, row[i] * bins + digit, total)
        return counts.at[place].add(unit[i], mode="drop")

    counts = jnp.zeros_like(cut.wanted, shape=total)
    pieces = len(block.leaf)
    if pieces == 1:
        return count_piece(0, counts).reshape(1, bins)
    # Groups that are decided are not read again: ties are left in few of them.
    is_open = _undecided(cut)[groups][row]
    (order,) = jnp.nonzero(is_open, size=pieces)
    counts = jax.lax.fori_loop(
        0,
        jnp.sum(is_open, dtype=jnp.int32),
        lambda i, counts: count_piece(order[i], counts),
        counts,
    )
    return counts.reshape(-1, bins)


def _keys(block: _Block, i: int | jax.Array) -> jax.Array:
    """The keys of a piece, 0 where the leaf has ended or the piece before has them."""
    if len(block.leaf) == 1:
        return ordered_bits(block.leaves[0].value())
    leaf, begin, skip, end = (
        jnp.asarray(x)[i] for x in (block.leaf, block.begin, block.skip, block.end)
    )

    def read(scores: Lazy) -> jax.Array:
        return ordered_bits(scores.part(begin, block.size))

    keys = jax.lax.switch(leaf, [functools.partial(read, x) for x in block.leaves])
    place = jnp.arange(block.size)
    return jnp.where((place >= skip) & (place < end), keys, jnp.uint32(0))


def _digit_of_kth(
    counts: jax.Array, k: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The digit of the k-th largest, its rank among those with it, their number.

    The search goes by blocks of bins: a running sum over all of 2**16 bins would cost
    more than the histogram of a small leaf.
    """
    groups, bins = counts.shape
    blocks = counts.reshape(groups, -1, 1 << (bins.bit_length() // 2))
    block, k, _ = _bin_of_kth(jnp.sum(blocks, axis=2, dtype=jnp.int32), k)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    digit, k, found = _bin_of_kth(inside, k)
    return block * inside.shape[1] + digit, k, found


def _bin_of_kth(
    counts: jax.Array, k: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    at_least = jnp.cumsum(counts[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]
    reach = jnp.sum(at_least >= k[:, None], axis=1, dtype=jnp.int32)
    chosen = jnp.maximum(reach - 1, 0)[:, None]
    found = jnp.take_along_axis(counts, chosen, axis=1)[:, 0]
    above = jnp.take_along_axis(at_least, chosen, axis=1)[:, 0] - found
    return chosen[:, 0], k - above, found
