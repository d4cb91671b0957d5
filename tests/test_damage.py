"""One run directory, damaged in every way: refused with a sentence, or resumed right.

The directory holds a finished unit, a failed one, one that was interrupted with two
checkpoints, and a ticket. Nothing is trained: states are made by hand.
"""

import dataclasses
import json
import shutil
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sparse import checkpoint, records, study
from d2sparse.checkpoint import store
from d2sparse.lottery import Ticket
from d2sparse.study.tracking import Tracker
from d2sparse.train import Faults, Progress, TrainState

CONFIG = study.Config(checkpoint_every=1)
DONE, FAILED, CUT = (records.Unit(name, 0) for name in ("dense", "set", "rigl"))
NUMBERS = dict.fromkeys(study.Finished.__required_keys__, 0.5)
FINISHED = {**NUMBERS, "method": "dense", "values": {"sparsity": 0.5}, "parts": []}


def make_progress(step):
    params = {"kernel": jnp.full((3, 2), float(step)), "bias": jnp.zeros(2)}
    faults = Faults(jnp.int32(0), jnp.int32(0), jnp.array(False))
    state = TrainState(jnp.int32(step), params, {}, (), jax.random.key(0), faults, {})
    return Progress(jnp.int32(0), state, {})


def begin(out, unit):
    tracker = Tracker(unit, CONFIG, out, lambda text: None, lambda: False)
    program = types.SimpleNamespace(
        init=lambda key, data, settings: make_progress(0),
        form=lambda phase, data, settings: make_progress(0),
    )
    return tracker, tracker.begin(program, None, {}, None)


def learn(out, unit):
    tracker, _ = begin(out, unit)
    for step in (10, 20):
        tracker.report(make_progress(step), {"loss": 1 / step, "macs": 2.0})
        tracker.save(make_progress(step), {})
    tracker.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    out = records.open_run(workdir, CONFIG, study.Finished)
    for unit in (DONE, CUT):
        learn(out, unit)
    out.finish(DONE, FINISHED)
    out.fail(FAILED, "it diverged")
    params = make_progress(1).state.params
    masks = {"kernel": jnp.eye(3, 2, dtype=bool), "bias": jnp.ones(2, bool)}
    params = jax.tree.map(jnp.multiply, params, masks)
    study.save_ticket(workdir / "ticket", Ticket(params, {}, masks))
    out.write_summary({"accuracy": 0.5})
    return workdir


def opened(workdir):
    """What an experiment reads of a run directory, in its order, as plain values."""
    shapes = {"params": make_progress(0).state.params, "model_state": {}}
    ticket = checkpoint.load_sparse(workdir / "ticket", shapes)
    out = records.open_run(workdir, CONFIG, study.Finished)
    found = {unit.name: out.finished(unit) for unit in (DONE, FAILED, CUT)}
    tracker, resumed = begin(out, CUT)
    values = (resumed.state.params, *ticket)
    return {
        **found,
        "failures": out.failures(),
        "account": dataclasses.asdict(tracker.account),
        "lines": records.read_metrics(workdir),
        "step": int(resumed.state.step),
        "arrays": [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(values)],
    }


def contents(workdir):
    paths = [path for path in workdir.rglob("*") if path.is_file()]
    return {
        path.relative_to(workdir): path.read_bytes()
        for path in paths
        if path.name != "lock" and ".damaged" not in str(path)
    }


def text(name, value):
    """In place of a file: what is given, or a function of its text."""

    def harm(workdir):
        path = workdir / name
        before = path.read_bytes() if path.is_file() else b""
        after = value(before) if callable(value) else value
        path.write_bytes(after if isinstance(after, bytes) else after.encode())

    return harm


def fields(name, change):
    """Changes the fields of a file."""
    return text(name, lambda before: json.dumps(changed(json.loads(before), change)))


def changed(value, change):
    change(value)
    return value


