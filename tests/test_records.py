"""Run directories: resuming, refusing, surviving crashes."""

import dataclasses
import json
import math
import os

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from tensorboardX.proto import event_pb2

from d2sparse.records import Unit, open_run, read_metrics

RIGL = Unit("rigl", 0)


@dataclasses.dataclass(frozen=True)
class Config:
    sparsity: float = 0.9
    methods: tuple[str, ...] = ("dense", "rigl")
    data_dir: str | None = None
    workdir: str = dataclasses.field(default="runs/a", compare=False)


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "runs" / "a"


@pytest.fixture
def run(workdir):
    return open_run(workdir, Config())


def contents(directory):
    """Every file below a directory with its bytes, but for its lock."""
    paths = (path for path in sorted(directory.rglob("*")) if path.name != "lock")
    files = (path for path in paths if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def scalars(directory):
    """The (tag, step, value) of every event, by TensorBoard's record format."""
    (path,) = directory.iterdir()
    data, found = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
        data = data[12 + length + 4 :]
    return found


def crash(*args, **kwargs):
    raise OSError("the power went out")


# Opening


def test_a_new_run_records_its_configuration(workdir, run):
    assert run.workdir == workdir
    assert json.loads((workdir / "config.json").read_text()) == {
        "sparsity": 0.9,
        "methods": ["dense", "rigl"],
        "data_dir": None,
        "workdir": "runs/a",
    }


def test_the_same_configuration_resumes_and_changes_nothing(workdir, run):
    run.finish(RIGL, {"accuracy": 0.5})
    before = contents(workdir)
    again = open_run(workdir, Config(workdir="moved/elsewhere"))
    assert again.finished(RIGL) == {"accuracy": 0.5}
    assert contents(workdir) == before


def test_another_configuration_is_refused_with_the_fields_that_differ(workdir, run):
    before = contents(workdir)
    with pytest.raises(ValueError, match="belongs to another configuration") as error:
        open_run(workdir, Config(sparsity=0.5, methods=("dense",)))
    message = str(error.value)
    assert "sparsity was 0.9 and is 0.5" in message
    assert "methods was ['dense', 'rigl'] and is ['dense']" in message
    assert "data_dir" not in message
    assert "give another --workdir or the old flags" in message
    assert contents(workdir) == before


def test_fields_of_another_version_differ(workdir, run):
    wider = dataclasses.make_dataclass(
        "Wider", [("width", int, 1)], bases=(Config,), frozen=True
    )
    with pytest.raises(ValueError, match="width was absent and is 1;"):
        open_run(workdir, wider())
    open_run(workdir / "wider", wider())
    with pytest.raises(ValueError, match="width was 1 and is absent;"):
        open_run(workdir / "wider", Config())


def test_a_directory_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"not those of a run \(thesis.tex\); give"):
        open_run(tmp_path, Config())
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"cut'])
def test_a_config_file_of_another_program_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json is not the configuration of"):
        open_run(tmp_path, Config())
    assert contents(tmp_path) == {"config.json": text.encode()}


def test_an_empty_directory_and_the_home_directory_are_places(tmp_path, monkeypatch):
    open_run(tmp_path, Config())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_run("~/run", Config()).workdir == tmp_path / "home" / "run"
    assert read_metrics("~/run") == []


def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("a file in place")
    for path, reason in [
        (file, "File exists"),
        (file / "run", "Not a directory"),
        ("/proc/run", "No such file"),
    ]:
        with pytest.raises(ValueError, match=rf"cannot be written \({reason}.*--work"):
            open_run(path, Config())
    assert file.read_text() == "a file in place"


def test_a_directory_without_permission_is_refused(workdir, run, monkeypatch):
    # The superuser of a container may write anywhere, hence no chmod.
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0)
    with pytest.raises(ValueError, match=r"cannot be written \(Permission denied\)"):
        open_run(workdir, Config())


def test_a_crash_while_the_directory_is_made_does_not_block_it(workdir, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="power"):
            open_run(workdir, Config())
    assert not (workdir / "config.json").exists()
    open_run(workdir, Config())
    assert list(contents(workdir)) == ["config.json"]


# Measurements


def test_a_line_holds_the_unit_the_step_and_the_metrics(workdir, run):
    run.start(RIGL)
    metrics = {"loss": jnp.float32(0.5), "accuracy": np.float64(0.25), "grown": 3}
    run.log(RIGL, np.int64(10), metrics)
    line = (workdir / "metrics.jsonl").read_text()
    assert line == (
        '{"unit": "rigl-seed0", "method": "rigl", "seed": 0, "step": 10,'
        ' "loss": 0.5, "accuracy": 0.25, "grown": 3.0}\n'
    )
    assert read_metrics(workdir) == [json.loads(line)]


def test_tensorboard_gets_the_same_scalars(workdir, run):
    run.start(RIGL)
    for step in range(3):
        run.log(RIGL, step, {"loss": step / 2, "accuracy": jnp.bfloat16(0.5)})
    run.finish(RIGL, {})
    expected = [("loss", s, s / 2) for s in range(3)]
    expected += [("accuracy", s, 0.5) for s in range(3)]
    assert sorted(scalars(workdir / "tensorboard" / "rigl-seed0")) == sorted(expected)


def test_what_is_not_finite_is_null_and_comes_back_as_nan(workdir, run):
    run.start(RIGL)
    run.log(RIGL, 0, {"loss": jnp.nan, "norm": -math.inf, "accuracy": 1})
    line = json.loads((workdir / "metrics.jsonl").read_text())
    assert (line["loss"], line["norm"]) == (None, None)
    (read,) = read_metrics(workdir)
    assert math.isnan(read["loss"])
    assert math.isnan(read["norm"])
    run.finish(RIGL, {})
    events = scalars(workdir / "tensorboard" / "rigl-seed0")
    assert events == [("accuracy", 0, 1.0)]


