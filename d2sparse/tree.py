"""Leaves of a parameter tree: their paths, which of them may be pruned, their sizes.

Any pytree will do: nested dicts, Flax NNX states, Equinox modules, NamedTuples. A leaf
is named by its path, the keys from the root joined by slashes: `"block1/conv/kernel"`.
"""

import collections
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Prunable = Callable[[str, Any], bool]
Count = int | jax.Array
Counts = Count | Mapping[str, Count]  # Per leaf by path, or for all leaves together.


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf, from its path as JAX gives it.

    A last key `.value` is left out: in Flax NNX it stands for the array in a variable,
    and parameters come with it or without.

    >>> path_name((jax.tree_util.DictKey("conv"), jax.tree_util.SequenceKey(0)))
    'conv/0'
    """
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, in the order of the tree.

    Args:
      tree: any pytree.

    Returns:
      A dict from path, such as `"block1/conv/kernel"`, to leaf.

    Raises:
      ValueError: two leaves have the same path, as `{"a/b": 1, "a": {"b": 2}}` does.

    >>> flatten({"dense": {"kernel": 1, "bias": 2}})
    {'dense/bias': 2, 'dense/kernel': 1}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {path_name(path): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        count = collections.Counter(path_name(path) for path, _ in leaves)
        twice = sorted(path for path, n in count.items() if n > 1)
        raise ValueError(
            f"expected a path of its own for every leaf, got {twice} more than once; "
            "rename the keys that hold a slash"
        )
    return named


def map_with_path(f: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Applies `f(path, leaf)` to every leaf.

    >>> map_with_path(lambda path, leaf: f"{path}={leaf}", {"kernel": 1})
    {'kernel': 'kernel=1'}
    """
    return jax.tree_util.tree_map_with_path(lambda p, leaf: f(path_name(p), leaf), tree)


def pick(tree: PyTree, paths: Iterable[str]) -> dict[str, Any]:
    """The leaves at the given paths.

    >>> pick({"kernel": 1, "bias": 2}, ["kernel"])
    {'kernel': 1}
    """
    leaves = flatten(tree)
    return {path: leaves[path] for path in paths}


def replace(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """The same tree with the leaves at the given paths replaced.

    Args:
      tree: any pytree.
      leaves: new leaves by path; paths that are not named keep their leaf.

    Raises:
      ValueError: a path is not in the tree.

    >>> replace({"kernel": 1, "bias": 2}, {"kernel": 3})
    {'bias': 2, 'kernel': 3}
    """
    paths = flatten(tree)
    unknown = sorted(set(leaves) - set(paths))
    if unknown:
        raise ValueError(
            f"expected paths of the tree, got {unknown}; the tree has {sorted(paths)}"
        )
    return map_with_path(lambda path, leaf: leaves.get(path, leaf), tree)


def is_kernel(path: str, leaf: Any) -> bool:
    """Whether a leaf is a kernel: floating point, with at least two dimensions.

    This is the default answer to "which weights may be pruned?". It takes the kernels
    of convolutions and dense layers, first layer and head included, and leaves biases
    and the scales and shifts of normalisations dense. An embedding table counts as a
    kernel, and so does a bias of shape (1, n), or (n, 1, 1) as Equinox's convolutions
    have it; give a predicate of your own to keep them, or any other leaf, dense.

    >>> is_kernel("dense/kernel", jnp.zeros((3, 2)))
    True
    >>> is_kernel("dense/bias", jnp.zeros(2))
    False
    """
    del path
    return leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def prunable_leaves(tree: PyTree, prunable: Prunable = is_kernel) -> dict[str, Any]:
    """The leaves that may be pruned, by path.

    Args:
      tree: parameters, or `jax.ShapeDtypeStruct`s of them.
      prunable: predicate on (path, leaf); it must look at static facts only.

    Raises:
      ValueError: no leaf is prunable.

    >>> params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
    >>> list(prunable_leaves(params))
    ['kernel']
    """
    leaves = flatten(tree)
    chosen = {path: leaf for path, leaf in leaves.items() if prunable(path, leaf)}
    if not chosen:
        raise ValueError(
            "expected at least one prunable leaf, got none among "
            f"{sorted(leaves)}; widen the predicate `prunable(path, leaf)`"
        )
    return chosen


def shapes(tree: PyTree, prunable: Prunable = is_kernel) -> dict[str, tuple[int, ...]]:
    """Shapes of the prunable leaves by path: what a distribution shares a budget over.

    >>> shapes({"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)})
    {'kernel': (3, 2)}
    """
    return {p: tuple(x.shape) for p, x in prunable_leaves(tree, prunable).items()}


def size(tree: PyTree) -> int:
    """Number of entries in all leaves.

    >>> size({"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)})
    8
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