def line(number, change):
    """Changes the fields of a line of measurements."""

    def harm(before):
        lines = before.decode().splitlines()
        lines[number] = json.dumps(changed(json.loads(lines[number]), change))
        return "\n".join(lines) + "\n"

    return text("metrics.jsonl", harm)


def forged(name, change):
    """Changes a manifest, and gives it its checksum again."""

    def harm(workdir):
        manifest = json.loads((workdir / name / store.MANIFEST).read_text())
        content = json.dumps(changed(manifest, change)).encode()
        (workdir / name / store.MANIFEST).write_bytes(content)
        (workdir / name / store.CHECKSUM).write_bytes(store._checksum(content))

    return harm


def absent(name):
    def harm(workdir):
        path = workdir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return harm


def directory(name):
    def harm(workdir):
        absent(name)(workdir)
        (workdir / name).mkdir()

    return harm


def renamed(old, new):
    return lambda workdir: (workdir / old).rename(workdir / new)


def swapped(one, other):
    def harm(workdir):
        for old, new in ((one, "aside"), (other, one), ("aside", other)):
            (workdir / old).rename(workdir / new)

    return harm


def both(*harms):
    def harm(workdir):
        for own in harms:
            own(workdir)

    return harm


def put(**values):
    return lambda found: found.update(values)


def drop(*names):
    return lambda found: [found.pop(name) for name in names]


def within(name, change):
    return lambda found: change(found[name])


def retyped(manifest):
    for array in manifest["arrays"]:
        if "kernel" in array["name"]:
            array["dtype"] = "int32"


def reshaped(manifest):
    for array in manifest["arrays"]:
        array["shape"] = array["shape"][::-1]


def doubled(manifest):
    manifest["arrays"].append(manifest["arrays"][0])


def mislaid(manifest):
    for array in manifest["arrays"]:
        array["name"] = array["name"].replace("values/", "weights/")


