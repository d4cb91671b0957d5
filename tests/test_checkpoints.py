"""Checkpoints of a run: what comes back and what is kept, also of crash and damage."""

import math
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import SETTINGS, images, perceptron, step_of

from d2sparse import train
from d2sparse.checkpoint import (
    Checkpoint,
    Checkpoints,
    leaves,
    load_sparse,
    save_sparse,
    store,
)
from d2sparse.rules import rigl
from d2sparse.schedules import every
from d2sparse.transforms import sparsify


@pytest.fixture(scope="module")
def run():
    """A sparse run: its compiled step with donated state, and a maker of states."""
    model, data = perceptron(), images()
    tx = sparsify(optax.adamw(1e-2), rigl(0.5, 0.3), every(2), key=1)
    step = jax.jit(step_of(model, data, tx), donate_argnums=0)

    def advance(state):
        return step(state, data, np.arange(8))[0]

    start = jax.jit(
        lambda seed: train.init_state(model, tx, data, jax.random.key(seed), SETTINGS)
    )
    return step, advance, start


def bits(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


def snapshot(state):
    return [(str(x.dtype), x.shape, bits(x)) for x in jax.tree.leaves(state)]


def weights(value):
    return {"b": np.full(3, value), "w": jnp.full((4, 2), value)}


def steps(directory):
    return sorted({path.name for path in Path(directory).iterdir()} - {"lock"})


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_a_run_resumes_bit_for_bit_without_compiling_again(run, tmp_path):
    step, advance, start = run
    state = start(0)
    for _ in range(3):
        state = advance(state)
    with Checkpoints(tmp_path / "run", about={"steps": 5}) as checkpoints:
        checkpoints.save(3, state, notes={"epoch": 1})
        saved = snapshot(state)
        for _ in range(2):
            state = advance(state)  # Donates what was just saved.
    compiled = step._cache_size()
    reopened = Checkpoints(tmp_path / "run", about={"steps": 5})
    restored = reopened.restore(like=start(7))
    assert isinstance(restored, Checkpoint)
    assert (restored.step, restored.notes) == (3, {"epoch": 1})
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert snapshot(restored.state) == saved != snapshot(state)
    assert not any(leaf.committed for leaf in jax.tree.leaves(restored.state))
    resumed = advance(advance(restored.state))
    assert snapshot(resumed) == snapshot(state)
    assert step._cache_size() == compiled


def test_the_values_are_those_of_the_call(tmp_path, monkeypatch):
    gate, write = threading.Event(), store.write

    def wait_and_write(*arguments):
        assert gate.wait(60)
        write(*arguments)

    monkeypatch.setattr(store, "write", wait_and_write)
    state = weights(1.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)  # Returns before anything is written.
        state["b"][:] = 2
        state["w"].delete()
        gate.set()
    restored = checkpoints.restore(weights(0.0)).state
    assert (restored["b"] == 1).all()
    assert (restored["w"] == 1).all()


def test_what_is_restored_is_what_was_given(tmp_path):
    word = np.array([0x7FC1, 0x8000, 0x7F80, 0x0001], np.uint16)
    state = {
        "half": jnp.asarray(word.view(jnp.bfloat16)),
        "empty": jnp.zeros((0, 3), jnp.float16),
        "scalar": jnp.int32(-3),
        "bool": jnp.array([[True], [False]]),
        "keys": jax.random.split(jax.random.key(3, impl="rbg"), 2),
        "numpy": np.array([math.pi, math.nan, -0.0]),
        "numpy scalar": np.int64(2**40),
        "numbers": [True, 7, 0.1],
        "nothing": None,
        "a/b.c']": np.arange(3)[::-1],
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
    like = jax.tree.map(lambda x: x, state)
    like["half"] = jax.ShapeDtypeStruct((4,), jnp.bfloat16)
    like["keys"] = jax.eval_shape(lambda: state["keys"])
    got = checkpoints.restore(like).state
    assert jax.tree.structure(got) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(state), strict=True):
        assert isinstance(a, jax.Array) or type(a) is type(b)
        assert (np.shape(a), a.dtype) == (b.shape, b.dtype) if np.ndim(b) else True
    assert got["numbers"] == [True, 7, 0.1]
    assert isinstance(got["half"], jax.Array)
    arrays = [name for name in state if name not in ("numbers", "nothing")]
    for name in arrays:
        assert bits(got[name]) == bits(state[name]), name
    assert got["keys"].dtype == state["keys"].dtype


def test_a_state_without_entries(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"e": jnp.zeros((0, 2)), "n": ()})
    assert checkpoints.restore({"e": jnp.ones((0, 2)), "n": ()}).state["e"].size == 0


