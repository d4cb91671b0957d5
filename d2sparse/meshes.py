"""Leaves on a mesh: axes of type Explicit, and those that `jax.shard_map` maps."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any


def on_auto_axes(
    f: Callable[..., list[jax.Array]], like: Sequence[PyTree], *args: PyTree
) -> list[jax.Array]:
    """`f(*args)`, where axes of a mesh that are of type Explicit are made Auto for it.

    `jax.make_mesh` makes axes of type Explicit, on which a reshape or a scatter has to
    say how its result is sharded. On axes of type Auto the partitioner knows.

    Args:
      f: of arrays, to a list of arrays.
      like: for each of them an array of its shape, or a tree of such, whose sharding it
        gets.
      *args: trees of arrays; numbers among them stay numbers.

    >>> on_auto_axes(lambda x: [jnp.sort(x)], [jnp.zeros(2)], jnp.array([2.0, 1.0]))
    [Array([1., 2.], dtype=float32)]
    """
    mesh = _explicit_mesh((like, args))
    if mesh is None:
        return f(*args)
    leaves, structure = jax.tree.flatten(args)
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}

    def of_arrays(arrays: dict[int, jax.Array]) -> list[jax.Array]:
        every = [arrays.get(i, x) for i, x in enumerate(leaves)]
        return f(*jax.tree.unflatten(structure, every))

    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in axes if kind == AxisType.Explicit)
    where = [NamedSharding(mesh, _spec(part)) for part in like]
    auto = jax.sharding.auto_axes(of_arrays, axes=explicit, out_sharding=where)
    return auto(arrays)


def common_zero(values: PyTree) -> jax.Array:
    """int32[] 0 that varies over all axes of `jax.shard_map` that the values vary over.

    Added to what a loop starts from, it makes it vary as what comes out of its body.

    >>> print(common_zero({"w": jnp.ones(2)}))
    0
    """
    zeros = (jnp.zeros_like(x, jnp.int32, ()) for x in jax.tree.leaves(values))
    return sum(zeros, jnp.zeros((), jnp.int32))


def _explicit_mesh(values: PyTree) -> Mesh | AbstractMesh | None:
    for leaf in jax.tree.leaves(values):
        if isinstance(leaf, jax.Array):
            mesh = jax.typeof(leaf).sharding.mesh
            if AxisType.Explicit in mesh.axis_types:
                known = not isinstance(leaf, jax.core.Tracer)
                # Outside of compiled functions it has to be the mesh of devices.
                return cast(NamedSharding, leaf.sharding).mesh if known else mesh
    return None


def _spec(arrays: PyTree) -> PartitionSpec:
    """How the most sharded of some arrays of one shape is sharded.

    A mask that is all True from the start may lie whole on every device.
    """
    specs = [jax.typeof(x).sharding.spec for x in jax.tree.leaves(arrays)]
    return max(specs, key=lambda spec: sum(axis is not None for axis in spec))
