"""Sparse parameters on disk, without their zeros."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp

from d2sparse import packing
from d2sparse.checkpoint import store
from d2sparse.packing import SparseTree
from d2sparse.tree import PyTree


def save_sparse(
    directory: str | os.PathLike[str], params: PyTree, masks: PyTree
) -> int:
    """Writes sparse parameters as their live values and the bits of their masks.

    Args:
      directory: where to write; it must not exist yet.
      params: parameters that are 0 wherever their masks are False.
      masks: tree of bool like the parameters.

    Returns:
      Bytes of the compressed form, as `packing.nbytes` counts them. On disk it is a
      little more for the metadata, or less, since Orbax compresses what it writes.

    Raises:
      ValueError: the directory exists, the masks do not fit the parameters, or a pruned
        weight is not 0.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp() + "/ticket"
    >>> save_sparse(directory, {"w": jnp.eye(4)}, {"w": jnp.eye(4, dtype=bool)})
    18
    >>> params, masks = load_sparse(directory, like={"w": jnp.zeros((4, 4))})
    >>> bool((params["w"] == jnp.eye(4)).all()), int(masks["w"].sum())
    (True, 4)
    """
    path = Path(directory).absolute()
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
    store.write(path, arrays, {"kind": "sparse"})
    return packing.nbytes(sparse)


def load_sparse(
    directory: str | os.PathLike[str], like: PyTree
) -> tuple[PyTree, PyTree]:
    """Reads what `save_sparse` wrote, to the bit.

    Args:
      directory: what was given to `save_sparse`.
      like: parameters or `jax.ShapeDtypeStruct`s of the model.

    Returns:
      `(params, masks)` with the structure, shapes and types of `like`. They are not
      committed to a device, so that a step compiled for fresh parameters takes them
      without compiling again.

    Raises:
      ValueError: the directory is missing, damaged or was not written by `save_sparse`,
        or a leaf does not fit the model.
    """
    sparse = _read(Path(directory).absolute())
    return jax.tree.map(jnp.asarray, packing.expand(sparse, like))


def _read(path: Path) -> SparseTree:
    try:
        arrays, notes = store.read(path)
        if notes.get("kind") != "sparse":
            raise ValueError("there are no sparse parameters in it")
    except ValueError as error:
        raise ValueError(
            f"expected a directory written by `save_sparse`, got {path}, which is "
            f"missing, damaged or something else ({error}); check the path, or save "
            "the parameters again"
        ) from error
    sparse = SparseTree({}, {}, {})
    for key, array in arrays.items():
        field, _, name = key.partition("/")
        getattr(sparse, field)[name] = array
    return sparse
