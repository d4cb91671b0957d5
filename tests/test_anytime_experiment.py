"""The experiment on a stream: every learner, end to end, and what the scorer sees."""

import dataclasses
import itertools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import read, results, table_rows, unit_files, without_time

from d2sparse import data, train
from d2sparse.anytime import density
from d2sparse.masks import apply_masks, dense_masks
from experiments import anytime, session
from experiments.megabatches import scoring
from experiments.megabatches.options import LEARNERS, make_timetable
from experiments.splits import draw_splits

TINY = anytime.Config(
    methods=LEARNERS,
    samples_per_class=18,
    megabatches=3,
    epochs=2,
    batch_size=16,
    tau=3.0,
    seeds=1,
    width=0.1,
    refresh_interval=2,
    report_every=4,
    progress=False,
)
KERNELS = 64 * 30 + 30 * 10 + 10 * 10
STAGES = 3


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


def run(workdir, **changes):
    return anytime.run(dataclasses.replace(TINY, workdir=str(workdir), **changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("streams") / "finished"
    return workdir, run(workdir)


@pytest.fixture(scope="module")
def stages(finished):
    """What every learner was after every stage."""
    return {name: results(finished[0], name, [0])[0]["stages"] for name in TINY.methods}


@pytest.fixture(scope="module")
def task():
    source = data.load("digits")
    splits = draw_splits(TINY, source, seed=0)
    table = make_timetable(TINY, np.asarray(splits.train.labels), seed=0)
    return anytime._make_stream_task(TINY, splits.train, 10, table), splits, table


def test_densities_are_those_of_the_levels(stages):
    app = [round(density(level) * KERNELS) / KERNELS for level in (1.0, 2.0, 3.0)]
    for name in ("app", "app_magnitude"):
        assert [stage["density"] for stage in stages[name]] == app
    for name in ("one_shot", "rigl", "d2_sparse"):
        assert [stage["density"] for stage in stages[name]] == [app[-1]] * STAGES
    for name in ("dense", "scratch"):
        assert [stage["density"] for stage in stages[name]] == [1.0] * STAGES
    assert stages["gradual"][-1]["density"] == app[-1]


def test_the_released_code_is_sparser_than_it_says_and_is_matched(stages):
    found = [stage["density"] for stage in stages["app_2022"]]
    asked = [stage["density"] for stage in stages["app"]]
    assert found[0] == asked[0]
    assert all(a < b for a, b in zip(found[1:], asked[1:], strict=True))
    assert [stage["density"] for stage in stages["random_matched"]] == found


def test_layers_add_up_to_the_density(stages):
    sizes = {"dense1/kernel": 1920, "dense2/kernel": 300, "head/kernel": 100}
    for name in TINY.methods:
        for stage in stages[name]:
            assert set(stage["layers"]) == set(sizes)
            total = sum(sizes[path] * d for path, d in stage["layers"].items())
            np.testing.assert_allclose(total / KERNELS, stage["density"], rtol=1e-9)


def test_the_first_stages_of_dense_and_scratch_are_the_same_training(stages):
    names = ("seen", "training_macs", "nonzeros")
    for one, other in zip(stages["dense"], stages["scratch"], strict=True):
        assert [one[name] for name in names] == [other[name] for name in names]


def test_costs_are_those_of_the_live_weights_and_of_scoring(stages, task):
    macs, table = task[0].macs, task[2]
    dense = 3 * sum(macs.values())
    steps = [stage.end for stage in table.stages]
    for stage, end in zip(stages["dense"], steps, strict=True):
        np.testing.assert_allclose(stage["training_macs"], dense * end, rtol=1e-5)
    found = stages["one_shot"][0]
    layers = found["layers"].items()
    sparse = 3 * sum(macs[path] * d for path, d in layers)
    score = dense * table.scored / TINY.batch_size
    np.testing.assert_allclose(
        found["training_macs"], sparse * steps[0] + score, rtol=1e-5
    )
    assert stages["app"][-1]["training_macs"] < stages["dense"][-1]["training_macs"]


def test_what_was_seen_grows_by_megabatches(stages):
    assert [stage["seen"] for stage in stages["dense"]] == [60, 120, 180]


def test_table_and_summary_agree_with_the_units(finished, stages):
    workdir, summary = finished
    rows = {row["method"]: row for row in summary["methods"]}
    cells = {row["method"]: row for row in table_rows(workdir)}
    assert list(rows) == list(TINY.methods)
    for name in TINY.methods:
        errors = [stage["test_error"] for stage in stages[name]]
        assert rows[name]["mean_error"] == pytest.approx(np.mean(errors))
        assert rows[name]["cumulative_error"] == pytest.approx(np.sum(errors))
        assert rows[name]["error_count"] == pytest.approx(
            np.sum(errors) * len(data.load("digits").test.labels)
        )
        assert cells[name]["mean error %"] == f"{100 * np.mean(errors):.2f}"
        stored = [stage["nonzeros"] for stage in stages[name]]
        assert rows[name]["most_nonzeros"] == max(stored)
        assert rows[name]["sum_nonzeros"] == sum(stored)
        if name != "dense":
            dense = [stage["test_error"] for stage in stages["dense"]]
            assert rows[name]["error_to_dense"] == pytest.approx(
                np.mean(errors) - np.mean(dense)
            )
    assert summary["stages"]["app"]["density"][0] == stages["app"][0]["density"]


def test_figures_are_there(finished):
    names = {path.name for path in (finished[0] / "figures").iterdir()}
    assert {"anytime_accuracy.png", "density.png", "gap.png"} <= names
    assert {"layers-app.png", "layers-d2_sparse.png"} <= names
    assert "layers-dense.png" not in names


@pytest.mark.parametrize(
    "name",
    [
        "app_2022",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("rigl", "d2_consolidated")),
    ],
)
def test_an_interrupted_walk_comes_to_the_same_end(
    name, finished, stages, tmp_path, monkeypatch
):
    take_steps, calls = session.take_steps, itertools.count()

    def interrupted(run, state, data, stretch):
        # In the middle of an epoch, at its end, and in the middle of the next one.
        asked, seen = stretch.interrupted, itertools.count()
        stop = next(calls) in (1, 4, 7)
        stretch = stretch._replace(
            interrupted=lambda: asked() or (stop and next(seen) > 0)
        )
        return take_steps(run, state, data, stretch)

    monkeypatch.setattr(session, "take_steps", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", methods=(name,), checkpoint_every=3)
    run(tmp_path / "parts", methods=(name,), checkpoint_every=3)
    (found,) = results(tmp_path / "parts", name, [0])
    assert without_time(found["stages"]) == without_time(stages[name])
    lines = [
        line
        for line in (finished[0] / "metrics.jsonl").read_text().splitlines()
        if f'"{name}-seed0"' in line
    ]
    assert (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines() == lines


def test_a_signal_saves_and_says_so(tmp_path, monkeypatch):
    take_steps, sent = session.take_steps, []

    def signalled(*given):
        if not sent:
            sent.append(signal.raise_signal(signal.SIGTERM))
        return take_steps(*given)

    monkeypatch.setattr(session, "take_steps", signalled)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(tmp_path / "run", methods=("app",))
    assert stopped.value.args == (signal.SIGTERM,)
    assert list((tmp_path / "run" / "checkpoints" / "app-seed0").iterdir())


def test_a_finished_run_is_not_repeated(finished, monkeypatch):
    workdir, summary = finished

    def fail(*_):
        raise AssertionError("something was trained")

    monkeypatch.setattr(anytime, "walk_unit", fail)
    np.testing.assert_equal(run(workdir), summary)  # Of which some is NaN.


def test_the_step_is_compiled_once_for_all_stages(task, tmp_path, monkeypatch):
    rows, make = [], train.make_runner

    def counted(step, mesh=None):
        def traced(state, data, indices):
            rows.append(indices.shape)
            return step(state, data, indices)

        return make(traced, mesh)

    monkeypatch.setattr(train, "make_runner", counted)
    run(tmp_path / "run", methods=("app",), seeds=2)
    assert len(rows) == 1


def test_a_learner_that_waits_for_all_is_the_offline_run(tmp_path):
    waits = run(tmp_path / "waits", methods=("one_shot",), wait=3)["methods"][0]
    offline = run(tmp_path / "whole", methods=("one_shot",), megabatches=1)
    whole = offline["methods"][0]
    assert waits["training_macs"] == pytest.approx(whole["training_macs"], rel=0.3)
    errors = [0.9, 0.9, 1 - waits["final_accuracy"]]
    assert waits["mean_error"] == pytest.approx(np.mean(errors))
    assert whole["mean_error"] == pytest.approx(1 - whole["final_accuracy"])
    assert whole["density"] == pytest.approx(density(3.0), abs=1 / KERNELS)


def test_compat_cuts_the_data_in_their_own_order(tmp_path, task):
    summary = run(tmp_path / "compat", methods=("app",), compat="app-2022")
    assert summary["methods"][0]["density"] < density(3.0) - 0.05
    released = anytime.resolve(dataclasses.replace(TINY, compat="app-2022"))
    labels = np.asarray(task[1].train.labels)
    first = make_timetable(released, labels, seed=0).stream[0]
    np.testing.assert_array_equal(np.sort(np.concatenate(first)), np.arange(60))


def test_a_stream_sorted_by_class_trains_on_all_of_them_or_is_refused():
    labels = np.repeat(np.arange(10), 18)
    config = dataclasses.replace(TINY, permuted=False)
    for stratified, megabatches in ((False, 3), (True, 3), (True, 1)):
        own = dataclasses.replace(
            config, stratified=stratified, megabatches=megabatches
        )
        for part in make_timetable(own, labels, seed=0).visible[-1]:
            assert stratified <= (set(labels[part]) == set(range(10)))
        trained = make_timetable(own, labels, seed=0).visible[-1].train
        assert set(labels[trained]) == set(range(10))
    with pytest.raises(ValueError, match=r"none of the examples of \[7, 8, 9\]"):
        make_timetable(dataclasses.replace(config, wait=2), labels, seed=0)


CHANGES = [
    {"replay": "none"},
    {"replay": "buffer", "replay_size": 20},
    {"stratified": True},
    {"criterion": "magnitude"},
    {"criterion": "grasp"},
    {"criterion": "wanda"},
    {"scope": "leaf"},
    {"score_on": "new", "score_sample": "first"},
    {"select": "last"},
    {"carry_moments": True},
    {"schedule": "cosine"},
    {"steps": 6, "epochs": 10},
    {"label_noise": 0.4},
    {"levels": "constant"},
    {"stream_validation": 0.0},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_flag_changes_what_is_learned(changes, stages, tmp_path):
    run(tmp_path / "run", methods=("app",), **changes)
    (found,) = results(tmp_path / "run", "app", [0])
    last = found["stages"][-1]
    assert last["density"] == pytest.approx(density(3.0), abs=2 / KERNELS)
    assert last["nll"] != stages["app"][-1]["nll"]
    assert (last["validation_accuracy"] is None) == (changes == CHANGES[-1])


# What the scorer sees


def test_snip_is_the_weight_times_the_summed_gradient(task):
    made, splits, _ = task
    state = made.model.init(jax.random.key(0), train.inputs(splits.train)[:1])
    params, model_state = state
    begun = train.TrainState(
        jnp.int32(0), params, model_state, (), jax.random.key(0), None, {}
    )
    masks = dense_masks(params)
    sample = train.take(splits.train, jnp.arange(25))
    scorer = scoring.make_scorer(made, "snip", batch_size=10)
    found = scorer(params, masks, begun, sample)

    def loss(params):
        logits, _ = made.model.apply(
            params, model_state, train.inputs(sample), train=True
        )
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), sample.labels.reshape(-1, 1), axis=1
        )
        return -picked.sum()

    expected = jax.grad(loss)(params)
    for got, want in zip(*map(jax.tree.leaves, (found.grads, expected)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)
    score = found.score(params, found.grads, None)["head"]["kernel"]
    want = jnp.abs(params["head"]["kernel"] * expected["head"]["kernel"])
    np.testing.assert_allclose(score, want, rtol=1e-3, atol=1e-5)


def test_the_weights_that_are_scored_are_the_live_ones(task, tmp_path, monkeypatch):
    seen, prune = [], anytime.anytime.prune

    def watched(masks, params, *given):
        seen.append((masks, params))
        return prune(masks, params, *given)

    monkeypatch.setattr(anytime.anytime, "prune", watched)
    run(tmp_path / "app", methods=("app",))
    assert len(seen) == STAGES
    for masks, params in seen:
        for one, other in zip(
            jax.tree.leaves(apply_masks(params, masks)),
            jax.tree.leaves(params),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
    seen.clear()
    run(tmp_path / "released", methods=("app_2022",))
    weights = [np.asarray(params["dense1"]["kernel"]) for _, params in seen]
    assert np.abs(weights[1]).max() <= 1 / 8  # New, uniform in +-1 / sqrt(64).
    assert (weights[1] != 0).all()  # The dead compete as well.
    assert (weights[1] != weights[2]).mean() > 0.99


BAD = [
    ({"megabatches": 200}, "from 1 to 180 megabatches"),
    ({"stratified": True, "megabatches": 19}, "of 19 megabatches, got 18 examples of"),
    ({"tau": 0.0}, "target level above 0, got 0"),
    ({"replay": "buffer", "replay_size": 0}, "replay buffer of at least 1 example"),
    ({"megabatches": 12}, "fill a batch of 16, got 14 examples to train on"),
    ({"stream_validation": 0.01}, "stream_validation=0.01 of 60 examples; raise it"),
    ({"wait": 4}, "wait for 1 to 3 megabatches, as there are, got 4"),
    ({"methods": ()}, r"methods of dense, scratch, .*got none"),
    ({"methods": ("apps",)}, r"methods of dense, .*got 'apps'"),
    ({"methods": ("random_matched", "app_2022")}, "app_2022 among the methods before"),
    ({"criterion": "snap"}, r"criterion of snip, .*got 'snap'"),
    ({"score_fraction": 0.0}, r"score_fraction in \(0, 1\], got 0"),
    ({"ticket": "here"}, "no --ticket, since a stream begins with a new network"),
    ({"growth_samples": 5}, "no --growth_samples, since other examples than those"),
    ({"averaging": 0.5}, "no --averaging, since the best epoch"),
    ({"runs_at_once": 2}, "no --runs_at_once, since the runs of a stream"),
    ({"epochs": 3, "steps": 4}, "expected no epochs, since steps are 4, got 3"),
    ({"replay_size": 20}, "no replay_size, which is for --replay=buffer, got 20"),
    ({"replay_fraction": 0.2}, "no replay_fraction, which is for --replay=fraction"),
    (
        {"compat": "app-2022", "score_sample": "first", "dead": "revive"},
        "no dead, which compat=app-2022 sets to intersect, got revive",
    ),
    ({"epochs": 0}, "expected epochs >= 1, got 0"),
    ({"compat": "app"}, r"compat of none, app-2022, got 'app'"),
    ({"refresh_interval": 10_000}, "expected a refresh within the first"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input_is_refused_before_anything_is_written(
    changes, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        anytime.run(dataclasses.replace(TINY, **changes))
    assert list(tmp_path.iterdir()) == []


def test_one_that_diverges_leaves_the_others_and_its_match_says_why(tmp_path):
    with pytest.raises(FloatingPointError, match="all 3 runs have failed, app_2022-s"):
        run(
            tmp_path / "run",
            methods=("dense", "app_2022", "random_matched"),
            learning_rate=1e30,
        )
    summary = read(tmp_path / "run" / "summary.json")
    assert set(summary["failed"]) == {
        "dense-seed0",
        "app_2022-seed0",
        "random_matched-seed0",
    }
    assert "app_2022 has failed" in summary["failed"]["random_matched-seed0"]
    assert len(unit_files(tmp_path / "run")) == 3
    assert "failed" in (tmp_path / "run" / "table.md").read_text()
    assert summary["methods"][0]["seeds"] == 0
