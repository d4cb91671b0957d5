"""Many runs in one program: each is what it is alone, as many as the memory holds."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import read, unit_files, without_time

from d2sparse import models, rules, train
from d2sparse.data import Split, load
from d2sparse.transforms import sparsify
from experiments import d2_sparse, prune, units
from experiments.splits import draw_splits
from experiments.task import make_task
from experiments.variants import variants

SWEEP = prune.Config(
    rules=("rigl", "granet"),
    sparsities=(0.5, 0.9),
    learning_rates=(0.05, 0.1),
    seeds=1,
    width=0.1,
    steps=12,
    report_every=5,
    checkpoint_every=4,
    refresh_interval=3,
    growth_samples=20,
    progress=False,
)
PAIRS = d2_sparse.Config(
    methods=("rigl", "d2_sparse"),
    couplings=(0.5, 2.0),
    seeds=1,
    width=0.1,
    steps=8,
    report_every=4,
    refresh_interval=3,
    growth_samples=20,
    progress=False,
)


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    with runs.quick_compilation():
        yield


def run(experiment, config, workdir, **changes):
    config = dataclasses.replace(config, workdir=str(workdir), **changes)
    return experiment.run(config)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("many") / "alone"
    return workdir, run(prune, SWEEP, workdir)


def sorted_lines(workdir):
    return sorted((workdir / "metrics.jsonl").read_text().splitlines())


def assert_equal_but_for_rounding(workdir, expected):
    """Counts are equal; probabilities may round otherwise in a vmapped product."""
    assert unit_files(workdir).keys() == unit_files(expected).keys()
    for name, path in unit_files(workdir).items():
        one, other = (
            without_time(read(path)),
            without_time(read(unit_files(expected)[name])),
        )
        assert one.keys() == other.keys()
        for key in ("nonzeros", "inference_macs", "training_macs"):
            np.testing.assert_allclose(one[key], other[key], rtol=1e-6)
        np.testing.assert_allclose(one["nll"], other["nll"], rtol=1e-4)
        assert abs(one["accuracy"] - other["accuracy"]) <= 0.004  # One image or two.


def test_a_sweep_at_once_is_the_sweep_one_by_one(alone, tmp_path):
    run(prune, SWEEP, tmp_path / "run", runs_at_once=3)  # Groups of 3 and 1.
    assert_equal_but_for_rounding(tmp_path / "run", alone[0])


def test_one_program_serves_all_sparsities_and_learning_rates(alone):
    _, summary = alone
    asked = {(row["method"], row["asked"]) for row in summary["points"]}
    for rule in SWEEP.rules:
        for rate in ("0.05", "0.1"):
            assert {(f"{rule}, lr {rate}", s) for s in SWEEP.sparsities} <= asked
    for row in summary["points"]:
        assert row["sparsity"] == pytest.approx(row["asked"] or 0.0, abs=1e-3)


def test_a_unit_of_a_sweep_is_the_unit_of_a_single_run(alone, tmp_path):
    config = dataclasses.replace(
        SWEEP,
        rules=("granet",),
        sparsities=(0.9,),
        learning_rates=(),
        learning_rate=0.05,
    )
    run(prune, config, tmp_path / "run")
    one = read(unit_files(tmp_path / "run")["granet-0.9-seed0"])
    other = read(unit_files(alone[0])["granet-0.9-lr0.05-seed0"])
    assert without_time(one) == without_time(other)


def test_couplings_are_compared_in_one_program(tmp_path):
    summary = run(d2_sparse, PAIRS, tmp_path / "alone")
    assert [row["method"] for row in summary["methods"]] == [
        "rigl",
        "d2_sparse-coupling0.5",
        "d2_sparse-coupling2",
    ]
    run(d2_sparse, PAIRS, tmp_path / "at once", runs_at_once=8)
    assert_equal_but_for_rounding(tmp_path / "at once", tmp_path / "alone")
    same = dataclasses.replace(
        PAIRS, couplings=(), coupling=2.0, methods=("d2_sparse",)
    )
    run(d2_sparse, same, tmp_path / "single")
    one = read(unit_files(tmp_path / "single")["d2_sparse-seed0"])
    other = read(unit_files(tmp_path / "alone")["d2_sparse-coupling2-seed0"])
    assert without_time(one) == without_time(other)


@pytest.mark.slow
def test_pairs_at_once_are_the_pairs_one_by_one(tmp_path):
    run(d2_sparse, PAIRS, tmp_path / "alone")
    run(d2_sparse, PAIRS, tmp_path / "at once", runs_at_once=8)
    assert_equal_but_for_rounding(tmp_path / "at once", tmp_path / "alone")


def test_an_interrupted_group_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    config = dataclasses.replace(SWEEP, rules=("rigl",), learning_rates=())
    run(prune, config, tmp_path / "whole", runs_at_once=4)
    log = train.fit
    count = 0

    def interrupt(step, state, logs):
        nonlocal count
        count += 1
        if count == 1:
            signal.raise_signal(signal.SIGTERM)

    def fit(*given):
        reported = given[6]

        def report(*args):
            reported(*args)
            interrupt(*args)

        return log(*given[:6], report, *given[7:])

    monkeypatch.setattr(train, "fit", fit)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(prune, config, tmp_path / "parts", runs_at_once=4)
    assert stopped.value.args == (signal.SIGTERM,)
    assert not (tmp_path / "parts" / "units").exists()
    run(prune, config, tmp_path / "parts", runs_at_once=4)
    whole, parts = unit_files(tmp_path / "whole"), unit_files(tmp_path / "parts")
    for name, path in whole.items():
        assert without_time(read(parts[name])) == without_time(read(path))
    lines = [
        sorted((tmp_path / p / "metrics.jsonl").read_text().splitlines())
        for p in ("whole", "parts")
    ]
    assert lines[0] == lines[1]


def test_one_that_diverges_does_not_touch_the_others(alone, tmp_path):
    config = dataclasses.replace(
        SWEEP, rules=("granet",), sparsities=(0.9,), learning_rates=(0.1, 1e30)
    )
    summary = run(prune, config, tmp_path / "run", runs_at_once=4)
    assert list(summary["failed"]) == ["granet-0.9-lr1e+30-seed0"]
    assert all("update of step" in why for why in summary["failed"].values())
    name = "granet-0.9-lr0.1-seed0"
    one, other = (
        read(unit_files(tmp_path / "run")[name]),
        read(unit_files(alone[0])[name]),
    )
    np.testing.assert_allclose(one["nll"], other["nll"], rtol=1e-4)
    table = (tmp_path / "run" / "table.md").read_text()
    assert "lr1e+30-seed0 failed and is not counted: the update of step" in table


def test_names_of_variants():
    method = prune.Method(*[None] * 4)
    lists = {"learning_rate": (0.1, 0.2), "coupling": (1.0,)}
    assert list(variants({"dense": method}, lists)) == ["dense-lr0.1", "dense-lr0.2"]
    assert list(variants({"dense": method}, {"learning_rate": ()})) == ["dense"]
    close = {"learning_rate": (0.1234567, 0.123456789, 2.0)}
    names = ["dense-lr0.1234567", "dense-lr0.123456789", "dense-lr2"]
    assert list(variants({"dense": method}, close)) == names


def small_run(name, shape, monkeypatch):
    model = models.make_model(name, 10)
    images = np.zeros((100, *shape), np.uint8)
    data = train.to_device(Split(images, np.zeros(100, np.int32)))
    tx = sparsify(train.make_optimizer("sgd", 0.1), rules.rigl(0.9))
    step = train.make_train_step(train.make_loss(model), tx)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        runner = train.make_runner(step)
    return step, runner, train.init_state(model, tx, data, jax.random.key(0)), data


def test_the_estimate_of_memory_bounds_the_compiled_program(monkeypatch):
    step, runner, state, data = small_run("convnet_s", (16, 16, 3), monkeypatch)
    estimate = train.estimate_memory(runner, state, data, 32)
    lowered = jax.jit(train.guard(step), donate_argnums=0).lower(
        state, data, jnp.zeros(32, jnp.int32)
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
    data = train.Data(scalar, jnp.zeros(3, jnp.int32), mean, scalar)
    faults = train.Faults(scalar, scalar, scalar)
    state = train.TrainState(scalar, {}, {}, (), scalar, faults, {})
    inputs = 4 * (1 + 3 + 4 + 1) + 4 * 5 + 4 * 2  # Data, state, indices of one step.
    estimate = train.estimate_memory(run, state, data, 2)
    assert inputs + 2 * 1600 <= estimate <= inputs + 2 * 1600 + 100


def test_runs_are_split_into_groups_that_fit(monkeypatch):
    _, runner, state, data = small_run("lenet_300_100", (8, 8, 1), monkeypatch)
    need = train.estimate_memory(runner, state, data, SWEEP.batch_size)

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 5 * need}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    method = prune.Method(*[None] * 4, run=runner, state=lambda begun: begun)
    job = units.Job(None, type("Splits", (), {"train": data}), None, None)

    def groups(left, **changes):
        config = dataclasses.replace(SWEEP, **changes)
        while left > 0:
            size = units._how_many(config, method, job, None, state, left)
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


def test_on_accelerators_all_devices_share_out_the_runs(monkeypatch):
    labelled = draw_splits(SWEEP, load("digits"), seed=0).train
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    task = make_task(SWEEP, labelled, 10, 0.0)
    assert dict(task.mesh.shape) == {"run": 8, "data": 1}
