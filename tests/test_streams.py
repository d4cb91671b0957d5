"""Learning on a stream: a loop written out, interruptions, what a stage does."""

import dataclasses
import functools
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from d2sparse import anytime, data, models, study, train, tree
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
    make_timetable,
    rigl,
    snip,
    stages,
    stream,
    stream_steps,
)
from d2sparse.constraints.timetables import plan
from d2sparse.dual import Coupling
from d2sparse.masks import apply_masks
from d2sparse.models.mlp import MLP
from d2sparse.train import (
    Recipe,
    Watch,
    constrain,
    fit,
    fit_together,
    lasting,
    live_weights,
    make_program,
    plain,
)
from d2sparse.transforms import SparsifyState, get_masks

STREAM = StreamOptions(megabatches=3, epochs=2, tau=3.0, score_batch=5)
OPTIONS = Options(refresh_interval=2)
STAGES = 3
NETWORK = models.from_linen(MLP((8,), 10))
# In which few weights have a score of zero.
WIDER = models.from_linen(MLP((30,), 10))


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


@functools.cache
def labelled(seed=0):
    draw_splits = study.make_draw_splits(data.load("digits"))
    return draw_splits(study.Config(samples_per_class=12), seed).train


def start(augments=True, network=NETWORK):
    padded = data.make_augment(padding=1, flip=False, cutout=0, jitter=0.0)
    augment = padded if augments else None
    recipe = Recipe(batch_size=8, learning_rate=0.05, augment=augment)
    return plain(network, labelled(), recipe)


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


# Against a loop written out


def learn_literally(made, seed):
    """Progressive pruning by SNIP in plain sums: weights and masks after the stages."""
    state, examples = begin(made, seed).state, labelled(seed)
    table = make_timetable(STREAM, examples.labels, seed)
    x, y = train.inputs(examples), np.asarray(examples.labels)

    @jax.jit
    def logits(params, rows):
        values = tree.replace(state.params, params)
        return WIDER.apply(values, {}, x[rows], train=True)[0]

    @jax.jit
    @jax.grad
    def summed(params, rows):
        picked = jax.nn.one_hot(jnp.asarray(y)[rows], 10)
        return -jnp.sum(picked * jax.nn.log_softmax(logits(params, rows)))

    def gradient(params, rows):
        return jax.device_get(summed(params, rows))

    params, after = jax.device_get(tree.flatten(state.params)), []
    masks = {path: leaf == leaf for path, leaf in params.items()}
    kernels = [path for path in params if path.endswith("kernel")]
    for stage, (seen, held_out) in enumerate(table.visible):
        grads = gradient(params, arrivals.sample_of(STREAM, table, state, stage))
        scores = {p: np.where(masks[p], abs(params[p] * grads[p]), -1) for p in kernels}
        every = np.sort(np.concatenate([np.ravel(scores[path]) for path in kernels]))
        least = every[-round(STREAM.densities[stage] * every.size)]
        masks |= {path: scores[path] >= least for path in kernels}
        params = {path: leaf * masks[path] for path, leaf in params.items()}
        moments, best = dict.fromkeys(params, np.float32(0)), (-1.0, params)
        steps = len(seen) // 8
        for epoch, rate in enumerate(np.float32([0.05, 0.005])):
            order = data.epoch_batches(seen, epoch * steps, steps, 8, (seed, stage))
            for rows in order:
                grads = gradient(params, rows)
                for path, leaf in params.items():
                    decay = np.float32(5e-4 * (path in kernels)) * leaf
                    slope = (grads[path] / np.float32(8) + decay) * masks[path]
                    moments[path] = np.float32(0.9) * moments[path] + slope
                params = {p: leaf - rate * moments[p] for p, leaf in params.items()}
            accuracy = np.mean(np.argmax(logits(params, held_out), 1) == y[held_out])
            best = (accuracy, params) if accuracy > best[0] else best
        params = best[1]
        after.append((params, dict(masks)))
    return after


