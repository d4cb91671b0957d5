"""A directory of arrays that appears whole or not at all, and tells when it is damaged.

It holds

    arrays/          the arrays, as Orbax writes them
    manifest.json    their names, shapes and types, notes, size and SHA-256 of each file
    manifest.sha256  the SHA-256 of manifest.json, as `sha256sum -c` reads it

Orbax does not notice a flipped byte, and trips over a truncated file. So every file is
checked before Orbax opens any. SHA-256 costs about what reading the file does, and no
damage passes it by chance.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax
import numpy as np

from d2sparse import disk, schema
from d2sparse.checks import optional

with optional(__name__):
    import orbax.checkpoint as ocp

FORMAT = 1
ARRAYS, MANIFEST, CHECKSUM = "arrays", "manifest.json", "manifest.sha256"


class Damaged(ValueError):
    """A directory that is not, or no longer, what `write` left there."""


class Array(NamedTuple):
    """What the manifest says of an array."""

    name: str
    dtype: str
    shape: list[int]


class File(NamedTuple):
    """What the manifest says of a file."""

    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """The manifest."""

    format: int
    arrays: list[Array]
    notes: dict[str, Any]
    files: dict[str, File]


def write(
    directory: Path, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]
) -> None:
    """Writes arrays and notes; a directory that has the name already is replaced.

    Args:
      directory: absolute. A crash leaves what it held under its name, or under that
        of `replaced(directory)`.
      arrays: by any names.
      notes: what JSON can hold.

    Raises:
      OSError: and whatever Orbax raises, for instance on a full disk. Nothing has
        changed under the name then.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _write_arrays(temporary / ARRAYS, arrays)
        _write_manifest(temporary, arrays, notes)
        _sync(temporary)
        _replace(directory, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and notes that were written, to the bit.

    Raises:
      Damaged: a file is missing, shorter or longer than it was, or has other bytes; or
        the directory holds a link, or a file more among the arrays.
      ValueError: another version of the format, or a manifest of another form.
      OSError: a file cannot be read for now, such as without permission.
    """
    manifest = _read_manifest(directory)
    _check_files(directory, manifest)
    try:
        return _read_arrays(directory / ARRAYS, manifest.arrays), manifest.notes
    except MemoryError:
        raise
    except Exception as error:  # What Orbax raises has no common base.
        number = disk.number_of(error)
        if number is not None and number not in disk.ABSENT:
            own = OSError(number, os.strerror(number))
            raise disk.unreadable(directory, own) from error
        raise Damaged(f"its arrays cannot be read ({error})") from error


def read_notes(directory: Path) -> dict[str, Any]:
    """The notes alone; only they are checked.

    Raises:
      Damaged: the manifest is missing or damaged.
      ValueError: another version of the format, or a manifest of another form.
      OSError: it cannot be read for now, such as without permission.
    """
    return _read_manifest(directory).notes


def replaced(directory: Path) -> Path:
    """Where the former directory stands for the moment of its replacement."""
    return directory.with_name(f".{directory.name}.old")


def remove(directory: Path) -> None:
    """Removes a directory, if it exists, so that no part of it is left under its name.

    A crash leaves a rest of it under a hidden name, which the next call for the same
    directory takes along.
    """
    hidden = directory.with_name(f".{directory.name.strip('.')}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    if directory.exists():
        directory.rename(hidden)
        shutil.rmtree(hidden)


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Under numbers, since names may hold anything; Orbax stores no empty arrays."""
    items = {str(i): array for i, array in enumerate(arrays.values()) if array.size}
    if items:
        with _checkpointer() as checkpointer:
            checkpointer.save(path, args=ocp.args.StandardSave(items))


def _read_arrays(path: Path, layout: list[Array]) -> dict[str, np.ndarray]:
    # Into numpy arrays: those of JAX would be committed to a device.
    like = {str(i): _empty(*entry) for i, entry in enumerate(layout)}
    items = {key: array for key, array in like.items() if array.size}
    if items:
        with _checkpointer() as checkpointer:
            like |= checkpointer.restore(path, args=ocp.args.StandardRestore(items))
    for entry, array in zip(layout, like.values(), strict=True):
        if [str(array.dtype), list(array.shape)] != [entry.dtype, entry.shape]:
            raise Damaged(
                f"{entry.name!r} is {array.dtype}{list(array.shape)} and was "
                f"{entry.dtype}{entry.shape}"
            )
    return {entry.name: like[str(i)] for i, entry in enumerate(layout)}


def _empty(name: str, dtype: str, shape: list[int]) -> np.ndarray:
    array = np.empty(shape, np.dtype(dtype))
    if array.dtype.hasobject:
        raise Damaged(f"expected an array of numbers at {name!r}, got {dtype}")
    return array


def _checkpointer() -> ocp.Checkpointer:
    """Of this process alone, which waits for no other."""
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process{process}",
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _write_manifest(
    directory: Path, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]
) -> None:
    manifest = {
        "format": FORMAT,
        "arrays": [
            {"name": name, "dtype": str(array.dtype), "shape": list(array.shape)}
            for name, array in arrays.items()
        ],
        "notes": notes,
        "files": {
            path.relative_to(directory).as_posix(): _fingerprint(path)._asdict()
            for path in _entries(directory)
            if path.is_file()
        },
    }
    text = json.dumps(manifest, indent=1).encode()
    (directory / MANIFEST).write_bytes(text)
    (directory / CHECKSUM).write_bytes(_checksum(text))


