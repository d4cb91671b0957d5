"""The checkpoints of a run: to resume it where it stopped, and to keep its best state.

The directory holds one directory per step, named by its number:

    20/, 30/       the latest, and the one with the highest score
    40.damaged/    one that could not be read, moved out of the way
"""

import atexit
import functools
import math
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np

from d2sparse import disk
from d2sparse.checkpoint import leaves, store
from d2sparse.checkpoint.record import (
    Record,
    as_json,
    first_line,
    ranking,
    read_record,
    refuse_other_origin,
)
from d2sparse.tree import PyTree

Form = Callable[[Mapping[str, Any]], PyTree]  # From the notes of a checkpoint.


class Checkpoint(NamedTuple):
    """A restored state.

    Attributes:
      step: at which it was saved.
      state: with the structure, shapes, types and placement that were asked for.
      notes: what was saved beside it.
    """

    step: int
    state: PyTree
    notes: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: the latest and the best, in one directory.

    `save` copies the state to the host and returns; a thread writes it. In a run of
    several processes all of them make the same calls, and the first one writes. From
    its first save on the directory is locked, until the object or the process ends.

    >>> import tempfile, jax.numpy as jnp
    >>> with Checkpoints(tempfile.mkdtemp(), about={"steps": 100}) as checkpoints:
    ...     checkpoints.save(10, {"w": jnp.ones(3)}, notes={"loss": 0.5})
    >>> step, state, notes = checkpoints.restore(like={"w": jnp.zeros(3)})
    >>> step, state["w"].tolist(), notes
    (10, [1.0, 1.0, 1.0], {'loss': 0.5})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        about: Mapping[str, Any] | None = None,
        keep: int = 2,
    ) -> None:
        """Opens a directory; nothing is written yet.

        Args:
          directory: on a local or mounted file system; made at the first save.
          about: what makes the checkpoints, such as the configuration; what JSON can
            hold. Those made by something else are refused. If not given, checkpoints
            of any origin are restored.
          keep: how many of the latest are kept. The best one is kept besides.

        Raises:
          ValueError: `keep` is not positive, `about` is not JSON, or the directory is
            an address such as gs://bucket.
        """
        if keep < 1:
            raise ValueError(f"expected to keep at least 1 checkpoint, got {keep}")
        self.directory = disk.local_path(directory, "the directory").absolute()
        self._about = None if about is None else as_json("about", about)
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._failed: tuple[int, Exception] | None = None
        self._lock: disk.Lock | None = None

    def __enter__(self) -> "Checkpoints":
        """Nothing happens."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Waits for the last save."""
        self.wait()

    def save(
        self,
        step: int,
        state: PyTree,
        notes: Mapping[str, Any] | None = None,
        score: float | None = None,
    ) -> None:
        """Saves a state; one of the same step is replaced.

        The values are those of now: the state may be donated after the call.

        Args:
          step: number of steps taken, by which checkpoints are ordered.
          state: tree of arrays and random keys. Those that lie on the devices of other
            processes have to be replicated.
          notes: whatever belongs to it and JSON can hold. Floats come back to the bit.
          score: the higher, the better. NaN never counts.

        Raises:
          ValueError: a negative step, notes that are not JSON, a leaf that is no array
            of numbers, an array of which this process has a part only, or another
            process that saves to the directory.
          OSError: the directory cannot be made; or the save before this one failed, for
            instance on a full disk. The message says why, and names the last
            checkpoint, which is intact.
        """
        self.wait()
        if step < 0:
            raise ValueError(f"expected a step of at least 0, got {step}")
        arrays = leaves.to_host(state)
        record = Record(
            step=int(step),
            about=self._about or {},
            leaves=leaves.layout(state),
            score=None if score is None else float(score),
            notes=as_json("notes", notes or {}),
        )
        if jax.process_index() == 0:
            self._make_and_lock(int(step))
            self._thread = threading.Thread(
                target=self._write, args=(int(step), arrays, record)
            )
            self._thread.start()
            # A program that ends without `wait` still hears of a save that failed.
            atexit.register(self.wait)

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          OSError: as `save`.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        atexit.unregister(self.wait)
        if self._failed is None:
            return
        (step, error), self._failed = self._failed, None
        raise self._unwritten(step, error) from error

    def restore(
        self, like: PyTree = None, form: Form | None = None
    ) -> Checkpoint | None:
        """The latest checkpoint that is not damaged.

        Damaged ones are named in a warning and renamed to `<step>.damaged`.

        Args:
          like: a state of the run, for instance that of step 0. Arrays are restored
            where its own are: uncommitted ones uncommitted, so that a compiled step
            takes them without compiling again, sharded ones sharded alike. numpy
            arrays and Python numbers stay what they are. In place of an array there may
            be a `jax.ShapeDtypeStruct`; without a sharding it stands for an uncommitted
            array.
          form: in place of `like`, a function from the notes of a checkpoint to its
            `like`, where the structure of the state depends on how far the run is:
            `lambda notes: program.form(notes["phase"], data)`.

        Returns:
          The checkpoint, or None if there is none at all.

        Raises:
          ValueError: every checkpoint is damaged, or the latest one was made by
            something else than `about` or with other leaves; it names what differs.
          OSError: a file cannot be read for now, such as without permission.
        """
        self.wait()
        latest = functools.partial(sorted, reverse=True)
        return self._first_good(latest, form or (lambda notes: like))

    def best(self, like: PyTree = None, form: Form | None = None) -> Checkpoint | None:
        """The checkpoint with the highest score; the later one of equals.

        Args:
          like: as for `restore`.
          form: as for `restore`.

        Returns:
          The checkpoint, or None if none has a score.

        Raises:
          ValueError: as `restore`.
        """
        self.wait()
        best_first = functools.partial(ranking, damaged=math.inf)
        return self._first_good(best_first, form or (lambda notes: like))

    def _make_and_lock(self, step: int) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                self._lock = disk.lock(
                    self.directory / "lock", f"the directory {self.directory}"
                )
        except OSError as error:
            raise self._unwritten(step, error) from error

    def _unwritten(self, step: int, error: Exception) -> OSError:
        return OSError(
            f"expected to write the checkpoint of step {step} to {self.directory}, got "
            f"{first_line(error)}; {self._last_good()}; {disk.remedy(error)} and run "
            "the same command again"
        )

    def _write(self, step: int, arrays: dict[str, np.ndarray], record: Record) -> None:
        try:
            self._remove_rests()
            store.write(self.directory / str(step), arrays, record._asdict())
            self._prune(step)
        except Exception as error:  # What Orbax raises has no common base.
            self._failed = step, error

    def _remove_rests(self) -> None:
        """What a crash has left: beginnings of checkpoints, and ends of old ones."""
        for rest in self.directory.glob(".*"):
            if re.fullmatch(r"\.[0-9]+(\.old)?\.(tmp|removed)", rest.name):
                shutil.rmtree(rest)
        for step, path in self._paths().items():
            # Its replacement was complete, and the end of it cut short.
            if (old := store.replaced(path)).exists() and path.name == str(step):
                store.remove(old)

    def _prune(self, newest: int) -> None:
        paths = self._paths()
        best = ranking(paths, damaged=math.nan)[:1]
        kept = {newest, *sorted(paths)[-self._keep :], *best}
        for step in paths.keys() - kept:
            store.remove(paths[step])

    def _paths(self) -> dict[int, Path]:
        """Directories by step; that of a replacement cut short is the former one."""
        paths = {}
        for pattern in (r"\.(0|[1-9][0-9]*)\.old", r"(0|[1-9][0-9]*)"):
            for path in self.directory.glob("*"):
                if match := re.fullmatch(pattern, path.name):
                    paths[int(match[1])] = path
        return paths

    def _last_good(self) -> str:
        for step, path in sorted(self._paths().items(), reverse=True):
            try:
                store.read_notes(path)
            except (OSError, ValueError):
                continue
            return f"the checkpoint of step {step} is intact"
        return "there is no earlier checkpoint"

    def _first_good(
        self, ranked: Callable[[Mapping[int, Path]], list[int]], form: Form
    ) -> Checkpoint | None:
        paths, damaged = self._paths(), {}
        for step in ranked(paths):
            path = paths[step]
            try:
                return self._read(step, path, form)
            except store.Damaged as error:
                if not path.exists():
                    # The process that saves has removed it; it has written others.
                    return self._first_good(ranked, form)
                warnings.warn(
                    f"the checkpoint {path} is damaged: {error}; it "
                    f"{self._set_aside(step, path)}, and an earlier one is used if "
                    "there is one",
                    stacklevel=3,
                )
                damaged[step] = f"{path} ({error})"
        if paths.keys() == damaged.keys():
            self._refuse_damaged(damaged.values())
        return None

    def _refuse_damaged(self, damaged: Iterable[str]) -> None:
        """Also at the next attempt, when they have been set aside."""
        aside = map(str, sorted(self.directory.glob("*.damaged*")))
        if names := list(damaged) or list(aside):
            raise ValueError(
                f"expected a checkpoint that is not damaged, got {', '.join(names)}; "
                f"remove {self.directory} to start anew"
            )

    def _read(self, step: int, path: Path, form: Form) -> Checkpoint:
        record = read_record(path)
        if self._about is not None:
            refuse_other_origin(path, record.about, self._about)
        like = form(record.notes)
        leaves.refuse_other_layout(path, record.leaves, leaves.layout(like))
        if record.step != step:
            raise ValueError(
                f"expected the checkpoint of step {step} in {path}, got that of step "
                f"{record.step}; give the directory its name again, or remove it"
            )
        arrays, _ = store.read(path)
        try:
            return Checkpoint(step, leaves.from_host(arrays, like), record.notes)
        except ValueError as error:
            raise ValueError(
                f"the checkpoint {path} cannot be restored: {error}"
            ) from error

    def _set_aside(self, step: int, path: Path) -> str:
        """Renames a damaged checkpoint; says what has become of it."""
        aside = self.directory / f"{step}.damaged"
        count = 1
        while aside.exists():
            count += 1
            aside = self.directory / f"{step}.damaged{count}"
        if jax.process_index() == 0:
            try:
                self._make_and_lock(step)
                path.rename(aside)
            except (OSError, ValueError) as error:  # In use, or not to be written.
                return f"stays where it is ({first_line(error)})"
        return f"is now {aside}"
