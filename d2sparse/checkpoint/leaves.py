"""The leaves of a state on the host, by path, and back where they were."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.tree import PyTree


def layout(state: PyTree) -> dict[str, str]:
    """Type and shape of every leaf by path, also of a `jax.ShapeDtypeStruct`.

    >>> layout({"w": jnp.zeros((3, 2)), "key": jax.random.key(0)})
    {"['key']": 'key<fry>[]', "['w']": 'float32[3, 2]'}
    """
    return {path: _describe(leaf) for path, leaf in _flatten(state).items()}


def to_host(state: PyTree) -> dict[str, np.ndarray]:
    """Copies of the leaves by path, random keys as their data.

    Raises:
      ValueError: this process has a part of an array only.
    """
    leaves = _flatten(state)
    for path, leaf in leaves.items():
        if isinstance(leaf, jax.Array):
            _check_whole(path, leaf)
            leaf.copy_to_host_async()
    return {path: _copy(leaf) for path, leaf in leaves.items()}


def from_host(arrays: dict[str, np.ndarray], like: PyTree) -> PyTree:
    """The tree of `like` with the arrays as its leaves, placed as they are there."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _place(arrays[jax.tree_util.keystr(path)], leaf), like
    )


def refuse_other_layout(path: Path, old: dict[str, str], new: dict[str, str]) -> None:
    """Raises ValueError with the first few leaves that differ."""
    differing = [
        f"{name} was {old.get(name, 'absent')} and is {new.get(name, 'absent')}"
        for name in {**new, **old}
        if old.get(name) != new.get(name)
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"the checkpoint {path} was made with another code layout: "
            f"{', '.join(differing[:3])}{more}; give another directory, or resume with "
            "the code that made it"
        )


def _flatten(state: PyTree) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _describe(leaf: Any) -> str:
    typed = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{typed.dtype}{list(typed.shape)}"


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _check_whole(path: str, leaf: jax.Array) -> None:
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        raise ValueError(
            f"expected an array that this process has as a whole at {path}, got "
            f"{_describe(leaf)} with the sharding {leaf.sharding}; replicate it over "
            "the processes before it is saved"
        )


def _copy(leaf: Any) -> np.ndarray:
    return np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _place(array: np.ndarray, like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return array
    if isinstance(like, np.generic):
        return array[()]
    if isinstance(like, bool | int | float | complex):
        return array.item()
    placed = _put(array, like)
    if _is_key(like):
        return jax.random.wrap_key_data(placed, impl=_key_impl(like))
    return placed


def _key_impl(like: Any) -> Any:
    """The algorithm of random keys, also of a `jax.ShapeDtypeStruct`."""
    return jax.random.key_impl(jnp.empty((), like.dtype))


def _put(array: np.ndarray, like: Any) -> jax.Array:
    """Where the array of `like` is; uncommitted if that is, so that jit may move it."""
    if isinstance(like, jax.Array) and like.committed:
        return jax.make_array_from_callback(
            array.shape, like.sharding, lambda index: array[index]
        )
    return jnp.asarray(array)
