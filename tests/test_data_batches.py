"""Minibatch streams against a loop over epochs and steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sparse.data import batch_indices, steps_per_epoch

# (size, batch_size): ragged, exact, more than the data, single examples.
SIZES = [(10, 4), (12, 4), (3, 8), (3, 1)]


def looped(key, start, num_steps, size, batch_size):
    """One batch at a time, each from the permutation of its own epoch."""
    batch = min(size, batch_size)
    rows = []
    for step in range(start, start + num_steps):
        epoch, position = divmod(step, size // batch)
        order = jax.random.permutation(jax.random.fold_in(key, epoch), size)
        rows.append(np.asarray(order)[position * batch : (position + 1) * batch])
    return np.stack(rows)


@pytest.mark.parametrize(("size", "batch_size"), SIZES)
def test_the_stream_is_that_of_the_loop_from_any_start(size, batch_size):
    key = jax.random.key(1)
    stream = looped(key, 0, 14, size, batch_size)
    for start in range(8):
        rows = batch_indices(key, start, num_steps=6, size=size, batch_size=batch_size)
        assert rows.dtype == jnp.int32
        np.testing.assert_array_equal(rows, stream[start : start + 6])


@pytest.mark.parametrize("num_steps", [1, 3, 4])
def test_any_number_of_steps_from_any_place_in_an_epoch(num_steps):
    key = jax.random.key(2)
    stream = looped(key, 0, 11, 10, 3)
    for start in range(7):
        rows = batch_indices(key, start, num_steps=num_steps, size=10, batch_size=3)
        np.testing.assert_array_equal(rows, stream[start : start + num_steps])


def test_an_epoch_visits_no_example_twice():
    steps = steps_per_epoch(100, 32)
    stream = batch_indices(jax.random.key(3), 0, 9 * steps, size=100, batch_size=32)
    epochs = np.asarray(stream).reshape(9, steps * 32)
    for epoch in epochs:
        assert len(set(epoch.tolist())) == steps * 32
        assert 0 <= epoch.min() <= epoch.max() < 100
    assert len({tuple(epoch) for epoch in epochs}) == 9
    # Nobody is in the ragged tail of every epoch.
    assert set(epochs.ravel().tolist()) == set(range(100))


def test_one_trace_serves_every_start():
    traces = []

    @jax.jit
    def at(start):
        traces.append(start)
        return batch_indices(jax.random.key(0), start, 6, size=10, batch_size=4)

    stream = looped(jax.random.key(0), 0, 20, 10, 4)
    for start in (0, 1, 9, 14):
        np.testing.assert_array_equal(at(start), stream[start : start + 6])
    assert len(traces) == 1


def test_keys_and_starts_vmap():
    keys, starts = jax.random.split(jax.random.key(0), 3), jnp.array([0, 4, 11])
    rows = jax.vmap(lambda k, s: batch_indices(k, s, 6, 10, 4))(keys, starts)
    for i in range(3):
        np.testing.assert_array_equal(
            rows[i], looped(keys[i], int(starts[i]), 6, 10, 4)
        )
    assert not (rows[0] == rows[1]).all()


def test_late_steps_are_exact():
    start = 2**31 - 10
    rows = batch_indices(jax.random.key(0), start, num_steps=6, size=10, batch_size=4)
    np.testing.assert_array_equal(rows, looped(jax.random.key(0), start, 6, 10, 4))


def test_tiny_epochs_do_not_grow_the_program():
    def operations(num_steps):
        sizes = {"num_steps": num_steps, "size": 100, "batch_size": 32}
        text = batch_indices.lower(jax.random.key(0), 0, **sizes).as_text()
        return text.count("stablehlo.")

    assert operations(2000) == operations(20)


@pytest.mark.parametrize(("size", "batch_size"), SIZES)
def test_steps_per_epoch_counts_whole_batches(size, batch_size):
    whole = len(
        [
            i
            for i in range(0, size, min(batch_size, size))
            if i + min(batch_size, size) <= size
        ]
    )
    assert steps_per_epoch(size, batch_size) == whole


@pytest.mark.parametrize(
    ("num_steps", "size", "batch_size"), [(0, 4, 2), (1, 0, 2), (1, 4, 0), (1, 4, -1)]
)
def test_counts_below_one_are_refused(num_steps, size, batch_size):
    with pytest.raises(ValueError, match="at least 1"):
        batch_indices(jax.random.key(0), 0, num_steps, size, batch_size)
