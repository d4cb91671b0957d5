"""Published CIFAR-10 networks, filled from the arrays of their files.

The files are not part of this library. Logits agree with the code that trained them;
what the networks score is tested on the official test split where both are there.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from d2sparse.models.base import Model, from_linen
from d2sparse.models.layers import ReLU, check_images, dense, padded
from d2sparse.models.pretrained.fitting import Layout, into, torch_name
from d2sparse.models.resnet import BasicBlock, ResNet

# What the networks of `torchvision` and many others standardise their images with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Pretrained(NamedTuple):
    """A network with its trained weights, and what its images are standardised with.

    The network is applied to standardised images, `(images / 255 - mean) / std`, which
    `d2sparse.data.standardize(images, mean, std)` makes of uint8 images; the statistics
    of a user's own data set do not belong here.

    Attributes:
      model: functions that take standardised images.
      params: its trained parameters.
      model_state: its BatchNorm statistics.
      mean: float32[channels].
      std: float32[channels].
      shape: of an image, (height, width, channels).
    """

    model: Model
    params: Any
    model_state: Any
    mean: jax.Array
    std: jax.Array
    shape: tuple[int, int, int]


def cifar_resnet(arrays: Mapping[str, np.ndarray]) -> Pretrained:
    """A CIFAR ResNet of 6n + 2 layers whose shortcuts have no weights (option A).

    He et al., arXiv:1512.03385, in the form of github.com/akamaster/
    pytorch_resnet_cifar10 (BSD-2-Clause). Its `resnet20-12fca82f` has an error of
    8.27 % on CIFAR-10, its `resnet56-4bfd9763` of 6.61 %. Depth, width and classes are
    those of the arrays.

    Args:
      arrays: by their PyTorch names, `conv1.weight`, `layer1.0.conv1.weight`, ...,
        `linear.bias`, in the layout of PyTorch; see `load_arrays`, and for files that
        were saved from several devices `strip_prefix(arrays, "module.")`.

    Returns:
      A network with the layers of `models.resnet20`: `stem_conv`,
      `stage1_block1/conv1`, ..., `head`. Images are standardised with the statistics
      of ImageNet.

    Raises:
      ValueError: an array is missing, left over, or of another shape.
    """
    blocks = re.compile(r"layer1\.(\d+)\.conv1\.weight")
    depth = len([name for name in arrays if blocks.fullmatch(name)])
    network = ResNet(
        functools.partial(BasicBlock, shortcut=padded),
        depths=(max(1, depth),) * 3,
        width=outputs(arrays, "conv1.weight"),
        num_classes=outputs(arrays, "linear.weight"),
    )
    return fill(
        from_linen(network),
        arrays,
        _cifar_resnet_name,
        shape=(32, 32, 3),
        statistics=(IMAGENET_MEAN, IMAGENET_STD),
        layout="torch",
        ignore=["*.num_batches_tracked"],
    )


def mlperf_resnet8(arrays: Mapping[str, np.ndarray]) -> Pretrained:
    """ResNet-8, the reference network of MLPerf Tiny for CIFAR-10.

    Banbury et al., arXiv:2106.07597, in the form of github.com/mlcommons/tiny
    (Apache-2.0), `pretrainedResnet.h5`. It differs from `models.resnet8`: convolutions
    have biases, shortcuts have no BatchNorm, epsilon is 1e-3, and padding at stride 2
    is at the far side only.

    Args:
      arrays: by their Keras names, `conv2d/kernel`, ..., `dense/bias`; see
        `load_keras`.

    Returns:
      A network with the layers of `models.resnet8`, less `shortcut_norm`. It takes
      images from 0 to 255: mean is 0 and std is 1 / 255.

    Raises:
      ValueError: an array is missing, left over, or of another shape.
    """
    network = MLPerfResNet8(outputs(arrays, "dense/bias"))
    return fill(
        from_linen(network),
        arrays,
        _keras_name,
        shape=(32, 32, 3),
        statistics=((0.0,) * 3, (1 / 255,) * 3),
        layout="same",
    )


def fill(
    model: Model,
    arrays: Mapping[str, np.ndarray],
    rename: Callable[[str], str],
    *,
    shape: tuple[int, int, int],
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    layout: Layout,
    ignore: Collection[str] = (),
) -> Pretrained:
    """A model with the arrays of a file as its parameters and state.

    Args:
      model: with the layers that the file has.
      arrays: by name.
      rename: from `"params/conv1/kernel"` or `"batch_stats/norm1/mean"` to the name.
      shape: of an image, (height, width, channels).
      statistics: mean and std of images scaled to 0 ... 1.
      layout: as of `into`.
      ignore: as of `into`.

    Raises:
      ValueError: as `into` does.
    """
    batch = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    params, state = jax.eval_shape(model.init, jax.random.key(0), batch)
    tree = into(
        {"params": params, **state}, arrays, rename, layout=layout, ignore=ignore
    )
    mean, std = (jnp.asarray(values, jnp.float32) for values in statistics)
    return Pretrained(model, tree.pop("params"), tree, mean, std, shape)


def outputs(arrays: Mapping[str, np.ndarray], name: str) -> int:
    """First axis of an array; 1 where it is missing, of which `into` tells then.

    >>> outputs({"fc.bias": np.zeros(10)}, "fc.bias")
    10
    """
    return arrays[name].shape[0] if name in arrays and arrays[name].ndim else 1


class MLPerfResNet8(nn.Module):
    """Three residual blocks of 16, 32 and 64 channels; see `mlperf_resnet8`.

    Attributes:
      num_classes: size of `head`.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits float[batch, classes] of float[batch, height, width, channels]."""
        check_images(x)
        x = _norm(train, "stem_norm")(_conv(16, 3, 1, "stem_conv")(x))
        x = ReLU(name="stem_relu")(x)
        for stage, channels in enumerate((16, 32, 64), start=1):
            block = MLPerfBlock(channels, min(stage, 2), name=f"stage{stage}_block1")
            x = block(x, train=train)
        return dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))


class MLPerfBlock(nn.Module):
    """Two 3x3 convolutions, and a 1x1 convolution as shortcut at stride 2.

    Attributes:
      channels: output channels.
      stride: stride of the first convolution and of the shortcut.
    """

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Features float[batch, height, width, in] to float[..., channels]."""
        y = _conv(self.channels, 3, self.stride, "conv1")(x)
        y = ReLU(name="relu1")(_norm(train, "norm1")(y))
        y = _norm(train, "norm2")(_conv(self.channels, 3, 1, "conv2")(y))
        if self.stride > 1:
            x = _conv(self.channels, 1, self.stride, "shortcut_conv")(x)
        return ReLU(name="relu2")(x + y)


