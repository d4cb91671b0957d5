"""Runs of several processes, with real ones that meet over loopback.

Sums over a batch that is cut up are added in another order: weights of several
processes differ from those of one by what float32 rounds, masks do not differ.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
import runs
import several
from test_data_sources import labelled, prepare

from d2sparse import records, train
from d2sparse.checkpoint import store
from d2sparse.study import processes
from d2sparse.train import devices

UNIT = "rigl-seed0"
FLAGS = [
    "--methods=rigl",
    "--sparsity=0.8",
    "--seeds=1",
    "--width=0.1",
    "--steps=30",
    "--report_every=15",
    "--refresh_interval=4",
    "--noprogress",
    "--data_parallel=0",
]
TIMEOUT = 240  # Seconds after which a test that hangs is given up.


def start(count, *command):
    """The processes of one run, each told in its last word which one it is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Those of the tests, without fake devices.
    given = os.environ["XLA_FLAGS"].split()
    flags = " ".join(flag for flag in given if "device_count" not in flag)
    own = {"XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": "", "PYTHONPATH": "."}
    places = [f"127.0.0.1:{port},{count},{index}" for index in range(count)]
    *words, last = command
    return [
        subprocess.Popen(
            [sys.executable, *words, last + (place if count > 1 else "")],
            cwd=runs.ROOT,
            env=os.environ | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in places
    ]


def prune(workdir, count, every=30):
    """An experiment on so many processes, with a checkpoint every so many steps."""
    flags = [*FLAGS, f"--checkpoint_every={every}", f"--workdir={workdir}"]
    return start(count, "-m", "experiments.prune", *flags, "--distributed=")


def finish(started):
    """Waits for processes that have to succeed."""
    ends = [process.communicate(timeout=TIMEOUT) for process in started]
    for process, (_, errors) in zip(started, ends, strict=True):
        assert process.returncode == 0, errors


def cut_off(workdir, count, number):
    """Signals the last process of a run that has a checkpoint; what the others say."""
    started = prune(workdir, count, every=1)
    checkpoints, end = workdir / "checkpoints" / UNIT, time.monotonic() + TIMEOUT
    while not list(checkpoints.glob("[0-9]*")):
        assert time.monotonic() < end, "no checkpoint has been written"
        assert all(process.poll() is None for process in started)
        time.sleep(0.01)
    started[-1].send_signal(number)
    said = [process.communicate(timeout=TIMEOUT)[1] for process in started[:-1]]
    started[-1].communicate(timeout=TIMEOUT)
    assert not (workdir / "units" / f"{UNIT}.json").exists(), "it was killed too late"
    return said, [process.returncode for process in started]


def assert_same(workdir, reference):
    """One unit learned the same twice, but for rounding."""
    found, expected = (
        runs.read(path / "units" / f"{UNIT}.json") for path in (workdir, reference)
    )
    for name in ("nonzeros", "inference_macs", "zeros"):
        assert found[name] == expected[name]
    np.testing.assert_allclose(found["nll"], expected["nll"], rtol=1e-5)
    for path in (workdir, reference):
        assert [row["step"] for row in records.read_metrics(path)] == [0, 15, 30]
    last, wanted = (
        store.read(path / "checkpoints" / UNIT / "30")[0]
        for path in (workdir, reference)
    )
    assert last.keys() == wanted.keys()
    assert any(array.dtype == bool and array.ndim == 2 for array in wanted.values())
    for name, array in wanted.items():
        if np.issubdtype(array.dtype, np.inexact):
            np.testing.assert_allclose(last[name], array, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(last[name], array)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of a single process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finish(prune(workdir, 1))
    return workdir


def assert_they_read_shares_and_learn_alike(root, count):
    examples = labelled(0, 27, (8, 8, 3)), labelled(1, 5, (8, 8, 3))
    prepare(root, dict(zip(("train", "test"), examples, strict=True)))
    finish(start(count, "tests/several.py", str(root), ""))
    with runs.quick_compilation():
        wanted = several.learn(root)
    found = [dict(np.load(root / f"{index}.npz")) for index in range(count)]
    decoded = [int(arrays.pop("decoded")) for arrays in found]
    assert sum(decoded) == 27 + 5
    assert max(decoded) <= -(-27 // count) + -(-5 // count)
    np.testing.assert_array_equal(wanted["images"], [image for image, _ in examples[0]])
    for arrays in found:
        assert arrays.keys() == wanted.keys()
        for name, array in wanted.items():
            if name.startswith("params/"):
                np.testing.assert_allclose(arrays[name], array, rtol=1e-5, atol=1e-6)
            else:
                np.testing.assert_array_equal(arrays[name], array)


def test_two_processes_read_shares_and_learn_what_one_does(tmp_path):
    assert_they_read_shares_and_learn_alike(tmp_path, 2)


@pytest.mark.slow
def test_four_processes_read_shares_and_learn_what_one_does(tmp_path):
    assert_they_read_shares_and_learn_alike(tmp_path, 4)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_learn_what_one_does(tmp_path, alone, count):
    finish(prune(tmp_path / "run", count))
    assert_same(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_killed_run_goes_on_in_another_number(tmp_path, alone, before, after):
    said, _ = cut_off(tmp_path / "run", before, signal.SIGKILL)
    for errors in said:
        assert "error: a process of this run has ended" in errors
    finish(prune(tmp_path / "run", after))
    assert_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_of_them(tmp_path):
    (errors,), codes = cut_off(tmp_path / "run", 2, signal.SIGTERM)
    assert "to go on where it stopped, run the same command again" in errors
    assert codes == [128 + signal.SIGINT, 128 + signal.SIGTERM]


def test_a_data_set_is_laid_once_and_for_as_long_as_it_is_needed():
    lay, where = devices.LayOnce(), train.place(train.make_mesh(2), stacked=False)
    data = {"images": jnp.ones((4, 2)), "labels": jnp.arange(4)}
    laid = lay(data, where.data)
    assert laid["images"].sharding == where.data
    np.testing.assert_array_equal(laid["labels"], np.arange(4))
    assert lay(dict(data), where.data) is laid
    other = data | {"labels": jnp.arange(4) + 1}
    np.testing.assert_array_equal(lay(other, where.data)["labels"], np.arange(4) + 1)
    elsewhere = train.place(train.make_mesh(4), stacked=False).data
    assert lay(other, elsewhere)["images"].sharding == elsewhere
    kept = weakref.ref(lay(other, elsewhere)["labels"])
    del laid, other
    assert kept() is None


@pytest.mark.parametrize(
    "text", ["somewhere", "host:1,2", "host:1,2,2", "host:0,2,1", "host:70000,2,1"]
)
def test_another_form_is_refused(text):
    with pytest.raises(ValueError, match="HOST:PORT,COUNT,INDEX"):
        processes.parse(text)


def test_a_process_alone_answers_for_itself():
    answers = [False]
    agreed = processes.Agreed(lambda: answers[0])
    assert not agreed()
    answers[0] = True
    assert agreed()


def test_without_the_flag_nothing_happens():
    with processes.joined(""):
        pass
