"""Sparse parameters on disk, without their zeros."""

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from d2sparse import disk, packing, schema, tree
from d2sparse.checkpoint import leaves, store
from d2sparse.packing import SparseTree
from d2sparse.tree import PyTree


class _Notes(NamedTuple):
    """What is stored beside the arrays."""

    kind: Literal["sparse"]


def save_sparse(
    directory: str | os.PathLike[str], params: PyTree, masks: PyTree
) -> int:
    """Writes sparse parameters as their live values and the bits of their masks.

    Args:
      directory: where to write, on a local or mounted file system; it must not exist
        yet.
      params: parameters that are 0 wherever their masks are False.
      masks: tree of bool like the parameters.

    Returns:
      Bytes of the compressed form, as `packing.nbytes` counts them. On disk it is a
      little more for the metadata, or less, since Orbax compresses what it writes.

    Raises:
      ValueError: the directory exists or is an address such as gs://bucket, the masks
        do not fit the parameters, a leaf is no array of numbers, or a pruned weight is
        not 0.
      OSError: it cannot be written; the message says why.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> directory = tempfile.mkdtemp() + "/ticket"
    >>> save_sparse(directory, {"w": jnp.eye(4)}, {"w": jnp.eye(4, dtype=bool)})
    18
    >>> params, masks = load_sparse(directory, like={"w": jnp.zeros((4, 4))})
    >>> bool((params["w"] == jnp.eye(4)).all()), int(masks["w"].sum())
    (True, 4)
    """
    path = disk.local_path(directory, "the directory").absolute()
    for name, leaf in tree.flatten(params).items():
        leaves.check_storable(repr(name), leaf)
    if path.exists():
        raise ValueError(
            f"expected a directory that does not exist yet, got {path}; choose another "
            "name, or remove it first"
        )
    sparse = packing.compress(params, masks)
    arrays = {
        f"{field}/{name}": array
        for field, arrays in sparse._asdict().items()
        for name, array in arrays.items()
    }
    try:
        store.write(path, arrays, _Notes("sparse")._asdict())
    except Exception as error:  # What Orbax raises has no common base.
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise OSError(
            f"expected to write {path}, got {text}; {disk.remedy(error)}"
        ) from error
    return packing.nbytes(sparse)


def load_sparse(
    directory: str | os.PathLike[str], like: PyTree
) -> tuple[PyTree, PyTree]:
    """Reads what `save_sparse` wrote, to the bit.

    Args:
      directory: what was given to `save_sparse`.
      like: parameters or `jax.ShapeDtypeStruct`s of the model.

    Returns:
      `(params, masks)` with the structure, shapes, types and shardings of `like`. Where
      that has none, they are not committed to a device, so that a step compiled for
      fresh parameters takes them without compiling again. Where it holds numpy arrays,
      so do they.

    Raises:
      ValueError: the directory is missing, damaged or was not written by `save_sparse`,
        a leaf does not fit the model, or JAX would hold it in a narrower type.
      OSError: a file cannot be read for now, such as without permission.
    """
    sparse = _read(disk.local_path(directory, "the directory").absolute())

    def place(path: Any, array: np.ndarray, leaf: Any) -> Any:
        return leaves.place(repr(tree.path_name(path)), array, leaf)

    params, masks = packing.expand(sparse, like)
    return (
        jax.tree_util.tree_map_with_path(place, params, like),
        jax.tree_util.tree_map_with_path(place, masks, like),
    )


def _read(path: Path) -> SparseTree:
    try:
        arrays, notes = store.read(path)
        schema.parse(notes, _Notes)
        return _in_fields(arrays)
    except ValueError as error:
        raise ValueError(
            f"expected a directory written by `save_sparse`, got {path}, which is "
            f"missing, damaged or something else ({error}); check the path, or save "
            "the parameters again"
        ) from error


def _in_fields(arrays: dict[str, np.ndarray]) -> SparseTree:
    sparse = SparseTree({}, {}, {})
    for key, array in arrays.items():
        field, _, name = key.partition("/")
        if field not in sparse._fields:
            raise ValueError(f"it holds {key!r}")
        getattr(sparse, field)[name] = array
    masked = sparse.masks.keys()
    if masked != sparse.shapes.keys() or not masked <= sparse.values.keys():
        raise ValueError("its values, masks and shapes are of other leaves")
    return sparse
