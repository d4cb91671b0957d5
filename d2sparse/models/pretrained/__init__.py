"""Trained networks of others: their files as arrays, and arrays as a network.

A file becomes arrays by name, `load_arrays`; a network of this package takes them,
`cifar_resnet(arrays)`, or a tree of a user's own, `into(tree, arrays)`. Either every
leaf is filled and no array is left over, or a sentence says where they differ.

    from d2sparse.models import pretrained

    network = pretrained.cifar_resnet(pretrained.load_arrays("resnet20-12fca82f.npz"))
    x = data.standardize(images, network.mean, network.std)
    logits, _ = network.model.apply(
        network.params, network.model_state, x, train=False
    )

No weights are part of this library; docstrings name authors and licences.
"""

from d2sparse.models.pretrained.efficientnet import efficientnet_lite0
from d2sparse.models.pretrained.files import (
    load_arrays,
    load_keras,
    load_npz,
    load_safetensors,
)
from d2sparse.models.pretrained.fitting import into, strip_prefix, torch_name
from d2sparse.models.pretrained.networks import (
    Pretrained,
    cifar_resnet,
    fill,
    mlperf_resnet8,
)
from d2sparse.models.pretrained.torch_files import load_torch

__all__ = [
    "Pretrained",
    "cifar_resnet",
    "efficientnet_lite0",
    "fill",
    "into",
    "load_arrays",
    "load_keras",
    "load_npz",
    "load_safetensors",
    "load_torch",
    "mlperf_resnet8",
    "strip_prefix",
    "torch_name",
]
