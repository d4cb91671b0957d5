"""The kernels of networks, and how each of them is sharded over devices.

A leaf is split along one axis, over as many devices as divide it.
"""

import collections
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from d2sparse import models, tree

Shapes = Mapping[str, tuple[int, ...]]


def resnet50() -> Shapes:
    """Shapes of the kernels of a ResNet-50 for ImageNet."""
    network = models.resnet50(num_classes=1000, stem="imagenet")
    image = jnp.zeros((1, 224, 224, 3))
    return tree.shapes(jax.eval_shape(network.init, jax.random.key(0), image)[0])


def vit_l() -> Shapes:
    """Shapes of the kernels of a ViT-L/16 for images of 224 x 224, 1000 classes.

    With biases, normalisations, class token and position embedding, which stay dense,
    it has 304,326,632 parameters.

    >>> num_weights(vit_l())
    303800320
    """
    width, hidden = 1024, 4096
    attention = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    block = attention | {"mlp_in": (width, hidden), "mlp_out": (hidden, width)}
    ends = {"patch": (16, 16, 3, width), "head": (width, 1000)}
    return ends | repeat(block, 24)


def llama_7b() -> Shapes:
    """Shapes of the kernels of a Llama-like decoder, embedding and head not tied.

    >>> num_weights(llama_7b())
    6738149376
    """
    width, hidden, vocabulary = 4096, 11008, 32000
    attention = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    mlp = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    ends = {"embedding": (vocabulary, width), "head": (width, vocabulary)}
    return ends | repeat(attention | mlp, 32)


def repeat(block: Shapes, times: int) -> Shapes:
    """The shapes of a block that occurs several times.

    >>> list(repeat({"out": (2, 2)}, 2))
    ['block0/out', 'block1/out']
    """
    return {f"block{i}/{name}": s for i in range(times) for name, s in block.items()}


NETWORKS = {"ResNet-50": resnet50, "ViT-L/16": vit_l, "7 B": llama_7b}


def num_weights(shapes: Shapes) -> int:
    """Number of weights of all leaves."""
    return sum(map(math.prod, shapes.values()))


def split_axis(shape: Sequence[int], devices: int) -> int:
    """The axis that divides into the most shards, of several the longest.

    >>> split_axis((3, 3, 64, 128), 8), split_axis((4096, 11008), 4096)
    (3, 0)
    """
    return max(range(len(shape)), key=lambda i: (math.gcd(shape[i], devices), shape[i]))


def num_shards(shape: Sequence[int], devices: int) -> int:
    """Number of devices a leaf is sharded over: a divisor of their number.

    >>> [num_shards((3, 3, 64, 128), n) for n in (8, 512)], num_shards((3, 5), 8)
    ([8, 128], 1)
    """
    return math.gcd(shape[split_axis(shape, devices)], devices)


def local_weights(shapes: Shapes, devices: int) -> int:
    """Number of weights that a device holds."""
    return sum(math.prod(s) // num_shards(s, devices) for s in shapes.values())


def sharded_leaves(shapes: Shapes, devices: int) -> dict[int, Shapes]:
    """The leaves with several shards, by their number.

    >>> sharded_leaves({"a": (64, 6), "b": (2, 3), "c": (3,)}, 4)
    {4: {'a': (64, 6)}, 2: {'b': (2, 3)}}
    """
    groups: dict[int, dict[str, tuple[int, ...]]] = collections.defaultdict(dict)
    for path, shape in shapes.items():
        groups[num_shards(shape, devices)][path] = shape
    return {n: leaves for n, leaves in groups.items() if n > 1}


def make_shardings(shapes: Shapes, devices: int) -> dict[str, NamedSharding]:
    """The sharding of every leaf.

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
        used = names[: num_shards(shape, devices).bit_length() - 1]
        spec[split_axis(shape, devices)] = used or None
        shardings[path] = NamedSharding(mesh, PartitionSpec(*spec))
    return shardings
