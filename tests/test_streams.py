"""Learning on a stream: bits of the loop that it replaces, from any interruption."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from d2sparse import data, models, train
from d2sparse.constraints import (
    METHODS,
    STREAM_METHODS,
    Arrival,
    Moves,
    Options,
    Streamed,
    StreamOptions,
    arrivals,
    as_long_as_stream,
    coupled,
    gradual,
    iterative_magnitude,
    layer_densities,
    live_weights,
    make_timetable,
    rigl,
    snip,
    stages,
    stream,
    stream_steps,
)
from d2sparse.constraints.timetables import plan
from d2sparse.dual import Coupling
from d2sparse.train import (
    Recipe,
    Watch,
    constrain,
    fit,
    fit_together,
    lasting,
    make_program,
    plain,
)
from d2sparse.transforms import SparsifyState, get_masks
from experiments import anytime
from experiments.megabatches import options, scoring, walks
from experiments.splits import draw_splits

OLD = anytime.Config(
    samples_per_class=12,
    megabatches=3,
    epochs=2,
    batch_size=8,
    tau=3.0,
    seeds=1,
    width=0.1,
    refresh_interval=2,
    report_every=4,
    score_batch=5,
    progress=False,
)
STREAM = StreamOptions(megabatches=3, epochs=2, tau=3.0, score_batch=5)
OPTIONS = Options(refresh_interval=2)
STAGES = 3


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


@functools.cache
def labelled(seed=0):
    return draw_splits(OLD, data.load("digits"), seed).train


def start(**changes):
    augment = data.make_augment(padding=1, flip=False, cutout=0, jitter=0.0)
    recipe = Recipe(batch_size=8, learning_rate=0.05, augment=augment, **changes)
    return plain(models.make_model("lenet_300_100", 10, 0.1), labelled(), recipe)


@functools.cache
def program(name, **changes):
    method, changed = STREAM_METHODS[name], dataclasses.replace(STREAM, **changes)
    within = dataclasses.replace(OPTIONS, **method.sets)
    given = Streamed(within, changed, np.asarray(labelled().labels))
    made = make_program(constrain(start(), *method.constraints(given)))
    same_steps = {"scratch": "dense", "app_2022": "app", "random_matched": "app"}
    if name not in same_steps:
        return made
    compiled = program(same_steps[name])
    return made._replace(run=compiled.run, predict=compiled.predict)


def begin(made, seed, **settings):
    settings = {"seed": seed, **settings}
    return made.init(jax.random.key(seed), labelled(seed), settings)


def learn(made, seed=0, **settings):
    """The states after the stages, and what training and scoring had cost by then."""
    after, spent, last = [], [0.0], [0]

    def report(progress, means):
        step = int(progress.state.step)
        spent[0] += (step - last[0]) * means["macs"]
        last[0] = step

    def ended(progress, title):
        assert title == f"megabatch {len(after) + 1}"
        cost = spent[0] + float(progress.memory["macs"])
        after.append((on_host(progress.state), cost))

    watch = Watch(report=report, ended=ended)
    fit(made, begin(made, seed, **settings), labelled(seed), watch)
    return after


def on_host(tree):
    """A copy whose keys are numbers."""
    return jax.tree.map(
        lambda x: np.array(jax.random.key_data(x) if is_key(x) else x), tree
    )


def is_key(x):
    return jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key)


def same(a, b):
    leaves = zip(jax.tree.leaves(on_host(a)), jax.tree.leaves(on_host(b)), strict=True)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in leaves)


def density(made, state):
    network = made.training.network
    masks = made.training.masks(state).trained
    return sum(live_weights(network, masks).values()) / network.weights


# The loop that it replaces


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Runs the loop of `experiments.anytime`: states and costs after every stage."""

    def run(names, **changes):
        found, depart = {}, walks.Walk.depart

        def watched(walk, stage, best, state):
            after = depart(walk, stage, best, state)
            kept = found.setdefault(walk.job.unit.method, [])
            kept.append((on_host(after), walk.session.ledger.spent))
            return after

        workdir = str(tmp_path_factory.mktemp("walked"))
        config = dataclasses.replace(OLD, methods=names, workdir=workdir, **changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(walks.Walk, "depart", watched)
            patch.setattr(anytime, "report", lambda *_: {})  # Figures take long.
            anytime.run(config)
        return found

    return run


def check_bits(old, new, costs=True):
    assert len(new) == len(old) == STAGES
    for (state, spent), (known, known_spent) in zip(new, old, strict=True):
        for field in ("params", "opt_state", "step", "key"):
            assert same(getattr(state, field), getattr(known, field)), field
        if costs:
            np.testing.assert_allclose(spent, known_spent, rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        *("app_2022", "gradual"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("dense", "scratch", "one_shot", "app", "app_magnitude", "rigl")
        ),
    ],
)
def test_stages_have_the_bits_of_the_loop_that_it_replaces(name, walked):
    old, new = walked((name,))[name], learn(program(name))
    # The old cost of growth is a mean over the run.
    check_bits(old, new, costs=name != "rigl")