def test_stages_are_those_of_a_loop_written_out():
    given = Streamed(OPTIONS, STREAM, np.asarray(labelled().labels))
    training = constrain(start(False, WIDER), *STREAM_METHODS["app"].constraints(given))
    made = make_program(training)
    found, expected = learn(made, seed=2), learn_literally(made, seed=2)
    assert len(found) == len(expected) == STAGES
    for (state, _), (params, masks) in zip(found, expected, strict=True):
        live = tree.flatten(get_masks(state.opt_state))
        for path, leaf in tree.flatten(state.params).items():
            np.testing.assert_array_equal(live[path], masks[path], path)
            np.testing.assert_allclose(leaf, params[path], atol=1e-4)


def test_scratch_begins_every_stage_anew():
    heads = {"dense": [], "scratch": []}
    for name, kept in heads.items():
        made = program(name)

        def begun(progress, kept=kept):
            kept.append(np.array(progress.state.params["head"]["bias"]))

        fit(made, begin(made, 0), labelled(), Watch(begun=begun))
    first = [not bias.any() for bias in heads["scratch"][::STAGES]]
    assert first == [True] * STAGES
    assert [not bias.any() for bias in heads["dense"][::STAGES]] == [True, False, False]


# What prunes


@pytest.mark.parametrize(
    ("criterion", "scope"),
    [
        *(("snip", "global"), ("grasp", "global")),
        *(("wanda", "global"), ("magnitude", "leaf")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *itertools.product(
                    ("gradient", "fisher", "synflow", "random"), ("global", "leaf")
                ),
                *(
                    ("snip", "leaf"),
                    ("grasp", "leaf"),
                    ("wanda", "leaf"),
                    ("magnitude", "global"),
                ),
            ]
        ),
    ],
)
def test_criteria_prune_to_the_density_and_cost_their_passes(criterion, scope):
    made, sample = program("app"), train.take(labelled(), jnp.arange(12))
    chosen = dataclasses.replace(STREAM, criterion=criterion, scope=scope)
    state = begin(made, 0).state
    prune = arrivals.make_pruner(made.training, chosen)
    pruned, spent = prune(state, sample, 0.25, 1)
    network = made.training.network
    live = live_weights(network, made.training.masks(pruned).trained)
    assert sum(live.values()) == round(0.25 * network.weights)
    if scope == "leaf":
        assert live["head/kernel"] == 20
    passes = {"magnitude": 0, "random": 0, "wanda": 12, "grasp": 144, "synflow": 300}
    assert spent == passes.get(criterion, 36) * network.dense_macs


def test_the_weights_that_are_scored_are_the_live_ones_or_fresh(monkeypatch):
    scored, prune = [], anytime.prune

    def watched(masks, params, *given):
        scored.append((masks, params))
        return prune(masks, params, *given)

    monkeypatch.setattr(anytime, "prune", watched)
    learn(program("app"))
    assert len(scored) == STAGES
    for masks, params in scored:
        assert same(apply_masks(params, masks), params)
    scored.clear()
    learn(program("app_2022"))
    _, second, third = [params["dense1"]["kernel"] for _, params in scored]
    assert np.abs(second).max() <= 1 / 8  # Uniform in +-1 / sqrt(64).
    assert (second != 0).all()  # The dead compete as well.
    assert (second != third).mean() > 0.99


# What is visible


def test_the_released_order_is_that_of_the_data():
    labels = np.arange(180) % 10
    table = make_timetable(dataclasses.replace(STREAM, compat="app-2022"), labels, 0)
    first = np.concatenate(table.arrived[0])
    np.testing.assert_array_equal(np.sort(first), np.arange(60))


def test_a_stream_sorted_by_class_trains_on_all_of_them_or_is_refused():
    labels = np.repeat(np.arange(10), 18)
    for stratified, megabatches in ((False, 3), (True, 3), (True, 1)):
        options = StreamOptions(
            megabatches=megabatches, stratified=stratified, permuted=False
        )
        last = make_timetable(options, labels, 0).visible[-1]
        assert set(labels[last.train]) == set(range(10))
        assert not stratified or set(labels[last.validation]) == set(range(10))
    options = StreamOptions(megabatches=3, permuted=False, wait=2)
    with pytest.raises(ValueError, match=r"none of the examples of \[7, 8, 9\]"):
        make_timetable(options, labels, 0)


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


@pytest.mark.slow
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
    assert layers == {"dense1/kernel": 1.0, "head/kernel": 0.1}
    assert live_weights(made.training.network, masks)["head/kernel"] == 8


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
