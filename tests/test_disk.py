"""Paths, errors of the operating system, and locks, at every door of the library."""

import dataclasses
import errno
import fcntl
import gc
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from d2sparse import data, disk, records, schema, study
from d2sparse.checkpoint import Checkpoints, load_sparse, save_sparse, store
from d2sparse.lottery import Ticket
from d2sparse.study.tuned import read_tuned
from experiments import benchmark

WEIGHTS, MASKS = {"w": jnp.eye(2)}, {"w": jnp.eye(2, dtype=bool)}
TICKET = Ticket(WEIGHTS, {}, MASKS)


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 1


# Paths

DOORS = {
    "Checkpoints": lambda path: Checkpoints(path),
    "save_sparse": lambda path: save_sparse(path, WEIGHTS, MASKS),
    "load_sparse": lambda path: load_sparse(path, WEIGHTS),
    "save_ticket": lambda path: study.save_ticket(path, TICKET),
    "open_run": lambda path: records.open_run(path, Config()),
    "read_metrics": lambda path: records.read_metrics(path),
    "data": lambda path: data.load("mnist", path),
    "tuned": lambda path: read_tuned("run", path),
    "workdir of tuned": lambda path: read_tuned(path),
    "out": lambda path: benchmark.out_path(path),
}


@pytest.mark.parametrize("door", DOORS)
def test_an_address_is_refused_and_nothing_is_made(door, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ("gs://bucket/run", Path("s3://bucket/run"), "a::hdfs://b/c"):
        own = re.escape(repr(os.fspath(address)))
        with pytest.raises(ValueError, match=f"on a local or mounted .*address {own}"):
            DOORS[door](address)
    with pytest.raises(ValueError, match="as a path, got '~nobody-of-that-name/run'"):
        DOORS[door]("~nobody-of-that-name/run")
    assert not list(tmp_path.iterdir())


def test_what_only_looks_like_an_address_is_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("lr=0.1:2/run", "c:/run", "a:b", "gs:", "~/run"):
        path = disk.local_path(name, "it")
        assert path == Path(name.replace("~", str(tmp_path)))
    save_sparse("~/ticket", WEIGHTS, MASKS)
    assert (load_sparse(str(tmp_path / "ticket"), WEIGHTS)[0]["w"] == jnp.eye(2)).all()
    assert Checkpoints("~/run").directory == tmp_path / "run"


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: None, "which does not exist"),
        (lambda path: path.mkdir(), "which holds no config.json"),
        (lambda path: path.write_text(""), "which does not exist"),
    ],
)
def test_measurements_of_no_run_are_refused(make, what, tmp_path):
    make(tmp_path / "nope")
    with pytest.raises(ValueError, match=f"a run directory, got .*nope, {what}; check"):
        records.read_metrics(tmp_path / "nope")
    with pytest.raises(
        ValueError, match=r"expected a file at .*lines, got No such file"
    ):
        records.complete_lines(tmp_path / "lines")


# Errors of the operating system

CAUSES = {
    errno.ENOSPC: "No space left on device.*free some space",
    errno.EDQUOT: "quota exceeded.*free some of your quota",
    errno.EFBIG: "File too large.*ulimit -f",
    errno.EACCES: "Permission denied.*change its permissions",
    errno.EROFS: "Read-only file system.*a file system that can be written",
    errno.ENOENT: "No such file.*nothing removes or renames it",
    errno.ENOTDIR: "Not a directory.*move the file away",
    errno.EISDIR: "Is a directory.*move the directory away",
    errno.EMFILE: "Too many open files.*ulimit -n",
    errno.ENAMETOOLONG: "File name too long.*a shorter path",
    errno.EIO: "Input/output error.*check the disk",
    errno.ESTALE: "Stale file handle.*mount the network file system again",
    errno.EXDEV: "cross-device link.*remove the cause that the message names",
}


def fail(number):
    def raised(*_, **__):
        raise OSError(number, os.strerror(number))

    return raised


@pytest.mark.parametrize("number", CAUSES)
def test_an_error_of_writing_says_its_cause(number, tmp_path, monkeypatch):
    run = records.open_run(tmp_path / "run", Config())
    run.start(records.Unit("rigl", 0))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail(number))
        with pytest.raises(OSError, match=rf"summary.json.*(?i:{CAUSES[number]})"):
            run.write_summary({})
        with pytest.raises(OSError, match=rf"metrics.jsonl.*(?i:{CAUSES[number]})"):
            run.log(records.Unit("rigl", 0), 0, {"loss": 1.0})
    monkeypatch.setattr(store, "_write_arrays", fail(number))
    checkpoints.save(1, WEIGHTS)
    with pytest.raises(OSError, match=rf"step 1 .*(?i:{CAUSES[number]})"):
        checkpoints.wait()
    with pytest.raises(OSError, match=rf"write .*ticket.*(?i:{CAUSES[number]})"):
        save_sparse(tmp_path / "ticket", WEIGHTS, MASKS)