def test_a_unit_is_started_before_it_is_measured(workdir, run):
    with pytest.raises(ValueError, match="rigl-seed0 has not been started"):
        run.log(RIGL, 0, {"loss": 1.0})
    assert read_metrics(workdir) == []


def test_a_metric_that_is_no_scalar_or_clashes_is_refused_before_writing(workdir, run):
    run.start(RIGL)
    with pytest.raises(ValueError, match=r"metric loss must be a scalar.*\(2,\)"):
        run.log(RIGL, 0, {"accuracy": 1.0, "loss": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"metrics \['seed', 'step'\] need other"):
        run.log(RIGL, 0, {"step": 1, "seed": 2, "loss": 0.0})
    assert read_metrics(workdir) == []


# Interruptions


def test_an_interrupted_unit_starts_afresh_and_others_keep_theirs(workdir, run):
    for unit in [Unit("rigl", 1), RIGL]:
        run.start(unit)
        run.log(unit, 0, {"loss": 1.0})
    events = workdir / "tensorboard" / "rigl-seed0"
    # The names of event files only tell seconds apart.
    (events / "events.out.tfevents.0.earlier").touch()
    again = open_run(workdir, Config())
    assert again.finished(RIGL) is None
    again.start(RIGL)
    again.log(RIGL, 0, {"loss": 2.0})
    again.finish(RIGL, {})
    lines = [(line["unit"], line["loss"]) for line in read_metrics(workdir)]
    assert lines == [("rigl-seed1", 1.0), ("rigl-seed0", 2.0)]
    assert scalars(events) == [("loss", 0, 2.0)]


def test_a_line_cut_by_a_crash_is_ignored_and_then_repaired(workdir, run):
    run.start(RIGL)
    run.log(RIGL, 0, {"loss": 1.0})
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"unit": "rigl-seed1", "me')
    assert [line["step"] for line in read_metrics(workdir)] == [0]
    again = open_run(workdir, Config())
    again.start(Unit("rigl", 1))
    again.log(Unit("rigl", 1), 5, {"loss": 2.0})
    assert [line["step"] for line in read_metrics(workdir)] == [0, 5]


def test_what_holds_stays_in_the_order_of_measuring(workdir, run):
    other = Unit("rigl", 1)
    for unit in (RIGL, other):
        run.start(unit)
    for step in range(3):
        for unit in (RIGL, other):
            run.log(unit, step, {"loss": 1.0})
    again = open_run(workdir, Config())
    again.start(RIGL, 2)
    again.start(other, 3)
    again.log(RIGL, 2, {"loss": 1.0})
    lines = [(line["seed"], line["step"]) for line in read_metrics(workdir)]
    assert lines == [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2), (0, 2)]


DAMAGES = [b"garbage", b'{"acc', b"[1]", b"null", b'{"failed": "\xff"}']


@pytest.mark.parametrize("damage", [*DAMAGES, b'{"unit": "rigl-seed0"}'])
def test_a_damaged_line_is_named_and_nothing_is_lost(damage, workdir, run):
    run.start(RIGL)
    run.log(RIGL, 0, {"loss": 1.0})
    path = workdir / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + damage + b"\n")
    before = contents(workdir)
    reads = (lambda: run.start(RIGL), lambda: open_run(workdir, Config()))
    for read in (*reads, lambda: read_metrics(workdir)):
        with pytest.raises(
            ValueError, match=r"metrics\.jsonl line 2 is damaged.*remove"
        ):
            read()
    assert contents(workdir) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_result_is_named_with_what_to_do(damage, workdir, run):
    run.finish(RIGL, {"accuracy": 0.5})
    path = workdir / "units" / "rigl-seed0.json"
    path.write_bytes(damage)
    for read in (lambda: run.finished(RIGL), run.failures):
        with pytest.raises(
            ValueError, match=r"damaged.*to run the unit again"
        ) as error:
            read()
        assert str(error.value).startswith(f"{path} is damaged")


def test_a_crash_while_writing_leaves_the_old_file_whole(workdir, run, monkeypatch):
    run.write_summary({"accuracy": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="power"):
            run.write_summary({"accuracy": 0.75})
    assert json.loads((workdir / "summary.json").read_text()) == {"accuracy": 0.5}
    run.write_summary({"accuracy": 0.75})
    assert list(contents(workdir)) == ["config.json", "summary.json"]


# Results


def test_results_come_back_as_plain_values(run):
    results = {
        "accuracy": jnp.float32(0.5),
        "nll": np.nan,
        "overlap": jnp.array([0.25, 0.5]),
        "steps": (0, np.int32(10)),
        "layers": {"dense1/kernel": jnp.arange(4).reshape(2, 2)},
        "pruned": np.bool_(True),
    }
    assert run.finished(RIGL) is None
    run.finish(RIGL, results)
    read = run.finished(RIGL)
    assert math.isnan(read.pop("nll"))
    assert read == {
        "accuracy": 0.5,
        "overlap": [0.25, 0.5],
        "steps": [0, 10],
        "layers": {"dense1/kernel": [[0, 1], [2, 3]]},
        "pruned": True,
    }
    assert run.finished(Unit("rigl", 1)) is None


def test_text_and_figures_are_written(workdir, run):
    run.write_text("table.md", "| ± |\n")
    run.save_figure("curves", Figure(figsize=(1, 1)))
    assert (workdir / "table.md").read_text(encoding="utf-8") == "| ± |\n"
    figure = (workdir / "figures" / "curves.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
