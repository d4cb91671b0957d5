"""Rounds of pruning whose network learns from one that was trained before it."""

import jax
import numpy as np
import pytest
from runs import quick_compilation
from tiny import (
    BATCH,
    CLASSES,
    KERNELS,
    SHAPES,
    arrays,
    assert_close,
    copy,
    images,
    start,
)

from d2sparse import models, train
from d2sparse.constraints import (
    Rewinds,
    distilled,
    distilled_rounds,
    iterative_magnitude,
    stopped_by_entropy,
)
from d2sparse.lottery import round_sparsities
from d2sparse.models.mlp import MLP
from d2sparse.reparam import nonzero_masks
from d2sparse.train import constrain, make_program
from d2sparse.transforms import get_masks


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


STEPS, SPARSITY, LESSON = 6, 0.75, (2.0, 3.0)
TOTAL = sum(int(np.prod(shape)) for shape in SHAPES.values())


@pytest.fixture(scope="module")
def ends():
    """The states at the ends of the phases, and the training."""
    rewinds = Rewinds(0.0, "learning_rate")
    training = constrain(
        start(steps=STEPS),
        distilled_rounds(sparsity=SPARSITY, rounds=2, rewinds=rewinds, lesson=LESSON),
    )
    program, found = make_program(training), {}

    def note(progress, pending):
        found[int(progress.phase), int(progress.state.step)] = copy(progress.state)

    watch = train.Watch(every=STEPS, save_every=STEPS, save=note)
    begun = program.init(jax.random.key(0), images())
    end = train.fit(program, begun, images(), watch)
    return [found[n, STEPS] for n in (0, 2, 3)] + [end.state], training


def test_the_first_round_is_the_student_of_the_network_that_was_trained(ends):
    (teacher, student, *_), _ = ends
    alone = make_program(
        constrain(
            start(steps=STEPS), distilled(weight=LESSON[0], temperature=LESSON[1])
        )
    )
    begun = alone.init(jax.random.key(0), images())
    expected = train.fit(alone, begun, images()).state
    # Two programs, of which one has masks.
    assert_close(student.params, expected.params, atol=1e-6)
    (taught_by,) = student.model_state.teachers
    assert_close(taught_by.params, teacher.params)


def test_every_round_is_sparser_and_has_the_same_teacher(ends):
    (_, *rounds), training = ends
    assert [phase.title for phase in training.phases[2:]] == [
        *("round 0", "round 1", "round 2"),
    ]
    left = [0.0, *round_sparsities(SPARSITY, 2)]
    for state, sparsity in zip(rounds, left, strict=True):
        masks = arrays(get_masks(state.opt_state))
        live = sum(int(masks[path].sum()) for path in KERNELS)
        assert live == round((1 - sparsity) * TOTAL)
        for path in KERNELS:
            assert (arrays(state.params)[path][~masks[path]] == 0).all()
        assert_close(state.model_state.teachers, rounds[0].model_state.teachers)


def test_weights_go_on_from_round_to_round(ends):
    (_, _, before, after), _ = ends
    live = arrays(nonzero_masks(after.params))["first/kernel"]
    old, new = (arrays(s.params)["first/kernel"][live] for s in (before, after))
    assert np.corrcoef(old, new)[0, 1] > 0.9


@pytest.mark.parametrize("lesson", [(-1.0, 1.0), (1.0, 0.0)])
def test_a_lesson_out_of_its_range_is_refused(lesson):
    with pytest.raises(ValueError, match="expected a weight of at least 0"):
        distilled_rounds(sparsity=0.5, lesson=lesson)


# Stopped by entropy.


PRUNED = iterative_magnitude(0.97, 4, Rewinds(0.0, "learning_rate"))


def in_modules():
    """The plain training of a network whose activation function is a module."""
    model = models.from_linen(MLP((8,), CLASSES))
    return train.plain(model, images(), train.Recipe(steps=4, batch_size=BATCH))


def entropy_by_hand(state):
    own = jax.device_get(state.params["dense1"])
    x = np.asarray(train.inputs(images())).reshape(len(images().labels), -1)
    p = ((x @ own["kernel"] + own["bias"]) > 0).mean(axis=0)
    q = np.clip(np.stack([p, 1 - p]), 1e-12, 1)
    return -(q * np.log2(q)).sum(axis=0).mean()


def trained(drop):
    """The progress at the end, and the states at the ends of the rounds."""
    program = make_program(constrain(in_modules(), PRUNED, stopped_by_entropy(drop)))
    begun, states = program.init(jax.random.key(0), images()), []
    watch = train.Watch(
        every=4, save_every=4, save=lambda p, logs: states.append(copy(p.state))
    )
    return train.fit(program, begun, images(), watch), states


@pytest.fixture(scope="module")
def whole():
    return trained(0.999)


def test_entropies_of_all_rounds_are_remembered(whole):
    progress, states = whole
    assert len(states) == 5
    found = np.asarray(progress.memory["entropies"])
    # Phase 0 has no step, and nothing is asked after the last round.
    expected = [np.nan, *map(entropy_by_hand, states[:-1]), np.nan]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_it_ends_at_the_first_round_below_the_largest_entropy(whole):
    bits = [entropy_by_hand(state) for state in whole[1][:-1]]
    gone = [1 - now / max(bits[: n + 1]) for n, now in enumerate(bits)]
    first = next(n for n, part in enumerate(gone) if part > 0.01)
    progress, states = trained(gone[first] - 1e-3)
    assert len(states) == first + 1
    assert_close(progress.state.params, whole[1][first].params)
    noted = np.asarray(progress.memory["entropies"])
    assert np.isnan(noted[first + 2 :]).all()


def test_what_has_no_rounds_or_no_modules_cannot_be_stopped():
    with pytest.raises(ValueError, match="put it after iterative_magnitude"):
        constrain(in_modules(), stopped_by_entropy())
    with pytest.raises(ValueError, match="expected a drop above 0"):
        stopped_by_entropy(0.0)
    training = constrain(start(steps=2), iterative_magnitude(0.5, 1))
    program = make_program(constrain(training, stopped_by_entropy()))
    with pytest.raises(ValueError, match="activation functions that are Linen"):
        train.fit(program, program.init(jax.random.key(0), images()), images())
