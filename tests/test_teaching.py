"""Students against their loss written by hand; their teachers never change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from tiny import CLASSES, SIZE, assert_close, begin, copy, images, perceptron, start

from d2sparse import train
from d2sparse.constraints import distilled
from d2sparse.constraints.distilled import taught
from d2sparse.train import Context, Taught, Teacher, make_program


def student(number, weight=0.7, temperature=1.0, **recipe):
    """A training with teachers, and a state whose teachers are all different."""
    training = taught(start(**recipe), number, weight, temperature)
    state = begin(make_program(training)).state
    x = train.inputs(images())
    teachers = [perceptron().init(jax.random.key(9 + n), x) for n in range(number)]
    known = state.model_state._replace(teachers=tuple(Teacher(*t) for t in teachers))
    return training, copy(state._replace(model_state=known))


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_that_of_numpy(number, temperature):
    training, state = student(number, temperature=temperature, label_smoothing=0.1)
    x, data, known = train.inputs(images()), images(), state.model_state
    outputs, _ = training.model.apply(state.params, known, x, train=True)
    context = Context(state.params, known, state.step, state.settings, x)
    value, logs = training.loss(outputs, data, context)
    logits = np.asarray(outputs, float)
    each = [perceptron().apply(*t, x, train=False)[0] for t in known.teachers]
    said = np.log(np.mean([scipy.special.softmax(z, -1) for z in each], axis=0))
    target = scipy.special.softmax(said / temperature, -1)
    answer = scipy.special.log_softmax(logits / temperature, -1)
    divergence = (target * (np.log(target) - answer)).sum(-1).mean()
    onehot = 0.9 * np.eye(CLASSES)[data.labels] + 0.1 / CLASSES
    entropy = -(onehot * scipy.special.log_softmax(logits, -1)).sum(-1).mean()
    np.testing.assert_allclose(logs["loss"], entropy, rtol=1e-5)
    np.testing.assert_allclose(logs["taught"], temperature**2 * divergence, rtol=1e-4)
    np.testing.assert_allclose(value, entropy + 0.7 * logs["taught"], rtol=1e-5)


def test_a_student_predicts_as_it_does_without_teachers():
    training, state = student(1)
    x = train.inputs(images())
    for is_training in (True, False):
        logits, after = training.model.apply(
            state.params, state.model_state, x, train=is_training
        )
        expected, statistics = perceptron().apply(
            state.params, state.model_state.own, x, train=is_training
        )
        np.testing.assert_array_equal(logits, expected)
        assert isinstance(after, Taught)
        assert_close(after.own, statistics)


def test_training_leaves_teachers_as_they_are_and_follows_them():
    """The first teachers, zeros, share no buffer: the state that holds them is used."""
    training, state = student(2, weight=50.0, learning_rate=0.002)
    one, _ = state.model_state.teachers
    twice = (one, copy(one))
    state = state._replace(model_state=state.model_state._replace(teachers=twice))
    expected = jax.tree.map(np.array, twice)
    own = make_program(training)
    rows = jnp.tile(jnp.arange(SIZE), (40, 1))
    begun = begin(own).state
    own.run(begun, images(), rows[:1])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(begun.model_state))
    state, logs = own.run(state, images(), rows)
    assert_close(state.model_state.teachers, expected)
    assert logs["taught"][-1] < logs["taught"][0] / 2
    assert (logs["skipped"] == 0).all()
    # A forward pass of each teacher.
    macs = training.network.dense_macs
    np.testing.assert_allclose(logs["macs"], (3 + 2) * macs)


@pytest.mark.parametrize("options", [{"weight": -1.0}, {"temperature": 0.0}])
def test_what_is_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match="weight of at least 0 and a temperature abov"):
        distilled(**options)


def test_there_has_to_be_a_teacher():
    with pytest.raises(ValueError, match="at least 1 teacher, got 0"):
        train.with_teachers(perceptron(), 0)