def _conv(channels: int, size: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(channels, (size, size), stride, padding="SAME", name=name)


def _norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.99, epsilon=1e-3, name=name
    )


def _cifar_resnet_name(path: str) -> str:
    name = torch_name(path).replace("stem_conv", "conv1").replace("stem_norm", "bn1")
    name = name.replace("norm", "bn").replace("head", "linear")
    return re.sub(
        r"stage(\d+)_block(\d+)", lambda m: f"layer{m[1]}.{int(m[2]) - 1}", name
    )


# Keras numbers the layers of a kind in the order in which they are made.
_KERAS_LAYERS = {
    "stem_conv": "conv2d",
    "stem_norm": "batch_normalization",
    "stage1_block1/conv1": "conv2d_1",
    "stage1_block1/norm1": "batch_normalization_1",
    "stage1_block1/conv2": "conv2d_2",
    "stage1_block1/norm2": "batch_normalization_2",
    "stage2_block1/conv1": "conv2d_3",
    "stage2_block1/norm1": "batch_normalization_3",
    "stage2_block1/conv2": "conv2d_4",
    "stage2_block1/norm2": "batch_normalization_4",
    "stage2_block1/shortcut_conv": "conv2d_5",
    "stage3_block1/conv1": "conv2d_6",
    "stage3_block1/norm1": "batch_normalization_5",
    "stage3_block1/conv2": "conv2d_7",
    "stage3_block1/norm2": "batch_normalization_6",
    "stage3_block1/shortcut_conv": "conv2d_8",
    "head": "dense",
}
_KERAS_NORM = {
    "scale": "gamma",
    "bias": "beta",
    "mean": "moving_mean",
    "var": "moving_variance",
}


def _keras_name(path: str) -> str:
    layer, _, key = path.partition("/")[2].rpartition("/")
    if layer.endswith(("norm", "norm1", "norm2")):
        key = _KERAS_NORM[key]
    return f"{_KERAS_LAYERS[layer]}/{key}"
