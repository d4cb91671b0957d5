"""Students against their loss written by hand; their teachers never change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from d2sparse import train
from d2sparse.data import Split
from d2sparse.models import lenet_300_100, resnet8
from d2sparse.train import Taught, Teacher

SIZE, CLASSES = 16, 4


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(SIZE, 8, 8, 1)).astype(np.uint8)
    return train.to_device(Split(images, rng.integers(CLASSES, size=SIZE)))


def taught(model, data, number):
    """A student with teachers of its kind, all different."""
    x = train.inputs(data)
    student = train.with_teachers(model, number)
    params, state = student.init(jax.random.key(0), x)
    teachers = [model.init(jax.random.key(9 + n), x) for n in range(number)]
    return params, state._replace(teachers=tuple(Teacher(*t) for t in teachers))


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_that_of_numpy(data, number, temperature):
    model = lenet_300_100(CLASSES, 0.05)
    params, state = taught(model, data, number)
    loss = train.make_taught_loss(
        model, smoothing=0.1, weight=0.7, temperature=temperature
    )
    value, (after, logs) = loss(params, state, data, jax.random.key(0))
    x = train.inputs(data)
    logits = np.asarray(model.apply(params, {}, x, train=True)[0], float)
    each = [model.apply(*t, x, train=False)[0] for t in state.teachers]
    said = np.log(np.mean([scipy.special.softmax(z, -1) for z in each], axis=0))
    target = scipy.special.softmax(said / temperature, -1)
    answer = scipy.special.log_softmax(logits / temperature, -1)
    divergence = (target * (np.log(target) - answer)).sum(-1).mean()
    onehot = 0.9 * np.eye(CLASSES)[data.labels] + 0.1 / CLASSES
    own = -(onehot * scipy.special.log_softmax(logits, -1)).sum(-1).mean()
    np.testing.assert_allclose(logs["loss"], own, rtol=1e-5)
    np.testing.assert_allclose(logs["taught"], temperature**2 * divergence, rtol=1e-4)
    np.testing.assert_allclose(value, own + 0.7 * logs["taught"], rtol=1e-5)
    assert after.teachers is state.teachers


def test_a_student_predicts_as_it_does_without_teachers(data):
    model = resnet8(CLASSES, width=2)
    params, state = taught(model, data, 1)
    x = train.inputs(data)
    for is_training in (True, False):
        logits, after = train.with_teachers(model).apply(
            params, state, x, train=is_training
        )
        expected, own = model.apply(params, state.own, x, train=is_training)
        np.testing.assert_array_equal(logits, expected)
        assert isinstance(after, Taught)
        jax.tree.map(np.testing.assert_array_equal, after.own, own)


def test_training_leaves_teachers_as_they_are_and_follows_them(data):
    model = resnet8(CLASSES, width=2)
    tx = train.make_optimizer("sgd", 0.05)
    student = train.with_teachers(model, 2)
    state = train.init_state(student, tx, data, jax.random.key(0))
    x = train.inputs(data)
    teacher = model.init(jax.random.key(7), x)
    twice = (Teacher(*teacher), Teacher(*jax.tree.map(jnp.copy, teacher)))
    state = state._replace(model_state=state.model_state._replace(teachers=twice))
    kept = jax.tree.map(np.array, twice)
    loss = train.make_taught_loss(model, weight=50.0)
    run = train.make_runner(train.make_train_step(loss, tx))
    indices = train.step_indices(state, data, 40, SIZE)
    state, logs = run(state, data, indices)
    jax.tree.map(np.testing.assert_array_equal, state.model_state.teachers, kept)
    assert logs["taught"][-1] < logs["taught"][0] / 2
    assert (logs["skipped"] == 0).all()


def test_the_first_teachers_share_no_buffer(data):
    student = train.with_teachers(lenet_300_100(CLASSES, 0.05), 2)
    _, state = student.init(jax.random.key(0), train.inputs(data))
    jax.jit(lambda s: s, donate_argnums=0)(state)


@pytest.mark.parametrize("options", [{"weight": -1.0}, {"temperature": 0.0}])
def test_what_is_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match="weight of at least 0 and a temperature abov"):
        train.make_taught_loss(lenet_300_100(), **options)


def test_there_has_to_be_a_teacher():
    with pytest.raises(ValueError, match="at least 1 teacher, got 0"):
        train.with_teachers(lenet_300_100(), 0)
