"""Selection of the largest scores, without sorting."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from d2sparse.checks import check_by_path, check_count
from d2sparse.masks.search import largest
from d2sparse.tree import Count, Counts, PyTree

# Scores and counts by path, and a key for ties or None, to masks by path.
Selection = Callable[
    [Mapping[str, jax.Array], Counts, jax.Array | None], dict[str, jax.Array]
]


def top_k(scores: PyTree, k: Count) -> PyTree:
    """The k largest scores of all leaves together, as a mask.

    Exactly `min(k, eligible)` entries are kept. Ties go to the lower index, in the
    order of the leaves. An entry whose score is NaN or `-inf` is not eligible: it is
    never kept. Scores are compared as float32.

    Nothing is sorted: a threshold is searched in the integer view of the floats, by
    counting how many reach it. Counts of several leaves, or of the shards of one, are
    added. So `k` may be traced, the function may be vmapped over it, and sharded leaves
    stay where they are (on a mesh whose axes are of type `AxisType.Auto`).

    Args:
      scores: tree of float[...]; a single array is a tree too.
      k: number of entries to keep, from 0; may be traced.

    Returns:
      A tree of bool[...] like `scores`.

    Raises:
      ValueError: the leaves hold 2**31 entries or more, or k is no such number.

    >>> top_k(jnp.array([3.0, 1.0, 2.0, 3.0]), 2).tolist()
    [True, False, False, True]
    """
    check_count("`k`", k)
    leaves, structure = jax.tree.flatten(scores)
    kept = largest(leaves, (0,) * len(leaves), jnp.asarray(k, jnp.int32)[None], None)
    return jax.tree.unflatten(structure, kept)


def check_counts(scores: Mapping[str, Any], counts: Counts) -> None:
    """Raises where counts are not those that a selection is asked for.

    Raises:
      ValueError: naming the argument, or the leaves without a count.

    >>> check_counts({"kernel": jnp.ones(4)}, {"kernel": 2})
    """
    check_by_path("scores", scores, of="scores")
    if not isinstance(counts, Mapping):
        check_count("the count of all leaves", counts)
        return
    if missing := sorted(path for path in scores if path not in counts):
        raise ValueError(
            f"expected a count for every leaf, got none for {missing} among "
            f"{sorted(counts)}"
        )
    for path in scores:
        check_count(f"the count of {path!r}", counts[path])


def select(
    scores: Mapping[str, jax.Array],
    counts: Counts,
    key: jax.Array | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, jax.Array]:
    """Masks of the largest scores, in each leaf or over all leaves.

    Args:
      scores: float[...] by path; or bool[...], of which True is eligible and all of
        them tie.
      counts: numbers of weights to keep by path, as a distribution returns them; or one
        number, for which all leaves compete.
      key: random key of the order in which ties are broken; if not given, they go to
        the lower index.
      sizes: how many weights an entry of every leaf stands for, each at least 1; if not
        given, one. Entries are kept in falling order of score until their sizes sum to
        the count or more: the last of them may exceed it, by less than its size.

    Returns:
      bool[...] by path.

    Raises:
      ValueError: scores or counts are not by path, a leaf has no count, or a count is
        no whole number.

    >>> scores = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
    >>> {path: mask.tolist() for path, mask in select(scores, 2).items()}
    {'a': [False, False], 'b': [True, True]}
    >>> {path: mask.tolist() for path, mask in select(scores, {"a": 1, "b": 1}).items()}
    {'a': [False, True], 'b': [False, True]}
    """
    check_counts(scores, counts)
    if isinstance(counts, Mapping):
        groups = tuple(range(len(scores)))
        wanted = jnp.stack([jnp.asarray(counts[path], jnp.int32) for path in scores])
    else:
        groups = (0,) * len(scores)
        wanted = jnp.asarray(counts, jnp.int32)[None]
    salts = None if key is None else jax.random.bits(key, wanted.shape, jnp.uint32)
    units = None if sizes is None else tuple(sizes[path] for path in scores)
    kept = largest(list(scores.values()), groups, wanted, salts, units)
    return dict(zip(scores, kept, strict=True))
