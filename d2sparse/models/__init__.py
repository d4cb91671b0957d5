"""The shipped networks, all behind the seam `Model(init, apply)`.

Every layer has an explicit name, so parameter paths such as
`"stage1_block1/conv1/kernel"` are part of the interface. A layer that a norm follows
has no bias. Activation functions are layers too, without parameters: `taps` reads and
replaces what goes through any layer.
"""

import difflib
import functools
from collections.abc import Callable

from d2sparse.models.base import Model, from_linen
from d2sparse.models.convnet import convnet_s
from d2sparse.models.lenet import lenet5
from d2sparse.models.mlp import lenet_300_100
from d2sparse.models.resnet import (
    resnet8,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet50,
)
from d2sparse.models.vgg import vgg11, vgg16

__all__ = [
    "Model",
    "convnet_s",
    "from_linen",
    "lenet5",
    "lenet_300_100",
    "make_model",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet50",
    "vgg11",
    "vgg16",
]

_BUILDERS: dict[str, Callable[..., Model]] = {
    "lenet_300_100": lenet_300_100,
    "lenet5": lenet5,
    "convnet_s": convnet_s,
    "resnet8": resnet8,
    "resnet8s": functools.partial(resnet8, stem_stride=2),
    "resnet20": resnet20,
    "resnet20s": functools.partial(resnet20, stem_stride=2),
    "resnet32": resnet32,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "vgg11": vgg11,
    "vgg16": vgg16,
}


def make_model(name: str, num_classes: int, width: float | None = None) -> Model:
    """Builds a model from the name and the numbers of an experiment's flags.

    Args:
      name: name of a builder of this package, or `"resnet8s"` and `"resnet20s"`,
        which are `resnet8` and `resnet20` with a stem of stride 2. ResNet-18, -34
        and -50 have the CIFAR stem.
      num_classes: number of logits.
      width: for `lenet_300_100` and `lenet5` a multiplier of the hidden sizes
        (default 1); for all others the channels of the first layer, a whole number
        that all others follow (default 16 for `convnet_s` and ResNet-8, -20, -32; 64
        for ResNet-18, -34, -50 and VGG). None is the default.

    Returns:
      The model.

    Raises:
      ValueError: if the name is unknown or a number is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> model = make_model("convnet_s", num_classes=10, width=8)
      >>> x = jnp.zeros((2, 8, 8, 1))
      >>> params, state = jax.eval_shape(model.init, jax.random.key(0), x)
      >>> params["head"]["kernel"].shape
      (32, 10)
    """
    if name not in _BUILDERS:
        close = difflib.get_close_matches(name, _BUILDERS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"unknown model {name!r}; {hint}known models: {', '.join(_BUILDERS)}"
        )
    if width is None:
        return _BUILDERS[name](num_classes)
    return _BUILDERS[name](num_classes, width)