def test_the_cause_is_found_behind_what_libraries_raise():
    for text in ("[OS error 28: No space left]", "[Errno 28] No", "os_error_code='28'"):
        assert disk.number_of(ValueError(text)) == errno.ENOSPC
    wrapped = RuntimeError("the save failed")
    wrapped.__cause__ = OSError(errno.EDQUOT, "quota")
    assert disk.remedy(wrapped) == "free some of your quota, or have it raised"
    assert disk.number_of(ValueError("nothing of the kind")) is None


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_what_cannot_be_read_for_now_is_not_called_damaged(
    number, tmp_path, monkeypatch
):
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, WEIGHTS)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_fingerprint", fail(number))
        with pytest.raises(OSError, match=rf"read .*(?i:{CAUSES[number]})"):
            checkpoints.restore(WEIGHTS)
    monkeypatch.setattr(store, "_read_arrays", memory)
    with pytest.raises(MemoryError):
        checkpoints.restore(WEIGHTS)
    monkeypatch.undo()
    assert checkpoints.restore(WEIGHTS).step == 1


def memory(*_):
    raise MemoryError


# Locks

HOLD = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("disk", sys.argv[1])
disk = importlib.util.module_from_spec(spec)
spec.loader.exec_module(disk)
from pathlib import Path
held = disk.lock(Path(sys.argv[2]), "it")
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lock of a directory."""
    started = []

    def start(directory):
        directory.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-c", HOLD, disk.__file__, directory / "lock"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_run_directory_in_use_names_its_process_and_survives_a_kill(tmp_path, holder):
    workdir = tmp_path / "run"
    process = holder(workdir)
    message = (
        rf"workdir .* in use by process {process.pid} on .* since \d{{4}}-.*; wait"
    )
    with pytest.raises(ValueError, match=message):
        records.open_run(workdir, Config())
    assert [path.name for path in workdir.iterdir()] == ["lock"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    run = records.open_run(workdir, Config())
    assert f'"pid": {os.getpid()}' in (workdir / "lock").read_text()
    assert records.open_run(workdir, Config()) == run  # This process has it already.
    with pytest.raises(BlockingIOError):
        take(workdir / "lock")
    del run
    gc.collect()
    os.close(take(workdir / "lock"))


def take(path):
    """As another process would."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def test_checkpoints_in_use_are_refused_at_the_first_save(tmp_path, holder):
    process = holder(tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.restore(WEIGHTS) is None
    with pytest.raises(ValueError, match=f"directory .* by process {process.pid} on"):
        checkpoints.save(1, WEIGHTS)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
    process.kill()
    process.wait()
    with checkpoints:
        checkpoints.save(1, WEIGHTS)


def test_a_reader_leaves_what_another_process_writes(tmp_path, holder, monkeypatch):
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, WEIGHTS)
        checkpoints.save(2, WEIGHTS)
    del checkpoints
    gc.collect()
    holder(tmp_path / "run")
    reader, read = Checkpoints(tmp_path / "run"), store.read

    def pruned(path):
        monkeypatch.setattr(store, "read", read)
        store.remove(path)  # As the holder does, in the middle of it.
        return read(path)

    monkeypatch.setattr(store, "read", pruned)
    assert reader.restore(WEIGHTS).step == 1
    (tmp_path / "run" / "1" / store.MANIFEST).write_bytes(b"")
    with (
        pytest.warns(
            UserWarning, match="1 is damaged: .* it stays where it is .*in us"
        ),
        pytest.raises(ValueError, match="checkpoint that is not damaged"),
    ):
        reader.restore(WEIGHTS)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "lock"]


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"pid": 1}'])
def test_a_holder_that_cannot_be_named_still_holds(tmp_path, holder, content):
    holder(tmp_path)
    (tmp_path / "lock").write_bytes(content)
    with pytest.raises(ValueError, match="it is in use by another process; wait"):
        disk.lock(tmp_path / "lock", "it")


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fail(errno.ENOLCK))
    with pytest.warns(UserWarning, match=r"run cannot be locked .*No locks available"):
        run = records.open_run(tmp_path / "run", Config())
    run.write_summary({})


# Schemas


def test_a_schema_names_what_is_wrong():
    @dataclasses.dataclass
    class Inner:
        flag: bool
        size: int | None

    form = dict[str, list[Inner] | float]
    right = {"a": [{"flag": True, "size": None}], "b": 1, "c": float("nan")}
    assert schema.parse(right, form)["a"] == [Inner(True, None)]
    for value, message in [
        (3, "it is 3, not an object"),
        ({"a": True}, "a is True, not"),
        ({"a": [{"flag": 1, "size": 1}]}, r"a\[0\].flag is 1, not bool"),
        ({"a": [{"flag": True, "size": 1.5}]}, r"a\[0\].size is 1.5, not"),
        ({"a": [{"flag": True}]}, r"a\[0\] lacks 'size'"),
        ({"a": [{"flag": True, "size": 1, "x": 2}]}, r"a\[0\] has the unknown 'x'"),
    ]:
        with pytest.raises(ValueError, match=message):
            schema.parse(value, form)
    assert np.isnan(schema.parse(right, form)["c"])
