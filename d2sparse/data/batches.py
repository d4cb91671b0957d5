"""The stream of minibatches, as a pure function of a key and the step."""

import functools

import jax
import jax.numpy as jnp


def steps_per_epoch(size: int, batch_size: int) -> int:
    """Number of whole batches in one pass over the data; the ragged tail is dropped.

    Args:
      size: number of training examples, at least 1.
      batch_size: examples per step, at least 1. More than `size` means `size`.

    Raises:
      ValueError: one of them is below 1.

    >>> steps_per_epoch(size=100, batch_size=32), steps_per_epoch(10, 32)
    (3, 1)
    """
    if size < 1 or batch_size < 1:
        raise ValueError(
            f"expected size and batch_size of at least 1, got {size} and {batch_size}"
        )
    return max(size // batch_size, 1)


@functools.partial(jax.jit, static_argnames=("num_steps", "size", "batch_size"))
def batch_indices(
    key: jax.Array,
    start: int | jax.Array,
    num_steps: int,
    size: int,
    batch_size: int,
) -> jax.Array:
    """Which examples the steps `start` to `start + num_steps - 1` are trained on.

    The stream is endless: epoch e visits the examples in the order of a permutation
    drawn from `fold_in(key, e)`, cut into whole batches. Step t has the same batch
    whatever `start` is, so a resumed run sees what an uninterrupted one would have
    seen. Only the epochs that these steps touch are drawn.

    Args:
      key: a `jax.random.key`.
      start: first step, at least 0; it may be traced.
      num_steps: number of steps, at least 1.
      size: number of training examples.
      batch_size: examples per step; where `size` is smaller, a batch is all the data.

    Returns:
      int32[num_steps, min(batch_size, size)] indices from 0 to `size` - 1.

    Raises:
      ValueError: `num_steps`, `size` or `batch_size` is below 1.

    >>> key = jax.random.key(0)
    >>> stream = batch_indices(key, 0, num_steps=8, size=10, batch_size=4)
    >>> resumed = batch_indices(key, 5, num_steps=3, size=10, batch_size=4)
    >>> stream.shape, bool((stream[5:] == resumed).all())
    ((8, 4), True)
    """
    steps = steps_per_epoch(size, batch_size)
    batch = min(batch_size, size)
    if num_steps < 1:
        raise ValueError(f"expected num_steps of at least 1, got {num_steps}")
    # The worst case starts on the last step of an epoch.
    num_epochs = 1 + -(-(num_steps - 1) // steps)

    def epoch(number: jax.Array) -> jax.Array:
        order = jax.random.permutation(jax.random.fold_in(key, number), size)
        return order[: steps * batch].reshape(steps, batch)

    first = jnp.asarray(start, jnp.int32) // steps
    epochs = jax.vmap(epoch)(first + jnp.arange(num_epochs, dtype=jnp.int32))
    stream = epochs.reshape(num_epochs * steps, batch).astype(jnp.int32)
    return jax.lax.dynamic_slice_in_dim(stream, start - first * steps, num_steps)
