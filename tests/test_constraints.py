"""Every method trains, resumes to the bit from any phase, and counts its cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sparse import data, models, train
from d2sparse.checkpoint import Checkpoints
from d2sparse.checkpoint.leaves import layout
from d2sparse.constraints import (
    METHODS,
    Learners,
    Moves,
    Options,
    Structure,
    averaged,
    coupled,
    iterative_magnitude,
    paired,
    rigl,
    static,
)
from d2sparse.constraints.coupled import pair_masks
from d2sparse.dual import Coupling
from d2sparse.masks import n_of_m
from d2sparse.train import (
    Phase,
    Recipe,
    Watch,
    constrain,
    end,
    fit,
    fit_together,
    make_program,
    plain,
)

STEPS = 24
OPTIONS = Options(
    sparsity=0.5,
    refresh_interval=4,
    growth_samples=16,
    score_samples=8,
    rounds=2,
    horizon=6,
)


# Those that have phases, a state or a loss of their own; the others are slow-marked,
# since the experiments train them too.
BY_DEFAULT = {
    *("rigl", "imp", "soup", "swamp", "free_tickets", "snip", "str"),
    *("self_distilled", "d2_sparse", "d2_consolidated", "d2_merged"),
}
NAMES = [
    pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow)
    for name in METHODS
]


@functools.cache
def digits():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (32, 4, 4, 1)).astype(np.uint8)
    labels = np.arange(32, dtype=np.int32) % 4
    return train.to_device(data.Split(images, labels))


def start(**recipe):
    model = models.make_model("lenet_300_100", 4, 0.04)
    return plain(model, digits(), Recipe(steps=STEPS, batch_size=8, **recipe))


@functools.cache
def program(name):
    """One compiled program a method, shared by the tests."""
    method = METHODS[name]
    recipe = {k: v for k, v in method.sets.items() if k in Recipe._fields}
    own = {k: v for k, v in method.sets.items() if k not in Recipe._fields}
    options = Options(**{**vars(OPTIONS), **own})
    return make_program(constrain(start(**recipe), *method.constraints(options)))


def begin(name, seed=0):
    return program(name).init(jax.random.key(seed), digits())


@functools.cache
def trained(name):
    """The end of a training, and the places where it was saved on the way."""
    saved, logs = [], []

    def save(progress, pending):
        saved.append((jax.tree.map(jnp.copy, progress), dict(pending)))

    def report(progress, means):
        logs.append(means)

    watch = Watch(
        every=5,
        report=report,
        save_every=4,
        save=save,
        begun=lambda progress: save(progress, {}),
    )
    end = fit(program(name), begin(name), digits(), watch)
    return end, saved, logs


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        np.array_equal(np.asarray(_plain(x)), np.asarray(_plain(y)), equal_nan=True)
        for x, y in leaves
    )


def _plain(x):
    is_key = jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x


@pytest.mark.parametrize("name", NAMES)
def test_every_method_trains_predicts_and_counts_its_cost(name):
    own, (end, _, logs) = program(name), trained(name)
    state = own.training.finish(end, digits(), own)
    outputs = own.predict(state, digits())
    for probabilities in outputs.values():
        assert probabilities.shape == (32, 4)
        assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert all(np.isfinite(means["loss"]) and means["macs"] > 0 for means in logs)
    masks = own.training.masks(state)
    sizes = jax.tree.map(jnp.shape, own.training.network.params)
    for live in (*masks.used, *masks.trained, *masks.stored):
        assert jax.tree.map(jnp.shape, live) == sizes


@pytest.mark.parametrize("name", NAMES)
def test_every_method_resumes_to_the_bit(name):
    own, (end, saved, _) = program(name), trained(name)
    assert len(saved) >= 5
    for progress, logs in saved[:: max(len(saved) // 3, 1)]:
        copied = jax.tree.map(jnp.copy, progress)
        again = fit(own, copied, digits(), Watch(every=5, logs=logs))
        assert same(again, end)


@pytest.mark.parametrize("name", ["self_distilled", "d2_distilled", "d2_merged"])
def test_a_checkpoint_has_the_form_of_its_phase(name, tmp_path, caplog):
    own, (end, saved, _) = program(name), trained(name)
    number = [int(progress.phase) for progress, _ in saved]
    handed_over = number.index(1)  # The last of the teacher, the first of the student.
    for place in (2, handed_over - 1, handed_over, handed_over + 1):
        progress, logs = saved[place]
        with Checkpoints(tmp_path / str(place)) as checkpoints:
            checkpoints.save(place, progress, {"phase": number[place]})
            found = checkpoints.restore(
                form=lambda notes: own.form(notes["phase"], digits())
            )
        with jax.log_compiles(), caplog.at_level("WARNING"):
            watch = Watch(every=5, save_every=4, logs=logs)
            again = fit(own, found.state, digits(), watch)
        assert same(again, end)
        assert "ompil" not in caplog.text


def test_the_form_of_a_phase_traces_hand_overs_alone():
    def on_the_host(progress, data, program):
        raise AssertionError("traced")

    training = start()
    phases = (Phase(8), Phase(16, on_the_host), Phase(24))
    own = make_program(training._replace(phases=phases))
    begun = own.init(jax.random.key(0), digits())
    for phase in (-1, 0, 2, 3):
        assert layout(own.form(phase, digits())) == layout(begun)


def test_two_that_decide_the_masks_are_refused_by_a_sentence_with_both_names():
    with pytest.raises(ValueError, match=r"decides the masks, got static and rigl"):
        constrain(start(), static(0.5), rigl(0.5, Moves(4)))
    with pytest.raises(ValueError, match=r"train in one phase"):
        constrain(start(), coupled((iterative_magnitude(0.5),), (), Coupling()))


def test_what_a_constraint_does_not_name_it_leaves_alone():
    training = start()
    changed = {
        name
        for name in training._fields
        if getattr(averaged()(training), name) is not getattr(training, name)
    }
    assert changed == {"transform", "finish"}


def test_runs_in_one_program_are_those_alone():
    own, many = program("imp"), [begin("imp", 0), begin("imp", 1)]
    watches = [Watch(), Watch()]
    ends = fit_together(own, many, [digits(), digits()], watches)
    alone = fit(own, begin("imp", 0), digits())
    for a, b in zip(
        jax.tree.leaves(ends[0].state.params),
        jax.tree.leaves(alone.state.params),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_phase_may_end_the_training():
    def enough(progress, data, program):
        return end(progress)

    phases = (Phase(8), Phase(16, enough), Phase(24))
    short = make_program(start()._replace(phases=phases))
    last = fit(short, short.init(jax.random.key(0), digits()), digits())
    assert int(last.state.step) == 8


def test_growth_is_charged_where_it_happens():
    training = constrain(start(), rigl(0.5, Moves(4, growth_samples=16)))
    own = make_program(training)
    costs = []
    watch = Watch(every=1, report=lambda progress, logs: costs.append(logs["macs"]))
    fit(own, own.init(jax.random.key(0), digits()), digits(), watch)
    plain_cost, refreshes = costs[0], [4, 8, 12, 16]  # In the first three quarters.
    dense = training.network.dense_macs
    for step, cost in enumerate(costs):
        grown = 16 / 8 * (2 * plain_cost / 3 + dense) if step in refreshes else 0
        np.testing.assert_allclose(cost, plain_cost + grown, rtol=1e-6)


@pytest.mark.parametrize("horizon", [None, 6])
def test_both_learners_of_a_pair_have_the_pattern_that_is_asked_for(horizon):
    learners = Learners("symmetric" if horizon is None else "fast_slow", 4)
    pair = paired(
        0.5, learners._replace(horizon=horizon), structure=Structure(None, n_of_m(4))
    )
    training = constrain(start(), pair)
    state = training.init(training, jax.random.key(0), digits(), training.settings)
    for masks in pair_masks(state):
        kernel = np.asarray(masks["dense1"]["kernel"])
        assert (kernel.reshape(-1, 4, kernel.shape[-1]).sum(axis=1) == 1).all()
