"""Rounds of pruning whose network learns from one that was trained before it."""

import jax
import numpy as np
import pytest
from tiny import KERNELS, SHAPES, arrays, assert_close, copy, images, start

from d2sparse import train
from d2sparse.constraints import Rewinds, distilled, distilled_rounds
from d2sparse.lottery import round_sparsities
from d2sparse.reparam import nonzero_masks
from d2sparse.train import constrain, make_program
from d2sparse.transforms import get_masks

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
