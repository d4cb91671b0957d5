"""Many runs in one program: each is what it is alone, as many as the memory holds."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import read, without_time

from d2sparse import models, study, train
from d2sparse.constraints import Moves, rigl
from d2sparse.constraints.distilled import distilled
from d2sparse.data import Split
from d2sparse.study import runner, splits, trainings
from d2sparse.train import Recipe, constrain, make_program, plain

BRIEF = {"steps": 6, "seeds": 1, "progress": False, "report_every": 3}
TINY = {**BRIEF, "refresh_interval": 2, "growth_samples": 16}


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    with runs.quick_compilation():
        yield


def test_a_run_of_an_axis_is_the_run_of_a_single_value(tmp_path):
    flags = {**BRIEF, "methods": ("static",), "learning_rate": 0.05}
    axes, bare = (
        {"sparsity": (0.5, 0.75)},
        study.Experiment("test", report=lambda c: {}),
    )
    many = study.Config(**flags, axes=axes, workdir=str(tmp_path / "many"))
    one = study.Config(**flags, sparsity=0.75, workdir=str(tmp_path / "one"))
    for config in (many, one):
        study.compare(config, bare, model=runs.linear(10))
    names = "static-sparsity0.75-seed0", "static-seed0"
    found, expected = (
        without_time(read(tmp_path / place / "units" / f"{name}.json"))
        for place, name in zip(("many", "one"), names, strict=True)
    )
    assert found.pop("values") == {"sparsity": 0.75}
    assert expected.pop("values") == {}
    assert found == expected


@pytest.mark.slow
def test_pairs_at_once_are_the_pairs_one_by_one(tmp_path):
    def compare(**flags):
        config = study.Config(
            **{
                **TINY,
                "width": 0.05,
                "methods": ("d2_sparse",),
                "axes": {"coupling": (0.5, 2.0)},
            },
            **flags,
        )
        return study.compare(config)

    alone = compare(workdir=str(tmp_path / "alone"))
    together = compare(workdir=str(tmp_path / "together"), runs_at_once=2)
    assert together["coupling"].tolist() == [0.5, 2.0]
    np.testing.assert_allclose(together["nll"], alone["nll"], rtol=1e-4)
    np.testing.assert_array_equal(together["nonzeros"], alone["nonzeros"])


def small_program(name, shape, monkeypatch, *constraints):
    """A program as on an accelerator, and the form of its progress at first."""
    images = np.zeros((100, *shape), np.uint8)
    examples = train.to_device(Split(images, np.zeros(100, np.int32)))
    training = plain(models.make_model(name, 10), examples, Recipe(steps=200))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        program = make_program(constrain(training, *constraints))
    start = jax.eval_shape(program.init, jax.random.key(0), examples)
    return program, start._replace(phase=0), examples


@pytest.mark.parametrize(
    "constraints",
    [
        (),
        pytest.param((rigl(0.9, Moves(growth_samples=0)),), marks=pytest.mark.slow),
    ],
    ids=["dense", "rigl"],
)
def test_the_estimate_of_memory_bounds_the_compiled_program(monkeypatch, constraints):
    program, progress, examples = small_program(
        "convnet_s", (16, 16, 3), monkeypatch, *constraints
    )
    estimate = train.estimate_memory(program.run, progress.state, examples, 32)
    step = train.guard(train.make_step(program.training))
    lowered = jax.jit(step, donate_argnums=0).lower(
        progress.state, examples, jnp.zeros(32, jnp.int32)
    )
    jax.config.update("jax_disable_most_optimizations", False)
    used = lowered.compile().memory_analysis()
    jax.config.update("jax_disable_most_optimizations", True)
    needed = used.argument_size_in_bytes + used.temp_size_in_bytes
    assert needed <= 1.1 * estimate <= 3 * needed


def test_the_estimate_of_memory_counts_values_while_they_are_needed():
    def run(state, data, indices):
        del indices
        x = jnp.ones((100, 4)) * state.step  # Two arrays of 1600 bytes and a scalar.
        y = jnp.sin(x)  # x and y: x ends here.
        return state, {"sum": jnp.sum(y) * data.mean[0]}

    mean, scalar = jnp.ones(4), jnp.zeros((), jnp.int32)
    examples = train.Data(scalar, jnp.zeros(3, jnp.int32), mean, scalar)
    faults = train.Faults(scalar, scalar, scalar)
    state = train.TrainState(scalar, {}, {}, (), scalar, faults, {})
    inputs = 4 * (1 + 3 + 4 + 1) + 4 * 5 + 4 * 2  # Data, state, indices of one step.
    estimate = train.estimate_memory(run, state, examples, 2)
    assert inputs + 2 * 1600 <= estimate <= inputs + 2 * 1600 + 100


def member_of(program, examples):
    """What a group knows of a run when it asks how many more there is room for."""
    plan = types.SimpleNamespace(program=program)
    return types.SimpleNamespace(
        plan=plan, splits=splits.Splits(examples, examples, None)
    )


def test_runs_are_split_into_groups_that_fit(monkeypatch):
    program, progress, examples = small_program("lenet_300_100", (8, 8, 1), monkeypatch)
    need = train.estimate_memory(program.run, progress.state, examples, 32)

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 5 * need}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    member = member_of(program, examples)

    def groups(left, **flags):
        config = study.Config(**flags)
        while left > 0:
            size = runner._how_many(config, member, progress, left)
            yield min(size, left)
            left -= size

    # Four fit on each of eight devices, and no device has more than another.
    assert list(groups(100)) == [32, 32, 32, 4]
    assert list(groups(11)) == [8, 3]
    assert list(groups(11, data_parallel=2)) == [8, 3]
    assert list(groups(19, data_parallel=8)) == [4, 4, 4, 4, 3]
    for size in groups(59):
        width = train.make_mesh(1, size).shape["run"]
        assert width == min(size, 8)
    assert list(groups(11, runs_at_once=7)) == [7, 4]


def test_the_memory_is_that_of_the_phase_that_a_run_is_in(monkeypatch):
    program, teacher, examples = small_program(
        "lenet_300_100", (8, 8, 1), monkeypatch, distilled()
    )
    student = program.form(1, examples)
    member = member_of(program, examples)
    for progress in (teacher, student._replace(phase=1)):
        assert runner._how_many(study.Config(), member, progress, 16) == 16


def test_on_accelerators_all_devices_share_out_the_runs(monkeypatch):
    assert trainings.make_mesh(study.Config(), 100) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    mesh = trainings.make_mesh(study.Config(), 100)
    assert dict(mesh.shape) == {"run": 8, "data": 1}
