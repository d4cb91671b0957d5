"""Leaves of a parameter tree: their paths, which of them may be pruned, their sizes.

Any pytree will do: nested dicts, Flax NNX states, Equinox modules, NamedTuples. A leaf
is named by its path, the keys from the root joined by slashes: `"block1/conv/kernel"`.
"""

import collections
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from d2sparse.checks import check_function

PyTree = Any
Prunable = Callable[[str, Any], bool]
Count = int | jax.Array
Counts = Count | Mapping[str, Count]  # Per leaf by path, or for all leaves together.

# Words in the names of leaves that are added to features or multiplied with each: what
# layers of Flax, Equinox, Haiku and PyTorch call their biases, scales and statistics.
# A prompt is added to an image, or stands beside tokens.
_NO_KERNELS = frozenset(
    {
        *("bias", "biases", "scale", "scales", "offset", "offsets", "shift", "beta"),
        *("gamma", "g", "mean", "var", "variance"),
        *("cls", "pos", "positional", "position"),
        *("prompt", "prompts"),
    }
)
_KERNELS = frozenset(["kernel", "kernels", "weight", "weights"])
_NORM = re.compile(r"norm|^(bn|ln|gn)_?\d*$", re.IGNORECASE)


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


def pick(tree: PyTree, paths: Iterable[str], what: str = "a tree") -> dict[str, Any]:
    """The leaves at the given paths.

    Args:
      tree: any pytree.
      paths: of leaves.
      what: the tree is, for the error.

    Raises:
      ValueError: a path is not in the tree.

    >>> pick({"kernel": 1, "bias": 2}, ["kernel"])
    {'kernel': 1}
    """
    leaves, paths = flatten(tree), list(paths)
    missing = [path for path in paths if path not in leaves]
    if missing:
        raise ValueError(
            f"expected {what} with the paths of the parameters, got none for {missing} "
            f"among {sorted(leaves)}"
        )
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
    """Whether a leaf is a kernel: what a layer multiplies with all of its inputs.

    This is the default answer to "which weights may be pruned?". A kernel is floating
    point and has at least two dimensions. It is not called a bias, scale, offset or
    statistic, whatever its shape: `bias` of attention has the shape (heads, features),
    that of an Equinox convolution (n, 1, 1), and a layer that is stacked over the depth
    of a network has a bias of shape (layers, features). Nor is it the `weight` of a
    layer that is called a norm.

    First layer, head and embedding tables are kernels; to keep them or any other leaf
    dense, give a predicate of your own.

    >>> is_kernel("dense/kernel", jnp.zeros((3, 2)))
    True
    >>> is_kernel("dense/bias", jnp.zeros(2))
    False
    >>> is_kernel("layers/attention/query/bias", jnp.zeros((12, 8, 64)))
    False
    """
    is_matrix = leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    return bool(is_matrix) and not _is_called_otherwise(path)


def of_layers(stacked: str, prunable: Prunable = is_kernel) -> Prunable:
    """A predicate for parameters that are stacked over layers, by one layer of them.

    `nn.scan`, and `jax.lax.scan` over a stack of layers, want the parameters of all
    layers in one leaf, whose first axis counts the layers. A leaf of shape (layers, n)
    holds vectors, not a matrix. `rules.per_layer` gives every layer a budget of its
    own.

    Args:
      stacked: pattern of the paths of stacked leaves, as in `fnmatch` (`*` matches
        slashes too).
      prunable: predicate on (path, leaf), which is shown one layer of those leaves.

    >>> prunable = of_layers("blocks/*")
    >>> prunable("blocks/temperature", jnp.zeros((12, 64)))
    False
    >>> prunable("blocks/kernel", jnp.zeros((12, 64, 64)))
    True
    """
    check_function("prunable", prunable, "path, leaf", "tree.is_kernel")

    def predicate(path: str, leaf: Any) -> bool:
        if fnmatch.fnmatchcase(path, stacked) and leaf.ndim:
            leaf = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return prunable(path, leaf)

    return predicate


def prunable_leaves(tree: PyTree, prunable: Prunable = is_kernel) -> dict[str, Any]:
    """The leaves that may be pruned, by path.

    Args:
      tree: parameters, or `jax.ShapeDtypeStruct`s of them.
      prunable: predicate on (path, leaf); it must look at static facts only.

    Raises:
      ValueError: no leaf is prunable, a leaf is no array, or the default predicate
        would take the bias `b` beside a kernel `w` for a kernel.

    >>> params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
    >>> list(prunable_leaves(params))
    ['kernel']
    """
    check_function("prunable", prunable, "path, leaf", "tree.is_kernel")
    leaves = flatten(tree)
    check_arrays(leaves)
    chosen = {path: leaf for path, leaf in leaves.items() if prunable(path, leaf)}
    if not chosen:
        raise ValueError(
            "expected at least one prunable leaf, got none among "
            f"{sorted(leaves)}; widen the predicate `prunable(path, leaf)`"
        )
    if prunable is is_kernel:
        _refuse_doubtful(chosen)
    return chosen


def check_arrays(tree: PyTree) -> None:
    """Raises where a leaf is no array.

    Raises:
      ValueError: naming the leaf, and how modules are taken apart.

    >>> check_arrays({"kernel": jnp.zeros((3, 2))})
    """
    for path, leaf in flatten(tree).items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"expected arrays as parameters, got {type(leaf).__name__} at "
                f"{path!r}; of an Equinox module take the arrays alone, "
                "`eqx.filter(model, eqx.is_inexact_array)`, of a Flax NNX module "
                "`nnx.state(model, nnx.Param)`"
            )


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


def _is_called_otherwise(path: str) -> bool:
    """Whether the name of a leaf says that it is no kernel."""
    # Numbers count the items of a list, or the layers of a stack.
    *parents, name = [key for key in path.split("/") if not key.isdigit()] or [""]
    words = set(re.split(r"[^a-z]+", name.lower()))
    if words & _KERNELS:
        of_a_norm = bool(parents) and bool(_NORM.search(parents[-1]))
        return of_a_norm and "weight" in words
    return bool(words & _NO_KERNELS)


def _refuse_doubtful(chosen: Mapping[str, Any]) -> None:
    for path in chosen:
        parent, slash, name = path.rpartition("/")
        kernel = f"{parent}{slash}w"
        if name == "b" and kernel in chosen:
            raise ValueError(
                f"expected kernels as prunable leaves, got {path!r} of shape "
                f"{tuple(chosen[path].shape)}, which is probably the bias of "
                f"{kernel!r}; say which leaves are kernels by a predicate "
                "`prunable(path, leaf)`, such as `tree.of_layers(...)` for parameters "
                "that are stacked over layers"
            )