def test_notes_come_back_exactly(tmp_path):
    notes = {"a": 0.1 + 0.2, "b": [1e-320, -0.0, 2**70], "c": {"d": None, "e": "ü\n"}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, weights(1.0), notes={**notes, "f": math.inf})
        got = checkpoints.restore(weights(0.0)).notes
    assert got == {**notes, "f": math.inf}
    assert math.copysign(1, got["b"][1]) == -1


def test_sharded_arrays_are_restored_sharded(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    sharding = NamedSharding(mesh, P("data"))
    state = jax.device_put({"w": jnp.arange(16.0).reshape(16, 1)}, sharding)
    state["key"] = jax.device_put(jax.random.key(2), NamedSharding(mesh, P()))
    like = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        got = checkpoints.restore(like).state
    assert snapshot(got) == snapshot(state)
    assert got["w"].sharding == sharding
    assert len(got["key"].sharding.device_set) == 8


def test_an_array_that_lies_elsewhere_is_refused():
    class Part:
        is_fully_addressable = is_fully_replicated = False
        dtype, shape, sharding = "float32", (4,), "one over processes"

    with pytest.raises(ValueError, match=r"as a whole at \['w'\], got float32\[4\] wi"):
        leaves._check_whole("['w']", Part())


def test_the_latest_and_the_best_are_kept(tmp_path):
    scores = {1: 0.5, 2: math.nan, 3: 0.9, 4: None, 5: 0.9, 6: 0.1, 7: -math.inf}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, weights(float(step)), score=score)
    assert steps(tmp_path) == ["5", "6", "7"]
    assert checkpoints.best(weights(0.0)).step == 5
    assert checkpoints.best(weights(0.0)).state["b"][0] == 5
    assert checkpoints.restore(weights(0.0)).step == 7


def test_without_checkpoints_there_is_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.restore(weights(0.0)) is None
    assert checkpoints.best(weights(0.0)) is None
    assert not (tmp_path / "none").exists()
    with checkpoints:
        checkpoints.save(1, weights(1.0))
        checkpoints.save(2, weights(1.0), score=math.nan)
    assert checkpoints.best(weights(0.0)) is None


def test_a_step_is_replaced(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, weights(1.0), score=1.0)
        checkpoints.save(4, weights(2.0), score=0.5)
    assert steps(tmp_path) == ["4"]
    assert checkpoints.restore(weights(0.0)).state["b"][0] == 2
    with checkpoints:
        checkpoints.save(2, weights(3.0))  # Not removed, though there is a later one.
    assert steps(tmp_path) == ["2", "4"]


def cut(content):
    return content[: len(content) // 2]


def flip(place):
    def change(content):
        i = int(place * (len(content) - 1))
        return content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :]

    return change


DAMAGES = {
    "half": cut,
    "all but the last byte": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "first byte": flip(0),
    "middle byte": flip(0.5),
    "last byte": flip(1),
    "missing": lambda content: None,
}


