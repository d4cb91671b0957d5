"""How a leaf lies on the devices: along one axis, over as many as divide it."""

import collections
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.scaling.trees import Shapes


def split_axis(shape: Sequence[int], devices: int) -> int:
    """The axis that divides into the most shards, of several the longest.

    >>> split_axis((3, 3, 64, 128), 8), split_axis((4096, 11008), 4096)
    (3, 0)
    """
    return max(range(len(shape)), key=lambda i: (math.gcd(shape[i], devices), shape[i]))


def ways(shape: Sequence[int], devices: int) -> int:
    """Over how many devices a leaf is sharded: a divisor of their number.

    >>> ways((3, 3, 64, 128), 8), ways((3, 3, 64, 128), 512), ways((3, 5), 8)
    (8, 128, 1)
    """
    return math.gcd(shape[split_axis(shape, devices)], devices)


def local_weights(shapes: Shapes, devices: int) -> int:
    """Number of weights that a device holds."""
    return sum(math.prod(s) // ways(s, devices) for s in shapes.values())


def groups(shapes: Shapes, devices: int) -> dict[int, Shapes]:
    """The sharded leaves, by over how many devices they are.

    >>> groups({"a": (64, 6), "b": (2, 3), "c": (3,)}, 4)
    {4: {'a': (64, 6)}, 2: {'b': (2, 3)}}
    """
    found: dict[int, dict[str, tuple[int, ...]]] = collections.defaultdict(dict)
    for path, shape in shapes.items():
        found[ways(shape, devices)][path] = shape
    return {n: leaves for n, leaves in found.items() if n > 1}


def make_shardings(shapes: Shapes, devices: int) -> dict[str, NamedSharding]:
    """Every leaf along one axis, over as many devices as divide it.

    Args:
      shapes: of the leaves.
      devices: how many of them to use, a power of two.
    """
    names = tuple(f"half{i}" for i in range(devices.bit_length() - 1))
    grid = np.array(jax.devices()[:devices]).reshape((2,) * len(names))
    mesh = Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))
    shardings = {}
    for path, shape in shapes.items():
        spec: list[tuple[str, ...] | None] = [None] * len(shape)
        used = names[: ways(shape, devices).bit_length() - 1]
        spec[split_axis(shape, devices)] = used or None
        shardings[path] = NamedSharding(mesh, PartitionSpec(*spec))
    return shardings
