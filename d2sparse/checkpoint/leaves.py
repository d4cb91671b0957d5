"""The leaves of a state on the host, by path, and back where they were."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.checks import optional
from d2sparse.tree import PyTree

with optional(__name__):
    import tensorstore


def layout(state: PyTree) -> dict[str, str]:
    """Type and shape of every leaf by path, also of a `jax.ShapeDtypeStruct`.

    >>> layout({"w": jnp.zeros((3, 2)), "key": jax.random.key(0)})
    {"['key']": 'key<fry>[]', "['w']": 'float32[3, 2]'}
    """
    return {path: _describe(leaf) for path, leaf in _flatten(state).items()}


def to_host(state: PyTree) -> dict[str, np.ndarray]:
    """Copies of the leaves by path, random keys as their data.

    Raises:
      ValueError: this process has a part of an array only, or a leaf is no array of
        numbers that can be stored.
    """
    leaves = _flatten(state)
    for path, leaf in leaves.items():
        check_storable(path, leaf)
        if isinstance(leaf, jax.Array):
            _check_whole(path, leaf)
            leaf.copy_to_host_async()
    return {path: _copy(leaf) for path, leaf in leaves.items()}


def check_storable(path: str, leaf: Any) -> None:
    """Refuses what Orbax cannot write, before anything is written.

    Raises:
      ValueError: naming the leaf and its type.
    """
    if _is_key(leaf):
        return
    typed = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    is_masked = isinstance(leaf, np.ma.MaskedArray)
    if is_masked or not _is_storable(np.dtype(typed.dtype)):
        kind = f"{_describe(leaf)} of {type(leaf).__name__}"
        raise ValueError(
            f"expected an array of numbers or bool at {path}, got {kind}, which no "
            "checkpoint can hold; convert it with `np.asarray` and `.astype`, or leave "
            "it out of the state"
        )


def from_host(arrays: dict[str, np.ndarray], like: PyTree) -> PyTree:
    """The tree of `like` with the arrays as its leaves, placed as they are there.

    Raises:
      ValueError: an array is missing or does not fit its place.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _restore(arrays, jax.tree_util.keystr(path), leaf), like
    )


def place(path: str, array: np.ndarray, like: Any) -> Any:
    """An array where and what another is, which may be a `jax.ShapeDtypeStruct`.

    Args:
      path: of the leaf, for errors.
      array: of its shape.
      like: a numpy array, for an array of numpy; an array of JAX or its abstract form,
        for one with its sharding, uncommitted where it has none.

    Raises:
      ValueError: JAX would hold it in a narrower type, or the sharding has no devices.
    """
    if isinstance(like, np.ndarray):
        return array
    if isinstance(like, np.generic):
        return array[()]
    if isinstance(like, bool | int | float | complex):
        return array.item()
    held = jnp.asarray(np.empty(0, array.dtype)).dtype
    sharding = _sharding(path, like)
    if held != array.dtype:
        raise ValueError(
            f"expected {array.dtype} at {path}, which JAX would hold as {held}; switch "
            "jax_enable_x64 on, or ask for numpy arrays by giving them as `like`"
        )
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: array[index]
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


def _is_storable(dtype: np.dtype[Any]) -> bool:
    try:
        return bool(tensorstore.dtype(dtype).numpy_dtype == dtype)
    except (TypeError, ValueError):
        return False


def _restore(arrays: dict[str, np.ndarray], path: str, like: Any) -> Any:
    """The leaf at a path; random keys are stored as their data."""
    data = jax.eval_shape(jax.random.key_data, like) if _is_key(like) else like
    found = "nothing" if path not in arrays else _describe(arrays[path])
    if found != _describe(data):
        raise ValueError(f"expected {_describe(data)} at {path}, got {found}")
    if not _is_key(like):
        return place(path, arrays[path], like)
    target = jax.ShapeDtypeStruct(
        data.shape, data.dtype, sharding=_sharding(path, like)
    )
    placed = place(path, arrays[path], target)
    return jax.random.wrap_key_data(placed, impl=_key_impl(like))


def _sharding(path: str, like: Any) -> jax.sharding.Sharding | None:
    """Where a leaf lies; None where jit may move it."""
    if isinstance(like, jax.Array) and not like.committed:
        return None
    sharding: jax.sharding.Sharding | None = getattr(like, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    mesh = sharding.mesh
    if not isinstance(mesh, jax.sharding.AbstractMesh):
        return sharding
    own = jax.sharding.get_mesh()
    if own.abstract_mesh != mesh:
        raise ValueError(
            f"expected a sharding with devices at {path}, got {sharding}; restore "
            "under the same `jax.set_mesh`, or give a sharding of a concrete mesh"
        )
    return jax.sharding.NamedSharding(own, sharding.spec)


def _key_impl(like: Any) -> Any:
    """The algorithm of random keys, also of a `jax.ShapeDtypeStruct`."""
    return jax.random.key_impl(jnp.empty((), like.dtype))