def damage(path, how):
    changed = DAMAGES[how](path.read_bytes())
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Checkpoints of steps 10 and 20, the later one better, and 30, the worst."""
    directory = tmp_path_factory.mktemp("three") / "run"
    with Checkpoints(directory, keep=3) as checkpoints:
        for step, score in [(10, 0.5), (20, 0.9), (30, 0.1)]:
            checkpoints.save(step, weights(float(step)), score=score)
    return directory


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_to_any_file_is_found_and_the_previous_used(three, tmp_path, how):
    names = [path.relative_to(three) for path in files(three / "30")]
    assert len(names) > 5
    for i, name in enumerate(names):
        directory = tmp_path / str(i)
        shutil.copytree(three, directory)
        damage(directory / name, how)
        with pytest.warns(UserWarning, match=rf"{directory}/30 is damaged: .*30\.dam"):
            restored = Checkpoints(directory).restore(weights(0.0))
        assert (restored.step, restored.state["b"][0]) == (20, 20.0), name
        assert steps(directory) == ["10", "20", "30.damaged"]
        assert Checkpoints(directory).restore(weights(0.0)).step == 20  # No warning.


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_everywhere_is_an_error(three, tmp_path, how):
    directory = tmp_path / "run"
    shutil.copytree(three, directory)
    for step in ("10", "20", "30"):
        damage(files(directory / step)[-1], how)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match=r"not damaged, got .*/30 \(.*/20 \(.*; remove"),
    ):
        Checkpoints(directory).restore(weights(0.0))
    assert steps(directory) == ["10.damaged", "20.damaged", "30.damaged"]
    with pytest.raises(ValueError, match=r"got .*/10\.damaged, .*30\.damaged; remove"):
        Checkpoints(directory).restore(weights(0.0))


def test_a_damaged_best_gives_way_to_the_next(three, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(three, directory)
    shutil.copytree(three / "20", directory / "20.damaged")  # From before.
    damage(directory / "20" / "manifest.json", "half")
    with pytest.warns(UserWarning, match=r"20 is damaged: .*manifest.*20\.damaged2"):
        best = Checkpoints(directory).best(weights(0.0))
    assert (best.step, best.state["b"][0]) == (10, 10.0)
    assert steps(directory) == ["10", "20.damaged", "20.damaged2", "30"]


def test_a_damaged_one_among_those_without_a_score(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, weights(1.0))
        checkpoints.save(2, weights(2.0))
    damage(tmp_path / "2" / "manifest.json", "half")
    with pytest.warns(UserWarning, match="2 is damaged"):
        assert checkpoints.best(weights(0.0)) is None
    assert checkpoints.restore(weights(0.0)).step == 1


def test_links_and_paths_that_lead_outside_are_refused(three, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(three, directory)
    data = files(directory / "30" / "arrays")[0]
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(store.Damaged, match="neither a file nor a directory"):
        store.read(directory / "30")
    for name in ("../10/manifest.json", str(directory / "10" / "manifest.json")):
        manifest = store._read_manifest(directory / "20")
        manifest.files[name] = store._fingerprint(directory / "10" / "manifest.json")
        with pytest.raises(store.Damaged, match="is outside of it"):
            store._check_files(directory / "20", manifest)


def test_another_version_is_refused(three, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store, "FORMAT", 2)
        store.write(tmp_path / "5", {"w": np.ones(3)}, {})
    with pytest.raises(ValueError, match=r"expected format 1, got 2 in .*/5; read it"):
        Checkpoints(tmp_path).restore(weights(0.0))
    assert steps(tmp_path) == ["5"]


def test_another_configuration_is_refused(tmp_path):
    about = {"steps": 100, "sizes": (1, 2), "rate": math.nan, "old": 1}
    with Checkpoints(tmp_path, about) as checkpoints:
        checkpoints.save(1, weights(1.0))
    assert Checkpoints(tmp_path, about).restore(weights(0.0)).step == 1
    assert Checkpoints(tmp_path).restore(weights(0.0)).step == 1
    changed = {"steps": 200, "sizes": (1, 2), "rate": math.nan, "new": "x"}
    with pytest.raises(ValueError, match="another configuration") as error:
        Checkpoints(tmp_path, changed).restore(weights(0.0))
    fields = (
        "steps was 100 and is 200, new was absent and is x, old was 1 and is absent"
    )
    assert f": {fields}; " in str(error.value)
    assert steps(tmp_path) == ["1"]


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            {"b": np.ones(3), "w": jnp.ones((4, 3))},
            r"\['w'\] was float32\[4, 2\] and i",
        ),
        ({"b": np.ones(3, np.float16), "w": jnp.ones((4, 2))}, r"is float16\[3\];"),
        ({"b": np.ones(3)}, r"\['w'\] was float32\[4, 2\] and is absent;"),
        ({**weights(0.0), "v": jnp.ones(1)}, r"\['v'\] was absent and is float32\[1\]"),
        ({i: np.ones(1) for i in "acdefgh"}, r"\['d'\] was .* and 6 more; give"),
        ((np.ones(3), jnp.ones((4, 2))), r"\[0\] was absent and is float64\[3\]"),
        ({"b": jax.random.key(0), "w": jnp.ones((4, 2))}, r"is key<fry>\[\];"),
    ],
)
def test_another_layout_is_refused(three, like, message):
    with pytest.raises(ValueError, match=rf"30 was made with another code .*{message}"):
        Checkpoints(three).restore(like)
    assert steps(three) == ["10", "20", "30"]


def test_what_cannot_be_saved_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="keep at least 1 checkpoint, got 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="`about` of numbers"):
        Checkpoints(tmp_path, about={"w": np.ones(2)})
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"`notes` of numbers.*\.tolist"):
        checkpoints.save(1, weights(1.0), notes={"x": jnp.ones(2)})
    with pytest.raises(ValueError, match="step of at least 0, got -1"):
        checkpoints.save(-1, weights(1.0))
    assert not steps(tmp_path)


def test_an_error_in_the_background_reaches_the_caller(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, weights(10.0))
    checkpoints.wait()

    def full(directory, *_):
        raise OSError(28, "No space left on device", str(directory))

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write_manifest", full)
        checkpoints.save(20, weights(20.0))
        with pytest.raises(
            OSError, match=r"step 20 .*No space left.* step 10 is intact"
        ):
            checkpoints.save(30, weights(30.0))
        with pytest.raises(OSError, match="step 40"), checkpoints:
            checkpoints.save(40, weights(40.0))
        first = Checkpoints(tmp_path / "first")
        first.save(1, weights(1.0))
        with pytest.raises(OSError, match="no earlier checkpoint; free some space"):
            first.wait()
    checkpoints.wait()  # Told once.
    assert steps(tmp_path) == ["10", "first"]
    with checkpoints:
        checkpoints.save(50, weights(50.0))
    assert steps(tmp_path) == ["10", "50", "first"]


def test_what_a_crash_has_left_is_ignored_and_removed(three, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(three, directory)
    shutil.copytree(three / "10", directory / ".40.tmp")
    shutil.copytree(three / "10" / "arrays", directory / ".5.removed")
    (directory / "30").rename(directory / ".30.old")  # In the middle of a replacement.
    checkpoints = Checkpoints(directory, keep=3)
    assert checkpoints.restore(weights(0.0)).step == 30
    with checkpoints:
        checkpoints.save(30, weights(31.0))
        assert checkpoints.restore(weights(0.0)).state["b"][0] == 31
    assert steps(directory) == ["10", "20", "30"]


def test_nothing_is_unpickled(three, tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    trap = pickle.dumps(Trap())

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    directory = tmp_path / "run"
    shutil.copytree(three, directory)
    (directory / "20" / "extra.pkl").write_bytes(trap)
    (directory / "30" / "arrays" / "checkpoint").write_bytes(trap)
    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    with pytest.warns(UserWarning, match="arrays/checkpoint was not written with it"):
        assert Checkpoints(directory).restore(weights(0.0)).step == 20
    path = tmp_path / "objects"
    store.write(path, {"w": np.ones(1)}, {})
    manifest = (path / "manifest.json").read_bytes().replace(b"float64", b"object")
    (path / "manifest.json").write_bytes(manifest)
    (path / "manifest.sha256").write_bytes(store._checksum(manifest))
    with pytest.raises(store.Damaged, match="array of numbers at 'w', got object"):
        store.read(path)
    assert not (tmp_path / "sprung").exists()


def python(script, *arguments):
    """Runs a program of its own; jax starts on one device."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    root = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": root},
        check=False,
        timeout=300,
    )


