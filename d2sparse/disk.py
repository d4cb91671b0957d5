"""Places on disk: which paths are local, why an operation failed, who is at work."""

import contextlib
import errno
import json
import os
import re
import socket
import time
import warnings
import weakref
from pathlib import Path

# An address such as gs://bucket, also as `Path` writes it, with one slash.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|.*://")
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota, or have it raised",
    errno.EFBIG: "raise the limit of file sizes (`ulimit -f`)",
    errno.EACCES: "change its permissions, or give another directory",
    errno.EPERM: "change its permissions, or give another directory",
    errno.EROFS: "give a directory on a file system that can be written",
    errno.ENOENT: "make sure that nothing removes or renames it meanwhile",
    errno.ENOTDIR: "move the file away that stands in place of a directory",
    errno.EEXIST: "move the file away that stands in place of a directory",
    errno.EISDIR: "move the directory away that stands in place of a file",
    errno.ENOTEMPTY: "make sure that no other process writes there",
    errno.EBUSY: "make sure that no other process uses it",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "close other programs, or have the limit of open files raised",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "remove the links that lead to each other",
    errno.ENOMEM: "free some memory",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount the network file system again",
    errno.ENODEV: "mount the file system again",
}
# These say that a file is not there; others, that it could not be looked at.
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """A path on this machine, or on what is mounted there.

    >>> local_path("gs://bucket/run", "--workdir")
    Traceback (most recent call last):
    ...
    ValueError: expected --workdir on a local or mounted file system, got the address
    'gs://bucket/run'; mount the bucket and give the path of its mount, or copy it

    Args:
      path: with ~ for the home directory.
      name: what it is, for the error.

    Raises:
      ValueError: it is an address in a store or a network, or a home directory that
        does not exist.
    """
    text = os.fspath(path)
    if _ADDRESS.match(text):
        raise ValueError(
            f"expected {name} on a local or mounted file system, got the address "
            f"{text!r}; mount the bucket and give the path of its mount, or copy it"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"expected {name} as a path, got {text!r} ({error})") from None


def existing_file(path: str | os.PathLike[str]) -> Path:
    """The local path of a file that is there.

    >>> existing_file("no/such/network.npz")
    Traceback (most recent call last):
    ...
    ValueError: expected the path of a file, got 'no/such/network.npz', where there is
    none; check the path

    Raises:
      ValueError: there is no file.
    """
    file = local_path(path, "path")
    if not file.is_file():
        raise ValueError(
            f"expected the path of a file, got {str(file)!r}, where there is none; "
            "check the path"
        )
    return file


def number_of(error: BaseException) -> int | None:
    """The number of the operating system's error behind an error, None for none.

    Libraries wrap such errors, or quote them in a text of their own.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        if quoted := re.search(r"(?:OS error |Errno |os_error_code=')(\d+)", str(seen)):
            return int(quoted[1])
        seen = seen.__cause__ or seen.__context__
    return None


def remedy(error: BaseException) -> str:
    """What can be done about an error of the operating system.

    >>> remedy(OSError(errno.EROFS, "Read-only file system"))
    'give a directory on a file system that can be written'
    """
    number = number_of(error)
    return _REMEDIES.get(number or 0, "remove the cause that the message names")


def reason(error: OSError) -> str:
    """The operating system's words for an error."""
    return error.strerror or str(error)


def unreadable(path: Path, error: OSError) -> OSError:
    """The error that says why something could not be read, which may be intact."""
    return OSError(f"expected to read {path}, got {reason(error)}; {remedy(error)}")


class Lock:
    """Held by one process until it ends, however it ends; see `lock`."""

    def __init__(self, descriptor: int) -> None:
        """Keeps a file open, on which the kernel holds the lock."""
        self._close = weakref.finalize(self, os.close, descriptor)

    def forget(self) -> None:
        """Closes the file in a child process, whose parent goes on holding the lock."""
        self._close()


_held: weakref.WeakValueDictionary[Path, Lock] = weakref.WeakValueDictionary()


def _forget_all() -> None:
    """A child that outlives its parent must not go on holding what that one held."""
    for lock in list(_held.values()):
        lock.forget()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def lock(path: Path, what: str) -> Lock | None:
    """Takes a lock, which this process holds as long as it keeps what is returned.

    The kernel holds it on the open file, so it ends with the process, also by a kill;
    the file that is left behind says who held it last and is no lock. Within a process
    it can be taken again. On a network file system it is worth what locks are there:
    on NFS and Lustre it holds between hosts where their locks are switched on; mounts
    of object stores know none, or keep them within one host.

    Args:
      path: the file; its directory exists.
      what: is locked, for the error.

    Returns:
      The lock; None, with a warning, where the file system has no locks.

    Raises:
      ValueError: another process holds it; it is named.
      OSError: the file cannot be made.
    """
    path = path.resolve()
    if (own := _held.get(path)) is not None:
        return own
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    own = Lock(descriptor)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{what} is in use by {_holder(path)}; wait for its end or stop it, or "
            "give another directory"
        ) from None
    except (ImportError, OSError) as error:
        warnings.warn(
            f"{what} cannot be locked ({error}); make sure that no other process uses "
            "it",
            stacklevel=3,
        )
        return None
    os.ftruncate(descriptor, 0)
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
    with contextlib.suppress(OSError):  # A full disk takes nothing from the lock.
        os.write(descriptor, (json.dumps(holder) + "\n").encode())
    _held[path] = own
    return own


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_bytes())
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
