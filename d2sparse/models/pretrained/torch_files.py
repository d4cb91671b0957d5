"""Checkpoints of PyTorch as arrays, without PyTorch and without running their code.

A checkpoint is a pickle, which may call any function of Python. This reader knows the
few names that tensors need, and refuses every other one.
"""

import collections
import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from d2sparse.disk import existing_file

# The first pickle of the format that PyTorch wrote before 1.6.
_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class _Storage(NamedTuple):
    """Numbers that tensors share, by their key in the file."""

    key: str
    dtype: str
    size: int


class _Tensor(NamedTuple):
    """A view of a storage, in entries."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(Exception):
    """A sentence for the user, told from errors of a damaged file."""


def load_torch(
    path: str | os.PathLike[str], key: str | None = None
) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch checkpoint by name, without PyTorch.

    Both formats are read, the one before PyTorch 1.6 and the zip file since. Kernels
    are (out, in, height, width): `into(..., layout="torch")` transposes them.

    Args:
      path: a file that `torch.save` wrote of a `state_dict`.
      key: where the tensors stand in a checkpoint of several things, such as
        `"state_dict"`.

    Returns:
      Arrays by name, in the order of the file; of bfloat16 too.

    Raises:
      ValueError: there is no such file, or it is damaged; it asks for other functions
        than those that tensors need, as does a whole module that was saved; or it holds
        something else beside tensors, in which case `key` says where they are.
    """
    file = existing_file(path)
    try:
        read = _read_zip if zipfile.is_zipfile(file) else _read_old
        found, data = read(file)
        tensors = _tensors(found, key)
        return {name: _array(tensor, data) for name, tensor in tensors.items()}
    # A damaged file raises whatever its bytes amount to.
    except Exception as error:
        what = str(error) if isinstance(error, _Refused) else repr(error)
        raise ValueError(
            f"expected tensors saved by PyTorch in {str(file)!r}, got {what}"
        ) from error


class _Unpickler(pickle.Unpickler):
    """Builds tensors as views of storages, and nothing else."""

    def __init__(self, stream: BinaryIO):
        super().__init__(stream)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global name, made anew: no file can change it."""
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *rest: _Tensor(
                storage, offset, tuple(shape), tuple(strides)
            )
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise _Refused(
            f"a call of `{module}.{name}`, which is not run; save `model.state_dict()`"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that a tensor is a view of."""
        _, dtype, key, _, size, *_ = pid
        return self.storages.setdefault(key, _Storage(key, dtype, size))


def _read_old(file: Path) -> tuple[Any, Mapping[str, bytes]]:
    """Five pickles, then the storages, each with its length in front."""
    with file.open("rb") as stream:
        if _Unpickler(stream).load() != _MAGIC:
            raise _Refused("another pickle; write it with `torch.save`")
        _, system = _Unpickler(stream).load(), _Unpickler(stream).load()
        _check_byte_order("little" if system["little_endian"] else "big")
        unpickler = _Unpickler(stream)
        found = unpickler.load()
        data = {}
        for key in _Unpickler(stream).load():
            stream.read(8)  # The number of entries, which the storage has too.
            data[key] = stream.read(_bytes(unpickler.storages[key]))
        return found, data


def _read_zip(file: Path) -> tuple[Any, Mapping[str, bytes]]:
    """A pickle and a file per storage."""
    with zipfile.ZipFile(file) as archive:
        files = set(archive.namelist())
        (pickled,) = (name for name in files if name.endswith("/data.pkl"))
        root = pickled.removesuffix("data.pkl")
        if f"{root}byteorder" in files:
            _check_byte_order(archive.read(f"{root}byteorder").decode())
        unpickler = _Unpickler(io.BytesIO(archive.read(pickled)))
        found = unpickler.load()
        keys = unpickler.storages
        return found, {key: archive.read(f"{root}data/{key}") for key in keys}


def _check_byte_order(order: str) -> None:
    if order != "little":
        raise _Refused(f"numbers that are {order}-endian; save it on another machine")


def _bytes(storage: _Storage) -> int:
    return storage.size * jnp.dtype(storage.dtype).itemsize


def _tensors(found: Any, key: str | None) -> dict[str, _Tensor]:
    if key is not None:
        if not isinstance(found, dict) or key not in found:
            raise _Refused(f"no {key!r} among {_names(found)}")
        found = found[key]
    others = [] if isinstance(found, dict) else [type(found).__name__]
    if isinstance(found, dict):
        others = [name for name in found if not isinstance(found[name], _Tensor)]
    if others:
        raise _Refused(
            f"{others[0]!r}, which is no tensor, among {_names(found)}; give the "
            '`key` of the tensors, such as key="state_dict"'
        )
    return dict(found)


def _names(found: Any) -> list[str]:
    return sorted(map(str, found))[:8] if isinstance(found, dict) else []


def _array(tensor: _Tensor, data: Mapping[str, bytes]) -> np.ndarray:
    storage, offset, shape, strides = tensor
    dtype = jnp.dtype(storage.dtype)
    flat = np.frombuffer(data[storage.key], dtype)
    last = offset + sum((n - 1) * by for n, by in zip(shape, strides, strict=True))
    inside = offset >= 0 and min(strides, default=0) >= 0 and last < flat.size
    if flat.size != storage.size or (0 not in shape and not inside):
        raise _Refused("a tensor outside of its storage; check that the file is whole")
    if 0 in shape:
        return np.zeros(shape, dtype)
    steps = [by * dtype.itemsize for by in strides]
    view = np.lib.stride_tricks.as_strided(flat[offset:], shape, steps)
    return view.copy()