# A child is forked for every kill, before jax starts any thread.
KILLED = """
import os, signal, sys
import numpy as np
from d2sparse.checkpoint import Checkpoints

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def child(directory, kill_at):
    count = -1
    def hook(event, arguments):
        nonlocal count
        if count >= 0 and event in EVENTS and "run" in str(arguments[0]):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(10, {"w": np.full(1000, 10.0)})
        checkpoints.save(20, {"w": np.full(1000, 20.0)})
        checkpoints.wait()
        count = 0
        checkpoints.save(20, {"w": np.full(1000, 21.0)})
        checkpoints.save(30, {"w": np.full(1000, 30.0)})

kill_at, status = 1, None
while status != 0:
    pid = os.fork()
    if pid == 0:
        child(f"{sys.argv[1]}/run{kill_at}", kill_at)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    kill_at += int(sys.argv[2])
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_good_checkpoints(tmp_path):
    done = python(KILLED, tmp_path, 7)
    assert done.returncode == 0, done.stderr
    found = set()
    for directory in tmp_path.iterdir():
        restored = Checkpoints(directory).restore({"w": np.zeros(1000)})
        found.add((restored.step, restored.state["w"][0]))
        for path in Checkpoints(directory)._paths().values():
            store.read(path)
        with Checkpoints(directory) as checkpoints:
            checkpoints.save(40, {"w": np.full(1000, 40.0)})
        assert len(steps(directory)) == 2
    assert found == {(20, 20.0), (20, 21.0), (30, 30.0)}
    assert len(list(tmp_path.iterdir())) > 8


FULL = """
import resource, signal, sys
import numpy as np
from d2sparse.checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(20, {"w": np.arange(1000.0)})
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
checkpoints.save(30, {"w": np.random.default_rng(0).normal(size=100_000)})
try:
    checkpoints.wait()
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
Checkpoints(sys.argv[2]).save(20, {"w": np.zeros(3_000_000)})  # And the program ends.
"""


def test_a_full_disk_leaves_the_last_checkpoint_and_an_end_loses_none(tmp_path):
    done = python(FULL, tmp_path / "run", tmp_path / "left")
    assert done.returncode == 0, done.stderr
    message = f"expected to write the checkpoint of step 30 to {tmp_path}/run, got "
    assert done.stdout.startswith(message)
    assert "of step 20 is intact; raise the limit of file sizes" in done.stdout
    assert steps(tmp_path / "run") == ["20"]
    restored = Checkpoints(tmp_path / "run").restore({"w": np.zeros(1000)})
    np.testing.assert_array_equal(restored.state["w"], np.arange(1000.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored = Checkpoints(tmp_path / "left").restore({"w": np.ones(3_000_000)})
    assert restored is not None or "write the checkpoint of step 20" in done.stderr


# What a target asks for


@pytest.mark.parametrize(
    "value",
    [
        np.array(["a", "bc"]),
        np.array([b"a"]),
        np.array([None, 1], object),
        np.zeros(2, [("a", "i4"), ("b", "f4")]),
        np.zeros(2, "V8"),
        np.zeros(2, "datetime64[s]"),
        np.zeros(2, np.longdouble),
        np.zeros(2, ">f4"),
        np.ma.array([1.0, 2.0], mask=[True, False]),
        jnp.zeros(2, jnp.uint4),
        "text",
        2**70,
    ],
    ids=lambda value: f"{type(value).__name__}-{np.asarray(value).dtype}",
)
def test_what_is_no_array_of_numbers_is_refused_at_once(value, tmp_path):
    with pytest.raises(
        ValueError, match=r"numbers or bool at \['x'\]\['y'\], got .* l"
    ):
        Checkpoints(tmp_path / "run").save(1, {"w": np.ones(2), "x": {"y": value}})
    if hasattr(value, "shape"):
        kept = {"w": np.ones(value.shape, bool)}
        with pytest.raises(ValueError, match="numbers or bool at 'w', got "):
            save_sparse(tmp_path / "ticket", {"w": value}, kept)
    assert not steps(tmp_path)


def abstract(leaf, sharding=None):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@pytest.mark.parametrize(
    "axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit]
)
def test_targets_are_honoured_concrete_or_abstract(tmp_path, axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), (axis_type,) * 2)
    weights = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    saved = {"w": weights, "key": jax.random.split(jax.random.key(1), 8)}
    kept = {"w": weights > 0}
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, saved)
    save_sparse(tmp_path / "ticket", {"w": weights}, kept)
    rows = NamedSharding(mesh, P("x", "y"))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    keys = NamedSharding(mesh, P("y"))
    for sharding, own in ((rows, keys), (one, one)):
        concrete = jax.device_put(weights, sharding)
        for like in (concrete, abstract(concrete, sharding)):
            key = abstract(saved["key"], own)
            got = checkpoints.restore({"w": like, "key": key}).state
            sparse, masks = load_sparse(tmp_path / "ticket", {"w": like})
            for leaf in (got["w"], sparse["w"]):
                assert (leaf.sharding, leaf.dtype) == (sharding, weights.dtype)
                np.testing.assert_array_equal(leaf, weights)
            assert masks["w"].sharding == sharding
            assert got["key"].sharding == own
            assert bits(got["key"]) == bits(saved["key"])
    with jax.set_mesh(mesh):
        traced = jax.eval_shape(lambda x: 2 * x, jax.device_put(weights, rows))
        sparse, _ = load_sparse(tmp_path / "ticket", {"w": traced})
    if axis_type == jax.sharding.AxisType.Explicit:
        assert sparse["w"].sharding == rows
        with pytest.raises(ValueError, match="a sharding with devices at 'w'"):
            load_sparse(tmp_path / "ticket", {"w": traced})
    plain, _ = load_sparse(tmp_path / "ticket", {"w": abstract(weights)})
    assert not plain["w"].committed


def test_what_jax_would_narrow_is_refused_and_numpy_keeps_it(tmp_path):
    weights, kept = {"w": np.array([1 / 3, 0.0])}, {"w": np.array([True, False])}
    save_sparse(tmp_path / "ticket", weights, kept)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, weights)
    reads = (
        lambda like: load_sparse(tmp_path / "ticket", like)[0],
        lambda like: checkpoints.restore(like).state,
    )
    for read in reads:
        got = read(weights)["w"]
        assert type(got) is np.ndarray
        np.testing.assert_array_equal(got, weights["w"])
        like = {"w": jax.ShapeDtypeStruct((2,), np.float64)}
        with pytest.raises(ValueError, match=r"float64 at .*w.* would hold as float32"):
            read(like)
        with jax.enable_x64(True):
            got = read(like)["w"]
            assert (isinstance(got, jax.Array), got.dtype) == (True, np.float64)
            np.testing.assert_array_equal(got, weights["w"])
    assert steps(tmp_path / "run") == ["1"]


def test_the_rest_of_a_complete_replacement_is_removed(three, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(three, directory)
    shutil.copytree(three / "10", directory / ".20.old")
    with Checkpoints(directory, keep=5) as checkpoints:
        checkpoints.save(40, weights(40.0))
    assert steps(directory) == ["10", "20", "30", "40"]
