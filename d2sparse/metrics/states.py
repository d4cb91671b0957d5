"""ON/OFF states of rectified units, counted over batches.

A rectifier is ON where its pre-activation z is positive. States are counted over
batches, and `metrics.layer_entropy` and the like are taken once, of the counts:
whatever the batches were, they are those of the whole set. Entropy is concave, so the
mean of the entropies of batches is lower, the more so the smaller the batches are.
"""

import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from d2sparse.checks import check_by_path, check_choice, check_whole

Pool = Literal["channel", "unit"]


class StateCounts(NamedTuple):
    """How often the units of a layer were in which state; NaN is none of them.

    Counts are exact up to 2^31 - 1. What exceeds that is -1 from then on, and its
    entropy is NaN.

    Attributes:
      positive: of z > 0, int32[...].
      zero: of z = 0, of the same shape.
      negative: of z < 0, of the same shape.
    """

    positive: jax.Array
    zero: jax.Array
    negative: jax.Array


def count_states(
    counts: Mapping[str, StateCounts] | None,
    preactivations: Mapping[str, jax.Array],
    *,
    pool: Pool = "channel",
    where: jax.Array | None = None,
) -> dict[str, StateCounts]:
    """Adds the states of a batch to the counts by layer.

    Args:
      counts: of the batches before; None for the first.
      preactivations: by layer, what enters its rectifiers, `float[batch, ...,
        channels]`, with the statistics of normalisations as in evaluation;
        `models.taps.read` of a network gives the inputs of its rectifiers.
      pool: what is one unit: a "channel" with all its positions, or every position of
        every channel, "unit".
      where: `bool[batch]`, the examples that count; all if not given. A last batch that
        is padded is right with it.

    Returns:
      By layer, counts of shape `int32[channels]` or, of every unit, `int32[...,
      channels]`.

    Raises:
      ValueError: the layers are not those counted before, an activation has less than
        two axes, or another pool.

    >>> z = jnp.array([[-1.0, 2.0], [0.0, 1.0], [3.0, 1.0]])
    >>> counts = count_states(None, {"dense1": z})
    >>> counts = count_states(counts, {"dense1": z})
    >>> [count.tolist() for count in counts["dense1"]]
    [[2, 6], [2, 0], [2, 0]]
    """
    return _count(counts, preactivations, pool, where)


def count_states_by_class(
    counts: Mapping[str, StateCounts] | None,
    preactivations: Mapping[str, jax.Array],
    labels: jax.Array,
    classes: int,
    *,
    pool: Pool = "unit",
    where: jax.Array | None = None,
) -> dict[str, StateCounts]:
    """Adds the states of a batch to the counts by layer and class, for `psp_entropy`.

    Args:
      counts: of the batches before; None for the first.
      preactivations: as in `count_states`.
      labels: `int[batch]`, from 0 to classes - 1; others are not counted.
      classes: their number; static.
      pool: as in `count_states`.
      where: as in `count_states`.

    Returns:
      By layer, counts of shape `int32[..., channels, classes]`, or `int32[channels,
      classes]` where positions are pooled.

    Raises:
      ValueError: as in `count_states`, or no class.

    >>> z = jnp.array([[-1.0], [1.0], [2.0], [3.0]])
    >>> labels = jnp.array([0, 0, 1, 1])
    >>> counts = count_states_by_class(None, {"dense1": z}, labels, classes=2)
    >>> counts["dense1"].positive.tolist(), counts["dense1"].negative.tolist()
    ([[1, 2]], [[1, 0]])
    """
    check_whole("classes", classes, least=1)
    return _count(counts, preactivations, pool, where, labels, classes)


def _count(
    counts: Mapping[str, StateCounts] | None,
    preactivations: Mapping[str, jax.Array],
    pool: Pool,
    where: jax.Array | None,
    labels: jax.Array | None = None,
    classes: int = 0,
) -> dict[str, StateCounts]:
    check_choice("pool", pool, ("channel", "unit"))
    check_by_path("preactivations", preactivations, of="arrays")
    if counts is not None and sorted(counts) != sorted(preactivations):
        raise ValueError(
            f"expected pre-activations of the layers counted before, {sorted(counts)}, "
            f"got {sorted(preactivations)}; start from None to count others"
        )
    added = {}
    for layer, z in preactivations.items():
        _check_batch(layer, z, where, labels)
        batch = _count_batch(z, where, labels, pool, classes)
        added[layer] = batch if counts is None else _add(counts[layer], batch)
    return added


# Compiled by layer: operation by operation they would be a dozen programs.
@functools.partial(jax.jit, static_argnames=("pool", "classes"))
def _count_batch(
    z: jax.Array,
    where: jax.Array | None,
    labels: jax.Array | None,
    pool: Pool,
    classes: int,
) -> StateCounts:
    positions = tuple(range(1, z.ndim - 1)) if pool == "channel" else ()

    def total(state: jax.Array) -> jax.Array:
        if where is not None:
            state &= where.reshape(-1, *[1] * (z.ndim - 1))
        by_example = jnp.sum(state, axis=positions, dtype=jnp.int32)
        if labels is None:
            return jnp.sum(by_example, axis=0, dtype=jnp.int32)
        by_class = jax.ops.segment_sum(by_example, labels, classes)
        return jnp.moveaxis(by_class, 0, -1)

    return StateCounts(total(z > 0), total(z == 0), total(z < 0))


@jax.jit
def _add(before: StateCounts, batch: StateCounts) -> StateCounts:
    def add(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where((a < 0) | (a + b < 0), -1, a + b)  # A sum too large wraps.

    return jax.tree.map(add, StateCounts(*before), batch)


def _check_batch(
    layer: str, z: jax.Array, where: jax.Array | None, labels: jax.Array | None
) -> None:
    if jnp.ndim(z) < 2:
        raise ValueError(
            f"expected float[batch, ..., channels] as pre-activations of {layer!r}, "
            f"got shape {jnp.shape(z)}; give the whole batch at once"
        )
    for name, given in (("where", where), ("labels", labels)):
        if given is not None and jnp.shape(given) != z.shape[:1]:
            raise ValueError(
                f"expected `{name}` of shape {z.shape[:1]} for the batch at {layer!r}, "
                f"got {jnp.shape(given)}; give one number for each example"
            )
    if where is not None and where.dtype != bool:
        raise ValueError(
            f"expected bool[batch] as `where`, True for the examples that count, got "
            f"{where.dtype}; compare or cast it"
        )