OUT, CHECKPOINT, NOTES = "units/dense-seed0.json", "checkpoints/rigl-seed0/20", "notes"
OLDER = "checkpoints/rigl-seed0/10"
SAME, EARLIER, AGAIN = "the same", "the checkpoint before", "it is run again"
LINES = "metrics.jsonl is damaged, its lines of dense-seed0"
VERSION = "20.* not written by this version of d2sparse: "
CODE = "step 20 of rigl-seed0 was not written by this version of the code: "
TICKET = r"written by `save_sparse`, got .*ticket.*"
DAMAGES = {
    "nothing": (lambda workdir: None, SAME),
    # The configuration.
    "no config": (absent("config.json"), "not those of a run"),
    "empty config": (text("config.json", ""), "config.json is not the configuration"),
    "config {}": (text("config.json", "{}"), "config.json is not the configuration"),
    "config of bytes": (text("config.json", b"\xff\0"), "is not the configuration"),
    "config cut": (text("config.json", lambda b: b[:99]), "is not the configuration"),
    "deep config": (text("config.json", "[" * 99999), "is not the configuration"),
    "config directory": (directory("config.json"), "config.json.*Is a directory"),
    "config key lost": (fields("config.json", drop("steps")), "steps was absent and"),
    "config key more": (fields("config.json", put(depth=3)), "depth was 3 and is abs"),
    "config type": (fields("config.json", put(steps="1000")), "steps was 1000 and is"),
    "config of an earlier version": (
        fields("config.json", lambda c: (c.pop("axes"), c.update(sparsities=[0.8]))),
        r"axes was absent and is {}, sparsities was \[0.8\] and is absent; give",
    ),
    # Measurements.
    "no metrics": (absent("metrics.jsonl"), LINES),
    "empty metrics": (text("metrics.jsonl", ""), LINES),
    "metrics directory": (directory("metrics.jsonl"), "metrics.jsonl.*Is a directory"),
    "metrics of bytes": (text("metrics.jsonl", b"\xff\0\n"), "jsonl line 1 is damaged"),
    "half a line more": (text("metrics.jsonl", lambda b: b + b'{"un'), SAME),
    "a line lost": (text("metrics.jsonl", lambda b: b.split(b"\n", 1)[1]), LINES),
    "a line twice": (
        text("metrics.jsonl", lambda b: b.split(b"\n")[0] + b"\n" + b),
        LINES,
    ),
    "lines {}": (
        text("metrics.jsonl", lambda b: b + b"{}\n"),
        "line 7 is damaged, it l",
    ),
    "a step of text": (
        line(0, put(step="0")),
        "line 1 is damaged, step is '0', not int",
    ),
    "a metric of text": (line(1, put(loss="low")), "line 2 is damaged, loss is 'low'"),
    "another seed": (line(1, put(seed=1)), "line 2 is damaged, its unit is not dense"),
    "another number": (line(1, put(loss=0.7)), LINES),
    "another number of the interrupted": (
        line(4, put(loss=0.7)),
        "3 lines of rigl-seed0 .* got 3 or others; remove checkpoints/rigl-seed0",
    ),
    # Results.
    "result {}": (text(OUT, "{}"), "dense-seed0.json is damaged, it lacks 'seal'; rem"),
    "empty result": (text(OUT, ""), "dense-seed0.json is damaged, got ''; remove"),
    "result cut": (text(OUT, lambda b: b[:50]), "dense-seed0.json is damaged, got"),
    "result of bytes": (text(OUT, b"\x80\x81"), "dense-seed0.json is damaged, got"),
    "result directory": (directory(OUT), "dense-seed0.json, got Is a directory"),
    "result null": (text(OUT, "null"), "dense-seed0.json is damaged, it is nan"),
    "result key lost": (fields(OUT, drop("nll")), "is not what was written; remove"),
    "result key more": (fields(OUT, put(more=1)), "is not what was written; remove"),
    "result type": (fields(OUT, put(nll="NaN")), "is not what was written; remove"),
    "result number": (fields(OUT, put(nll=0.4)), "is not what was written; remove"),
    "seal cut": (fields(OUT, within("seal", drop("metrics"))), "seal lacks 'metrics'"),
    "results swapped": (swapped(OUT, "units/set-seed0.json"), "holds results of"),
    "no result": (absent("units/set-seed0.json"), AGAIN),
    "a file among units": (text("units/notes.json", "{}"), "results of units.*notes.j"),
    # Checkpoints.
    "no arrays": (absent(f"{CHECKPOINT}/arrays"), EARLIER),
    "no checksum": (absent(f"{CHECKPOINT}/{store.CHECKSUM}"), EARLIER),
    "manifest {}": (text(f"{CHECKPOINT}/{store.MANIFEST}", "{}"), EARLIER),
    "a checkpoint is a file": (
        both(absent(CHECKPOINT), text(CHECKPOINT, "20")),
        EARLIER,
    ),
    "no older checkpoint": (absent(OLDER), SAME),
    "steps swapped": (swapped(CHECKPOINT, OLDER), "of step 20 in .*/20, got that of"),
    "units swapped": (
        swapped("checkpoints/rigl-seed0", "checkpoints/dense-seed0"),
        "20 belongs to another configuration: unit was dense-seed0 and is rigl-seed0",
    ),
    "steps renamed": (renamed(CHECKPOINT, f"{OLDER}0"), "step 100 .*that of step 20"),
    "forged {}": (forged(CHECKPOINT, lambda m: m.clear()), f"{VERSION}it lacks 'for"),
    "forged format": (forged(CHECKPOINT, put(format=9)), "expected format 1, got 9 in"),
    "forged type": (forged(CHECKPOINT, put(arrays=3)), f"{VERSION}arrays is 3, not a"),
    "forged key lost": (
        forged(CHECKPOINT, drop("files")),
        f"{VERSION}it lacks 'files'",
    ),
    "forged key more": (forged(CHECKPOINT, put(more=1)), f"{VERSION}it has the unkn"),
    "forged note lost": (
        forged(CHECKPOINT, within("notes", drop("leaves"))),
        f"{VERSION}it lacks 'leaves'",
    ),
    "forged note more": (
        forged(CHECKPOINT, within("notes", put(more=1))),
        f"{VERSION}it has the unknown 'more'",
    ),
    "forged score": (
        forged(CHECKPOINT, within("notes", put(score="high"))),
        f"{VERSION}score is 'high', not",
    ),
    "forged dtype": (forged(CHECKPOINT, retyped), r"20 cannot be restored: .*int32\[3"),
    "forged shape": (forged(CHECKPOINT, reshaped), EARLIER),
    "forged arrays": (forged(CHECKPOINT, doubled), "one array of every name in .*20"),
    "account key lost": (
        forged(CHECKPOINT, within("notes", within(NOTES, drop("spent")))),
        f"{CODE}it lacks 'spent'",
    ),
    "account key more": (
        forged(CHECKPOINT, within("notes", within(NOTES, put(more=1)))),
        f"{CODE}it has the unknown 'more'; remove checkpoints/rigl-seed0",
    ),
    "account type": (
        forged(CHECKPOINT, within("notes", within(NOTES, put(parts={})))),
        f"{CODE}parts is {{}}, not a list",
    ),
    "account phase": (
        forged(CHECKPOINT, within("notes", within(NOTES, put(phase="1")))),
        f"{CODE}phase is '1', not int",
    ),
    "account of other lines": (
        forged(CHECKPOINT, within("notes", within(NOTES, put(lines=2)))),
        "expected 2 lines of rigl-seed0 in .* or others; remove checkpoints",
    ),
    "account of another step": (
        forged(CHECKPOINT, within("notes", within(NOTES, put(taken=9)))),
        f"{CODE}its state stands at step 9",
    ),
    # Tickets.
    "no ticket": (absent("ticket"), TICKET),
    "a ticket of a checkpoint": (
        both(absent("ticket"), renamed(OLDER, "ticket")),
        f"{TICKET}lacks 'kind'",
    ),
    "a ticket of another kind": (
        forged("ticket", within("notes", put(kind="dense"))),
        f"{TICKET}kind is 'dense'",
    ),
    "a ticket of other fields": (forged("ticket", mislaid), f"{TICKET}holds 'weights/"),
    "a ticket without shapes": (
        forged(
            "ticket",
            lambda m: put(arrays=[a for a in m["arrays"] if "shapes" not in a["name"]])(
                m
            ),
        ),
        TICKET,
    ),
    # What is made anew, or left behind.
    "summary {}": (text("summary.json", "{}"), SAME),
    "lock of bytes": (text("lock", b"\xff"), SAME),
    "rests of a crash": (text("units/.dense-seed0.json.tmp", "{"), SAME),
}


@pytest.fixture(scope="module")
def expectations(whole, tmp_path_factory):
    """What has to be found where the damage is harmless."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    same = opened(shutil.copytree(whole, workdir))
    absent(CHECKPOINT)(workdir)
    assert same["step"] == 20
    left = {"set-seed0": None, "failures": {}}
    return {SAME: same, EARLIER: opened(workdir), AGAIN: same | left}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_name_or_harmless(name, whole, expectations, tmp_path):
    harm, expected = DAMAGES[name]
    workdir = shutil.copytree(whole, tmp_path / "run")
    harm(workdir)
    before = contents(workdir)
    if expected in (SAME, AGAIN):
        assert opened(workdir) == expectations[expected]
    elif expected == EARLIER:
        with pytest.warns(UserWarning, match=r"20 is damaged: .* is now .*20\.damaged"):
            found = opened(workdir)
        assert found["step"] == 10
        # The lines that were measured since are gone.
        assert found == expectations[EARLIER]
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with pytest.raises(ValueError, match=expected) as error:
                opened(workdir)
        assert type(error.value) is ValueError
        assert str(workdir) in str(error.value) or "rigl-seed0" in str(error.value)
        assert contents(workdir).items() <= before.items()
