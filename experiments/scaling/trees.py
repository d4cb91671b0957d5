"""The networks for which the tables are computed: shapes of their kernels."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

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
    block = attention | {
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    ends = {"embedding": (vocabulary, width), "head": (width, vocabulary)}
    return ends | repeat(block, 32)


def repeat(block: Shapes, times: int) -> Shapes:
    """The shapes of a block that occurs several times.

    >>> list(repeat({"out": (2, 2)}, 2))
    ['block0/out', 'block1/out']
    """
    return {f"block{i}/{name}": s for i in range(times) for name, s in block.items()}


def num_weights(shapes: Shapes) -> int:
    """Number of weights of all leaves."""
    return sum(map(math.prod, shapes.values()))


TREES = {"ResNet-50": resnet50, "ViT-L/16": vit_l, "7 B": llama_7b}
