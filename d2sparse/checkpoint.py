"""Checkpoints: sparse parameters on disk, without their zeros.

Written and read by Orbax, whole or not at all: a directory appears under its name when
everything is in it.
"""

import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from d2sparse import packing, tree
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
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, _without_empty(sparse))
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
    path = Path(directory).absolute()
    sparse = _with_empty(_read(path), like)
    return jax.tree.map(jnp.asarray, packing.expand(sparse, like))


def _read(path: Path) -> SparseTree:
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = getattr(checkpointer.metadata(path).item_metadata, "tree", {})
            if set(stored) != set(SparseTree._fields):
                raise ValueError("there are no sparse parameters in it")
            # Into numpy arrays: those of JAX would be committed to a device.
            like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), stored)
            return SparseTree(**checkpointer.restore(path, like))
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(
            f"expected a directory written by `save_sparse`, got {path}, which is "
            f"missing, damaged or something else ({error}); check the path, or save "
            "the parameters again"
        ) from error


def _without_empty(sparse: SparseTree) -> dict[str, dict[str, np.ndarray]]:
    """What Orbax can store: arrays with at least one entry."""
    return {
        field: {path: array for path, array in arrays.items() if array.size}
        for field, arrays in sparse._asdict().items()
    }


def _with_empty(sparse: SparseTree, like: PyTree) -> SparseTree:
    """The empty arrays back in: no live values, the shape of a scalar, no entries."""
    model = tree.flatten(like)
    dtypes = {path: leaf.dtype for path, leaf in model.items()}
    values = {path: np.empty(0, dtypes.get(path, bool)) for path in sparse.masks}
    for path, leaf in model.items():
        if math.prod(leaf.shape) == 0:
            values[path] = np.empty(leaf.shape, leaf.dtype)
    shapes = {path: np.empty(0, np.int64) for path in sparse.masks}
    return SparseTree(values | sparse.values, sparse.masks, shapes | sparse.shapes)