@pytest.mark.slow
def test_the_match_of_the_released_code_has_the_bits_of_the_loop(walked):
    old = walked(("app_2022", "random_matched"))
    new = learn(program("app_2022"))
    matched = program("random_matched")
    left = {f"density_{n}": density(matched, s) for n, (s, _) in enumerate(new)}
    assert left["density_2"] < STREAM.densities[2]
    check_bits(old["random_matched"], learn(matched, **left))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"compat": "app-2022"},
        {"select": "last", "schedule": "cosine"},
        {"replay": "buffer", "replay_size": 20, "score_on": "new"},
        {"stream_validation": 0.0, "steps": 9, "epochs": 10},
    ],
    ids=str,
)
def test_options_mean_what_they_meant(changes, walked):
    old = walked(("app",), **changes)["app"]
    check_bits(old, learn(program("app", **changes)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d2_sparse", "d2_consolidated"])
def test_pairs_end_where_the_loop_ends(name, walked):
    """Their loss is another sum: the last bits differ."""
    old, new = walked((name,))[name], learn(program(name))
    for (state, _), (known, _) in zip(new, old, strict=True):
        for a, b in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(known.params), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-4)


FLAGS = [
    {},
    {"stratified": True, "replay": "none"},
    {"permuted": False, "replay": "last"},
    {"wait": 2, "replay": "fraction", "replay_fraction": 0.3, "megabatches": 5},
    {"replay": "buffer", "replay_size": 20, "score_fraction": 0.5},
    {"compat": "app-2022", "steps": 9},
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("seed", [0, 3])
def test_the_same_examples_are_visible_as_before(flags, seed):
    labels = np.asarray(labelled(seed).labels)
    new = make_timetable(StreamOptions(**flags), labels, seed)
    config = anytime.resolve(anytime.Config(batch_size=4, **flags))
    old = options.make_timetable(config, labels, seed)
    assert new.scored == old.scored
    assert same((new.arrived, new.visible), (old.arrived, old.visible))
    assert plan(StreamOptions(**flags), labels, 4) == old.stages


@pytest.mark.parametrize(
    "criterion",
    [
        *("snip", "grasp", "synflow", "magnitude"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gradient", "fisher", "wanda", "random")
        ),
    ],
)
def test_criteria_score_as_before(criterion):
    made, seen = program("app"), labelled()
    state = begin(made, 0).state
    examples = train.take(seen, jnp.arange(12))
    given = StreamOptions(criterion=criterion, score_batch=5)
    task = anytime._make_stream_task(
        OLD, seen, 10, options.make_timetable(OLD, np.asarray(seen.labels), 0)
    )
    masks = get_masks(state.opt_state)
    each = [
        scoring.make_scorer(task, criterion, 5)(state.params, masks, state, examples),
        arrivals._make_scorer(made.training, given)(
            state.params, masks, state, examples
        ),
    ]
    old, new = (s.score(state.params, s.grads, jax.random.key(1)) for s in each)
    assert same(old, new)
    assert each[0].macs == each[1].macs
    assert each[0].iterations == each[1].iterations


# Interruptions, and several runs at once


def copied(progress):
    """Through bytes, as a checkpoint would."""
    leaves, structure = jax.tree.flatten(progress)
    stored = pickle.loads(pickle.dumps([(on_host(x), is_key(x)) for x in leaves]))
    again = [
        jax.random.wrap_key_data(x) if key else jnp.asarray(x) for x, key in stored
    ]
    return jax.tree.unflatten(structure, again)


@pytest.mark.parametrize(
    "name", ["app_2022", pytest.param("d2_consolidated", marks=pytest.mark.slow)]
)
def test_a_run_resumes_to_the_bit_between_phases_and_inside(name):
    made, saved = program(name), []

    def save(progress, logs):
        saved.append((on_host(progress), copied(progress), dict(logs)))

    watch = Watch(save_every=1, save=save, begun=lambda progress: save(progress, {}))
    end = fit(made, begin(made, 1), labelled(1), watch)
    stops = {phase.stop for phase in made.training.phases}
    steps = [int(progress.state.step) for _, progress, _ in saved]
    between = [n for n, step in enumerate(steps) if step in stops]
    inside = [n for n, step in enumerate(steps) if step not in stops]
    for number in (*between[1::4], *inside[5::15]):
        known, progress, logs = saved[number]
        assert same(known, progress)
        again = fit(made, progress, labelled(1), Watch(logs=logs))
        assert same(again, end)


def test_two_seeds_at_once_are_each_alone():
    made, seeds = program("app"), (0, 1)
    both = [begin(made, seed) for seed in seeds]
    each = [labelled(seed) for seed in seeds]
    ends = fit_together(made, both, each, [Watch(), Watch()])
    for seed, end in zip(seeds, ends, strict=True):
        alone = fit(made, begin(made, seed), labelled(seed))
        assert same(get_masks(end.state.opt_state), get_masks(alone.state.opt_state))
        for a, b in zip(
            jax.tree.leaves(end.state.params),
            jax.tree.leaves(alone.state.params),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, atol=1e-5)
    params = [end.state.params["head"]["kernel"] for end in ends]
    assert not same(*params)


# What a stage does


def test_only_what_is_visible_is_trained_on_and_every_epoch_visits_all_of_it():
    made = program("app")
    progress = begin(made, 5)
    times = plan(STREAM, labelled().labels, 8)
    table = make_timetable(STREAM, labelled(5).labels, 5)
    phases = [phase for phase in made.training.phases if not phase.title]
    for number, phase in enumerate(phases):
        stage, visible = times[number // 2], table.visible[number // 2].train
        first = stage.begin + number % 2 * stage.per_epoch
        now = progress._replace(state=progress.state._replace(step=jnp.int32(first)))
        rows = phase.batches(now, labelled(5), stage.per_epoch)
        assert phase.stop == first + stage.per_epoch
        assert np.isin(rows, visible).all()
        assert np.unique(rows).size == rows.size > len(visible) - 8


def test_rates_of_a_run_are_those_of_its_setting():
    made, rates = program("app"), []

    def begun(progress):
        rates.append(float(progress.state.settings["learning_rate"]))

    run = begin(made, 0, learning_rate=0.02)
    fit(made, run, labelled(), Watch(begun=begun))
    # The phase that ends a stage has the rate of its best epoch.
    epochs = [0.02, 0.002]
    for stage in range(STAGES):
        first, second, last = rates[3 * stage : 3 * stage + 3]
        assert [first, second] == [float(np.float32(rate)) for rate in epochs]
        assert last in (first, second)


@pytest.mark.parametrize("pair", [False, True])
def test_a_best_epoch_that_is_too_dense_is_put_under_the_last_masks(pair):
    steps = stream_steps(STREAM, labelled().labels, 8)
    prune = gradual(0.5, 4)
    within = coupled((prune,), (prune,), Coupling(masks=0.0)) if pair else prune
    around = stream(STREAM, labelled().labels)
    made = make_program(constrain(start(), lasting(steps), within, around))
    best = begin(made, 0).state

    def halve(node):
        if not isinstance(node, SparsifyState):
            return node
        return node._replace(masks=jax.tree.map(even, node.masks))

    def even(mask):
        return mask & (jnp.arange(mask.size) % 2 == 0).reshape(mask.shape)

    halved = jax.tree.map(halve, best.opt_state, is_leaf=stages._is_sparse)
    later = best._replace(opt_state=halved)
    put = stages._under_last_masks(best, later)
    assert same(made.training.masks(put), made.training.masks(later))
    masks = made.training.masks(later).used
    for kept, old, live in zip(
        *map(jax.tree.leaves, (put.params, best.params, masks)), strict=True
    ):
        np.testing.assert_array_equal(kept, jnp.where(live, old, 0))
    assert same(stages._under_last_masks(later, best), later)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["granet", "ac_dc", "top_kast", "sr_ste", "str", "powerprop", "dense_mutual"],
)
def test_other_trainings_of_one_phase_learn_on_a_stream(name):
    within = Options(0.5, refresh_interval=4, growth_samples=0, group=2)
    inner = METHODS[name].constraints(within)
    around = stream(STREAM, labelled().labels)
    made = make_program(constrain(start(), LENGTH, *inner, around))
    stages_ended = learn(made)
    assert len(stages_ended) == STAGES
    for (state, spent), stage in zip(
        stages_ended, plan(STREAM, labelled().labels, 8), strict=True
    ):
        assert int(state.step) == stage.end
        assert spent > 0
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    used = made.training.masks(state).used
    network = made.training.network
    left = sum(live_weights(network, used).values()) / network.weights
    if name not in ("dense_mutual", "str"):
        assert left == pytest.approx(0.5, abs=0.01)


def test_layers_add_up():
    made = program("app")
    state = begin(made, 0).state
    masks = made.training.masks(state).trained
    masks[0]["head"]["kernel"] = masks[0]["head"]["kernel"].at[:, 1:].set(False)
    layers = layer_densities(made.training.network, masks)
    assert layers == {"dense1/kernel": 1.0, "dense2/kernel": 1.0, "head/kernel": 0.1}
    assert live_weights(made.training.network, masks)["head/kernel"] == 10


def test_what_is_not_given_follows_from_the_steps_of_the_stream():
    given = Streamed(Options(growth_samples=0), STREAM, labelled().labels)
    training = constrain(start(), *STREAM_METHODS["rigl"].constraints(given))
    refreshes = [step for step in range(52) if training.when(step)]
    assert refreshes == [25]  # At least 25 steps apart, in the first 39.
    assert training.settings["sparsity"] == 1 - 0.8**STREAM.tau


# Refusals

LENGTH = as_long_as_stream(STREAM, np.arange(120) % 10)
AROUND = stream(STREAM, np.arange(120) % 10)
PRUNED = stream(STREAM, np.arange(120) % 10, Arrival((0.8, 0.6, 0.5)))
STEP_GROWTH = Moves(2, growth_samples=0)


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ((iterative_magnitude(0.5), AROUND), "one phase that nothing precedes.*got 7"),
        ((LENGTH, snip(0.5), AROUND), "one phase that nothing precedes"),
        ((AROUND,), r"training of 52 steps.*got 1000; put lasting\(52\) first"),
        ((LENGTH, rigl(0.5, Moves(2)), AROUND), "got growth_samples=1024; give 0"),
        ((LENGTH, rigl(0.5, STEP_GROWTH), PRUNED), "the masks, got rigl and stream"),
        (
            (LENGTH, coupled((), (), Coupling(masks=0.0)), PRUNED),
            "the networks, got coupled and stream",
        ),
        (
            (LENGTH, stream(STREAM, np.arange(120) % 10, Arrival((0.5,)))),
            "a density for each of 3 stages, got 1",
        ),
    ],
)
def test_trainings_that_cannot_be_put_on_a_stream_are_refused(constraints, message):
    with pytest.raises(ValueError, match=message):
        constrain(start(), *constraints)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"megabatches": 200}, "from 1 to 120 megabatches"),
        ({"stratified": True, "megabatches": 19}, "got 12 examples of class 0"),
        ({"tau": 0.0}, "target level above 0, got 0"),
        ({"replay": "buffer", "replay_size": 0}, "buffer of at least 1 example"),
        ({"megabatches": 20, "select": "last"}, "fill a batch of 8, got 6 examples"),
        ({"stream_validation": 0.01}, "got stream_validation=0.01 of 15 examples"),
        ({"megabatches": 3, "wait": 4}, "wait for 1 to 3 megabatches, .* got 4"),
        ({"criterion": "snap"}, r"criterion of snip, .*got 'snap'"),
        ({"score_fraction": 0.0}, r"score_fraction in \(0, 1\], got 0"),
        ({"epochs": 3, "steps": 4}, "expected no epochs, since steps are 4, got 3"),
        ({"epochs": 0}, "expected epochs >= 1, got 0"),
        ({"replay_size": 20}, "no replay_size, which is for replay=buffer, got 20"),
        (
            {"compat": "app-2022", "dead": "revive"},
            "no dead, which compat=app-2022 sets to intersect, got revive",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(flags, message):
    def made():
        given = Streamed(OPTIONS, StreamOptions(**flags), np.arange(120) % 10)
        return constrain(start(), *STREAM_METHODS["app"].constraints(given))

    with pytest.raises(ValueError, match=message):
        made()


def test_a_class_that_no_stage_would_train_on_is_refused():
    given = StreamOptions(megabatches=3, permuted=False, wait=2)
    with pytest.raises(ValueError, match=r"none of the examples of \[7, 8, 9\]"):
        make_timetable(given, np.repeat(np.arange(10), 18), seed=0)
