"""Faults of every kind at a chosen step, against runs that never reach that step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import BATCH, SETTINGS, arrays, centred, copy, images

from d2sparse import constraints, train
from d2sparse.models import Model
from d2sparse.rules import rigl
from d2sparse.schedules import every
from d2sparse.train.loops import Stretch, take_steps
from d2sparse.transforms import get_masks, sparsify

STEPS = 8
KINDS = ("loss", "gradient", "statistics", "refresh", "update")
# A refresh comes every third step; the other faults fall beside it.
FAULTS = [("loss", 0), ("gradient", 2), ("statistics", 5), ("refresh", 3)]
FAULTS += [("update", 4)]


MODEL = centred()  # Its statistics are means of a batch.
TX = sparsify(optax.adam(0.01), rigl(0.5), every(3))


@pytest.fixture(scope="module")
def data():
    return images()


def poison(where, value):
    return jnp.where(where, value, 0.0)


def faulty(state, data, indices):
    """A step that goes wrong where the settings say so."""
    settings = state.settings
    due = state.step == settings["at"]
    hit = {kind: due & (settings["kind"] == n) for n, kind in enumerate(KINDS)}

    def apply(params, model_state, x, *, train):
        logits, model_state = MODEL.apply(params, model_state, x, train=train)
        wrong = poison(hit["statistics"], jnp.nan)
        return logits, jax.tree.map(lambda leaf: leaf + wrong, model_state)

    def loss(logits, batch, context):
        value, logs = plain.loss(logits, batch, context)
        # The factor has a gradient, its product none of its own.
        slope = jnp.sum(context.params["kernel"])
        if len(batch.labels) > BATCH:
            return value + slope * poison(hit["refresh"], jnp.nan), logs
        logs = logs | {"loss": logs["loss"] + poison(hit["loss"], jnp.nan)}
        return value + slope * poison(hit["gradient"], jnp.inf), logs

    plain = train.plain(MODEL, data)
    training = plain._replace(
        model=Model(MODEL.init, apply),
        loss=loss,
        transform=lambda *_: TX,
        growth_samples=16,
        when=every(3),
    )
    after, logs = train.make_step(training)(state, data, indices)
    # What a learning rate of 1e39 does to a finite gradient.
    rate = jnp.where(hit["update"], jnp.inf, 1.0)
    return after._replace(params=jax.tree.map(lambda w: rate * w, after.params)), logs


def runner(step, backend):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: backend)
        return train.make_runner(step)


@pytest.fixture(scope="module", params=["cpu", "gpu"], ids=["loop", "scan"])
def run(request):
    return runner(faulty, request.param)


@functools.cache
def starter():
    return jax.jit(
        lambda key, data, settings, skip: train.init_state(
            MODEL, TX, data, key, settings, skip_faults=skip
        )
    )


def begin(data, kind="loss", at=-1, skip=False, seed=0):
    settings = {**SETTINGS, "at": at, "kind": KINDS.index(kind)}
    return starter()(jax.random.key(seed), data, settings, skip)


def assert_same_bits(state, expected):
    state, expected = arrays(state), arrays(expected)
    assert state.keys() == expected.keys()
    for path, numbers in expected.items():
        np.testing.assert_array_equal(state[path], numbers, err_msg=path)


def assert_pruned(params, masks):
    params, masks = arrays(params), arrays(masks)
    assert any(not mask.all() for mask in masks.values())
    for path, mask in masks.items():
        assert not np.any(params[path][~mask]), path


def in_single_steps(run, state, data, stop):
    """One call of the runner for each step: every stretch is one program."""
    return (
        take_steps(run, state, data, Stretch(stop, BATCH, every=1)) if stop else state
    )


@pytest.mark.parametrize(("kind", "at"), FAULTS)
def test_a_fault_stops_the_run_with_the_state_before_it(run, data, kind, at):
    saved = []
    with pytest.raises(FloatingPointError, match=rf"update of step {at} is not"):
        take_steps(
            run,
            begin(data, kind, at),
            data,
            Stretch(
                STEPS,
                BATCH,
                every=4,
                save=lambda state, logs: saved.append((copy(state), logs)),
            ),
        )
    (halted, logs), expected = saved[-1], begin(data, kind, at)
    assert len(saved) == 1
    assert train.has_failed(halted)
    stop = 4 * (at // 4 + 1)
    assert int(halted.step) == stop
    assert halted.faults._asdict() == {"total": 1, "first": at, "skip": False}
    expected = in_single_steps(run, expected, data, at)
    assert_same_bits(train.last_good(halted), expected)
    assert_same_bits(halted[1:5], expected[1:5])
    assert_pruned(halted.params, get_masks(halted.opt_state))
    skipped = [0.0] * (at % 4) + [1.0] * (4 - at % 4)
    assert [float(value) for value in logs["skipped"]] == skipped


@pytest.mark.parametrize(("kind", "at"), FAULTS)
def test_a_skipped_fault_leaves_out_one_update(run, data, kind, at):
    reports = []
    skipping = take_steps(
        run,
        begin(data, kind, at, skip=True),
        data,
        Stretch(
            STEPS,
            BATCH,
            every=4,
            report=lambda step, state, means: reports.append(means),
        ),
    )
    assert skipping.faults._asdict() == {"total": 1, "first": at, "skip": True}
    expected, losses = begin(data, kind, at, skip=True), []
    for step in range(STEPS):
        if step == at:
            expected = expected._replace(step=jnp.int32(at + 1), faults=skipping.faults)
            losses.append(np.nan)
            continue
        row = train.step_indices(expected, data, 1, BATCH)
        expected, logs = run(copy(expected), data, row)
        losses.append(np.asarray(logs["loss"])[0])
    assert_same_bits(skipping, expected)
    assert_pruned(skipping.params, get_masks(skipping.opt_state))
    # The mean is over the steps whose update was taken.
    means = np.nanmean(np.reshape(losses, (2, 4)), axis=1)
    np.testing.assert_allclose([r["loss"] for r in reports], means, rtol=1e-6)
    counts = [r.get("skipped") for r in reports]
    assert counts == ([1, 1] if at < 4 else [None, 1])


def test_a_run_may_go_on_from_the_last_good_state(run, data):
    saved = []
    with pytest.raises(FloatingPointError):
        take_steps(
            run,
            begin(data, "gradient", 2),
            data,
            Stretch(
                STEPS,
                BATCH,
                every=4,
                save=lambda state, logs: saved.append(copy(train.last_good(state))),
            ),
        )
    healed = saved[0]._replace(settings=begin(data).settings)
    end = in_single_steps(run, healed, data, STEPS)
    assert_same_bits(end, in_single_steps(run, begin(data), data, STEPS))


def test_what_has_not_failed_is_its_own_last_good_state(data):
    state = begin(data, skip=True)
    state = state._replace(
        faults=train.Faults(jnp.int32(2), jnp.int32(1), jnp.array(True))
    )
    assert not train.has_failed(state)
    assert train.last_good(state) is state


@pytest.fixture(scope="module")
def compiled(data):
    """A step without and with the guard, which use up the state they are given."""
    state = begin(data)
    row = train.step_indices(state, data, 1, BATCH)[0]
    steps = faulty, train.guard(faulty)
    return [
        jax.jit(step, donate_argnums=0).lower(state, data, row).compile()
        for step in steps
    ]


def test_a_guard_changes_no_bit_of_a_finite_run(data, compiled):
    bare, guarded = begin(data), begin(data)
    plain, step = compiled
    for row in train.step_indices(bare, data, STEPS, BATCH):
        bare, bare_logs = plain(bare, data, row)
        guarded, logs = step(guarded, data, row)
        assert logs.pop("skipped") == 0
        assert bare_logs.pop("finite")
        assert_same_bits(logs, bare_logs)
    assert_same_bits(guarded, bare)


def test_a_guarded_state_is_donated_like_any_other(data, compiled):
    plain, guarded = (step.memory_analysis() for step in compiled)
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(begin(data).params))
    # All of the state but a few scalars goes where it came from: Adam has two moments.
    assert guarded.alias_size_in_bytes >= plain.alias_size_in_bytes
    assert guarded.alias_size_in_bytes > 3 * parameters


@functools.cache
def guarded_pair():
    """A pair under masks whose losses are NaN at step 4."""

    def poisoned(training):
        def loss(outputs, batch, context):
            value, logs = training.loss(outputs, batch, context)
            due = context.step == context.settings["at"]
            return value * (1 + poison(due, jnp.nan)), logs

        settings = {**training.settings, "at": 4}
        return training._replace(loss=loss, settings=settings)

    sides = [(constraints.static(0.5),)] * 2
    recipe = train.Recipe(STEPS, BATCH)
    training = train.constrain(
        train.plain(MODEL, images(), recipe), poisoned, constraints.coupled(*sides)
    )
    stopping, skipping = (train.make_program(training, skip_faults=s) for s in (0, 1))
    # Whether to skip is a part of the state: one compiled program serves both.
    return stopping, {False: stopping.init, True: skipping.init}


@pytest.mark.parametrize("skip", [False, True])
def test_a_pair_is_guarded_as_a_whole(data, skip):
    (program, init), at, saved = guarded_pair(), 4, []
    start = jax.jit(init[skip])(jax.random.key(0), data)
    rows = train.step_indices(start.state, data, STEPS, BATCH)
    expected, _ = program.run(copy(start.state), data, rows[:at])
    kept = copy(expected)
    if skip:
        end = train.fit(program, start, data).state
        faults = end.faults
        assert faults._asdict() == {"total": 1, "first": at, "skip": True}
        expected = expected._replace(step=jnp.int32(at + 1), faults=copy(faults))
        again, _ = program.run(expected, data, rows[at + 1 :])
        assert_same_bits(end, again)
        assert_pruned(end.params, constraints.pair_masks(end))
        return
    watch = train.Watch(save=lambda progress, logs: saved.append(copy(progress.state)))
    with pytest.raises(FloatingPointError, match=f"update of step {at} "):
        train.fit(program, start, data, watch)
    assert_same_bits(train.last_good(saved[0]), kept)
