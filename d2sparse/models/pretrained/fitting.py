"""Arrays by name, put at the leaves of a tree: all of them, and none left over.

A network whose names do not agree with a file must not stay random unnoticed. Every
leaf takes one array, every array has a leaf, shapes agree, and the first that does not
is named with what is nearest to it.
"""

import difflib
import fnmatch
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import tree as trees
from d2sparse.checks import check_choice, check_function
from d2sparse.tree import PyTree

Layout = Literal["same", "torch"]

# How the last keys of Linen's leaves are called in PyTorch.
_TORCH_KEYS = {
    "kernel": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
_COLLECTIONS = ("params", "batch_stats")


def into(
    tree: PyTree,
    arrays: Mapping[str, np.ndarray],
    rename: Callable[[str], str] | None = None,
    *,
    layout: Layout | None = None,
    ignore: Collection[str] = (),
) -> PyTree:
    """The tree with an array of the file at every leaf.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s; of a `Model`, parameters and state in one
        dict, `{"params": params, **model_state}`.
      arrays: by name, as `load_arrays` returns them.
      rename: from the path of a leaf, `"params/conv1/kernel"`, to the name of its
        array; if not given, they are the same. `torch_name` translates between Linen
        and PyTorch layers of the same names.
      layout: `"same"`, arrays have the axes of the leaves; `"torch"`, leaves called
        `kernel` are filled from weights whose outputs come first, (out, in, height,
        width) or (out, in), and these are transposed. A dense layer behind a flattened
        image orders its inputs otherwise too, which no layout repairs. If not given,
        the axes are the same, and a `weight` that would fit a `kernel` either way is
        refused.
      ignore: patterns, as in `fnmatch`, of names that no leaf needs, such as
        `"*num_batches_tracked"`.

    Returns:
      The tree, its leaves of their dtype. Narrower floats are widened.

    Raises:
      ValueError: a leaf has no array, an array has no leaf, two leaves take the same
        array, or its shape, layout or dtype does not fit.

    >>> params = {"dense": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
    >>> arrays = {"dense.weight": np.ones((2, 3), "f4"), "dense.bias": np.ones(2, "f4")}
    >>> params = into(params, arrays, torch_name, layout="torch")
    >>> params["dense"]["kernel"].shape
    (3, 2)
    >>> into(params, {"model." + name: arrays[name] for name in arrays}, torch_name)
    Traceback (most recent call last):
    ...
    ValueError: expected an array 'dense.bias' for the leaf 'dense/bias', got none,
    nearest is 'model.dense.bias'; take the prefix off all names with
    `strip_prefix(arrays, 'model.')`
    """
    if layout is not None:
        check_choice("layout", layout, ("same", "torch"))
    if rename is not None:
        check_function("rename", rename, "path", "torch_name")
    leaves = trees.flatten(tree)
    trees.check_arrays(leaves)
    names = {path: rename(path) if rename else path for path in leaves}
    wanted = _without_ignored(arrays, ignore)
    _check_names(names, wanted)
    return trees.map_with_path(
        lambda path, leaf: _fit(path, leaf, names[path], wanted[names[path]], layout),
        tree,
    )


def torch_name(path: str) -> str:
    """The PyTorch name of a Linen leaf, layers being called the same.

    >>> torch_name("params/layer1/conv1/kernel")
    'layer1.conv1.weight'
    >>> torch_name("batch_stats/layer1/bn1/mean")
    'layer1.bn1.running_mean'
    """
    *layers, key = path.split("/")
    if layers and layers[0] in _COLLECTIONS:
        layers = layers[1:]
    return ".".join([*layers, _TORCH_KEYS.get(key, key)])


def strip_prefix(
    arrays: Mapping[str, np.ndarray], prefix: str
) -> dict[str, np.ndarray]:
    """The arrays by their names without a prefix that all of them have.

    Raises:
      ValueError: a name does not start with it.

    >>> list(strip_prefix({"module.fc.weight": np.ones(2)}, "module."))
    ['fc.weight']
    """
    if others := [name for name in arrays if not name.startswith(prefix)]:
        raise ValueError(
            f"expected names that all start with {prefix!r}, got {others[0]!r}; choose "
            "the arrays that are meant first"
        )
    return {name.removeprefix(prefix): array for name, array in arrays.items()}


def _without_ignored(
    arrays: Mapping[str, np.ndarray], ignore: Collection[str]
) -> dict[str, np.ndarray]:
    def is_ignored(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)

    return {name: array for name, array in arrays.items() if not is_ignored(name)}


def _check_names(names: Mapping[str, str], arrays: Collection[str]) -> None:
    paths: dict[str, str] = {}
    for path, name in names.items():
        if name in paths:
            raise ValueError(
                f"expected an array of its own for every leaf, got {name!r} for "
                f"{paths[name]!r} and {path!r}; let `rename` tell them apart"
            )
        paths[name] = path
    left_over = [name for name in arrays if name not in paths]
    for name, path in paths.items():
        if name not in arrays:
            raise ValueError(
                f"expected an array {name!r} for the leaf {path!r}, got none"
                + _nearest(name, left_over, arrays)
            )
    if left_over:
        more = f" and {len(left_over) - 1} more" if len(left_over) > 1 else ""
        raise ValueError(
            f"expected a leaf for every array, got none for {left_over[0]!r}{more}"
            f"{_nearest_leaf(left_over[0], paths)}; build the network that the file "
            "has, or name in `ignore` what no network needs"
        )


def _nearest(name: str, left_over: list[str], arrays: Collection[str]) -> str:
    """What stands in the file instead of a missing name, and what to do."""
    for other in left_over:
        prefix = other.removesuffix(name)
        if prefix != other and all(each.startswith(prefix) for each in arrays):
            return (
                f", nearest is {other!r}; take the prefix off all names with "
                f"`strip_prefix(arrays, {prefix!r})`"
            )
    for other in left_over:
        prefix = name.removesuffix(other)
        if prefix != name:
            return (
                f", nearest is {other!r}; let `rename` return names without {prefix!r}"
            )
    close = difflib.get_close_matches(name, left_over, n=1, cutoff=0)
    if not close:
        return "; the file has fewer arrays than the network: build the one it has"
    return f", nearest is {close[0]!r}; let `rename` return the names of the file"


def _nearest_leaf(name: str, paths: Mapping[str, str]) -> str:
    close = difflib.get_close_matches(name, paths, n=1)
    return f", nearest is {close[0]!r} of the leaf {paths[close[0]]!r}" if close else ""


def _fit(
    path: str, leaf: Any, name: str, array: np.ndarray, layout: Layout | None
) -> jax.Array:
    is_kernel = path.rpartition("/")[2] == "kernel"
    shape, turned = tuple(leaf.shape), _outputs_last(array)
    is_doubtful = is_kernel and array.ndim > 1 and name.endswith("weight")
    if layout is None and is_doubtful and shape == array.shape == turned.shape:
        raise ValueError(
            f"expected the layout of {name!r} to be known, got shape {array.shape}, "
            f'which fits the leaf {path!r} either way; give layout="torch" where '
            'outputs come first, else layout="same"'
        )
    origin = repr(name)
    if layout == "torch" and is_kernel:
        array, turned, origin = turned, array, f"{name!r}, outputs last"
    if array.shape != shape:
        raise ValueError(
            f"expected shape {shape} for the leaf {path!r}, got {array.shape} from "
            f"{origin}" + _about_shape(shape, array, turned, layout)
        )
    return _cast(path, leaf, name, array)


def _about_shape(
    shape: tuple[int, ...], array: np.ndarray, turned: np.ndarray, layout: Layout | None
) -> str:
    if turned.shape == shape:
        other = "same" if layout == "torch" else "torch"
        return f'; it looks transposed: give layout="{other}"'
    if array.size == np.prod(shape, dtype=int) and sorted(array.shape) == sorted(shape):
        return "; its axes look permuted: transpose the array"
    return "; build the network with the sizes of the file"


def _outputs_last(weight: np.ndarray) -> np.ndarray:
    """From (out, in, ...) to (..., in, out)."""
    if weight.ndim < 2:
        return weight
    return np.moveaxis(weight, (1, 0), (-2, -1))


def _cast(path: str, leaf: Any, name: str, array: np.ndarray) -> jax.Array:
    given, held = jnp.dtype(array.dtype), jnp.dtype(leaf.dtype)
    floats = all(jnp.issubdtype(dtype, jnp.floating) for dtype in (given, held))
    if given != held and not (floats and jnp.promote_types(given, held) == held):
        raise ValueError(
            f"expected {held} for the leaf {path!r}, got {given} from {name!r}; "
            "convert the array with `.astype` if nothing is lost by it"
        )
    return jnp.asarray(np.asarray(array, order="C"), held)
