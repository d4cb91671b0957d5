"""Refreshes and sorts, compiled for devices that there are."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.scaling.methods import Method
from experiments.scaling.trees import Shapes


def compile_refresh(
    method: Method, shapes: Shapes, shardings: Mapping[str, NamedSharding]
) -> jax.stages.Compiled:
    """The refresh `(masks, params, grads, step, key) -> masks` of sharded leaves."""
    masks, weights = (like(shapes, shardings, x) for x in (jnp.bool, jnp.float32))
    key = jax.eval_shape(lambda: jax.random.key(0))
    refresh = jax.jit(method.rule.update, out_shardings=dict(shardings))
    return refresh.lower(masks, weights, weights, np.int32(0), key).compile()


def compile_runs(method: Method, shapes: Shapes, devices: int) -> jax.stages.Compiled:
    """The refresh of as many runs as devices, one on each."""
    mesh = jax.make_mesh((devices,), ("run",), (AxisType.Auto,))
    by_run = NamedSharding(mesh, PartitionSpec("run"))
    stacked = {path: (devices, *shape) for path, shape in shapes.items()}
    shardings = dict.fromkeys(shapes, by_run)
    masks, weights = (like(stacked, shardings, x) for x in (jnp.bool, jnp.float32))
    keys = jax.device_put(jax.random.split(jax.random.key(0), devices), by_run)
    refresh = jax.jit(jax.vmap(method.rule.update, in_axes=(0, 0, 0, None, 0)))
    return refresh.lower(masks, weights, weights, np.int32(0), keys).compile()


def compile_sort(
    shapes: Shapes, shardings: Mapping[str, NamedSharding]
) -> jax.stages.Compiled:
    """The larger half of every leaf, by sorting it."""

    def masks(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        scores = {path: jnp.abs(w) for path, w in params.items()}
        return {p: s >= jnp.sort(s.reshape(-1))[s.size // 2] for p, s in scores.items()}

    sort = jax.jit(masks, out_shardings=dict(shardings))
    return sort.lower(like(shapes, shardings, jnp.float32)).compile()


def like(
    shapes: Shapes, shardings: Mapping[str, NamedSharding], dtype: type
) -> dict[str, jax.ShapeDtypeStruct]:
    """Leaves to compile for, which need no memory."""
    return {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[path])
        for path, shape in shapes.items()
    }