def _read_manifest(directory: Path) -> Manifest:
    _refuse_links(directory)
    try:
        text = (directory / MANIFEST).read_bytes()
        checksum = (directory / CHECKSUM).read_bytes()
    except OSError as error:
        raise _unread(directory, error) from error
    if checksum != _checksum(text):
        raise Damaged(f"{MANIFEST} is not what was written")
    manifest = json.loads(text)
    if isinstance(manifest, dict) and manifest.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"expected format {FORMAT}, got {manifest['format']} in {directory}; read "
            "it with the version of d2sparse that wrote it"
        )
    found: Manifest = as_written(manifest, Manifest, str(directory / MANIFEST))
    if len({array.name for array in found.arrays}) < len(found.arrays):
        raise ValueError(
            f"expected one array of every name in {directory / MANIFEST}, got an array "
            "twice; give another directory"
        )
    return found


def as_written(value: Any, form: Any, place: str) -> Any:
    """What a manifest with its checksum holds, as the type it has to have.

    Raises:
      ValueError: another version of the code, or another program, has written it.
    """
    try:
        return schema.parse(value, form)
    except ValueError as error:
        raise ValueError(
            f"{place} was not written by this version of d2sparse: {error}; read it "
            "with the version that wrote it, or give another directory"
        ) from None


def _check_files(directory: Path, manifest: Manifest) -> None:
    """What was written is there, and nothing else among what Orbax looks at."""
    for path in _entries(directory / ARRAYS):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in manifest.files:
            raise Damaged(f"{name} was not written with it")
    for name, expected in manifest.files.items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise Damaged(f"{name} is outside of it")
        try:
            found = _fingerprint(directory / name)
        except OSError as error:
            raise _unread(directory, error) from error
        if found.bytes != expected.bytes:
            raise Damaged(f"{name} has {found.bytes} bytes and had {expected.bytes}")
        if found != expected:
            raise Damaged(f"{name} is not what was written")


def _refuse_links(directory: Path) -> None:
    """Links lead elsewhere, and pipes and devices never end."""
    for path in _entries(directory):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            name = path.relative_to(directory).as_posix()
            raise Damaged(f"{name} is neither a file nor a directory")


def _entries(directory: Path) -> Iterator[Path]:
    yield from sorted(directory.rglob("*"))


def _fingerprint(path: Path) -> File:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return File(file.tell(), digest)


def _checksum(text: bytes) -> bytes:
    return f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()


def _unread(directory: Path, error: OSError) -> Exception:
    """A file that is missing is damage; one that cannot be looked at may be intact."""
    path = Path(error.filename or directory)
    if error.errno not in disk.ABSENT:
        return disk.unreadable(path, error)
    return Damaged(f"{os.path.relpath(path, directory)}: {error.strerror}")


def _sync(directory: Path) -> None:
    """Everything in the directory is on the disk, not only on its way there."""
    for path in [directory, *_entries(directory)]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(directory: Path, temporary: Path) -> None:
    if directory.exists():
        remove(replaced(directory))
        directory.rename(replaced(directory))
    temporary.rename(directory)
    _sync_one(directory.parent)
    remove(replaced(directory))
