"""Files of trained networks as arrays by name; nothing in them is executed.

NumPy (`.npz`), safetensors (`.safetensors`), Keras (`.h5`) and PyTorch (`.pth`, `.pt`,
`.th`, `.bin`), the last without PyTorch.
"""

import os
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from d2sparse.checks import check_choice, optional
from d2sparse.disk import existing_file, local_path
from d2sparse.models.pretrained.torch_files import load_torch

PathLike = str | os.PathLike[str]


def load_arrays(path: PathLike) -> dict[str, np.ndarray]:
    """All arrays of a file by name, read by what its name ends with.

    Args:
      path: ends with `.npz`, `.safetensors`, `.h5`, `.pth`, `.pt`, `.th` or `.bin`.

    Returns:
      Arrays by the names of the file, in its order. See `load_npz`, `load_safetensors`,
      `load_keras` and `load_torch`, which has an option.

    Raises:
      ValueError: there is no such file, or it is not of the kind its name says.

    >>> load_arrays("network.onnx")
    Traceback (most recent call last):
    ...
    ValueError: expected suffix of path of .npz, .safetensors, .h5, .pth, .pt, .th,
    .bin, got '.onnx'
    """
    readers: Mapping[str, Callable[[PathLike], dict[str, np.ndarray]]] = {
        ".npz": load_npz,
        ".safetensors": load_safetensors,
        ".h5": load_keras,
        **dict.fromkeys((".pth", ".pt", ".th", ".bin"), load_torch),
    }
    suffix = local_path(path, "path").suffix
    check_choice("suffix of path", suffix, readers)
    return readers[suffix](path)


def load_npz(path: PathLike) -> dict[str, np.ndarray]:
    """The arrays of a file of `numpy.savez`; no objects are unpickled.

    Raises:
      ValueError: there is no such file, or it holds something else.
    """
    file = existing_file(path)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"expected arrays written by `numpy.savez` in {file}, got {error}; check "
            "that the file is whole"
        ) from error


def load_safetensors(path: PathLike) -> dict[str, np.ndarray]:
    """The arrays of a file of safetensors.

    Raises:
      ValueError: there is no such file, or it holds something else.
      ModuleNotFoundError: safetensors is not installed.
    """
    with optional(__name__):
        import safetensors
        from safetensors.numpy import load_file

    file = existing_file(path)
    try:
        return dict(load_file(file))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"expected a file of safetensors as {file}, got {error}; check that the "
            "file is whole"
        ) from error


def load_keras(path: PathLike) -> dict[str, np.ndarray]:
    """The weights of a Keras model in HDF5, as `"conv2d_1/kernel"`.

    The names are those of Keras without the trailing `:0`; the state of an optimiser is
    left out. Kernels are (height, width, in, out), as in Flax.

    Raises:
      ValueError: there is no such file, or it holds no weights of Keras.
      ModuleNotFoundError: h5py is not installed.
    """
    with optional(__name__):
        import h5py

    file = existing_file(path)
    if not h5py.is_hdf5(file):
        raise ValueError(
            f"expected a Keras model in HDF5 as {file}, got another format; save it "
            'with `model.save("network.h5")`'
        )
    with h5py.File(file, "r") as root:
        layers = root.get("model_weights", root)
        if "layer_names" not in layers.attrs:
            raise ValueError(
                f"expected weights of Keras in {file}, got groups {list(root)} "
                "without layer names; write the model with Keras 2"
            )
        return {
            _text(name).removesuffix(":0"): np.asarray(layers[layer][name])
            for layer in layers.attrs["layer_names"]
            for name in layers[layer].attrs["weight_names"]
        }


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
