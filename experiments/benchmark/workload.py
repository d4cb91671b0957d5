"""What is measured: sizes, parameters, masks, data, and the machine."""

import math
import os
import platform
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import distributions, train, tree
from d2sparse.data import Split
from d2sparse.masks import dense_masks
from d2sparse.models import make_model
from d2sparse.tree import PyTree

CLASSES = 10
TINY = (8, 8, 1)
# Images of small networks, unless with --quick or on a CPU.
LENET = ("lenet_300_100", (28, 28, 1))
IMAGES = dict([("resnet8", (32, 32, 3)), LENET])


class Sizes(NamedTuple):
    """How large everything is.

    Attributes:
      models: whose parameter trees are used; the first is trained as well.
      image: shape of the images of these models.
      sparsity: zeros among the prunable weights.
      rounds: timings of every candidate.
      slow_rounds: timings of one that takes seconds.
      all_rules: whether every rule is refreshed on the first model, or only a few.
      repeats: refreshes or steps of a large network in one program; more than one where
        handing over its arguments takes longer than a step.
      steps: programs of optimiser steps in one timing.
      batch: images in a step of the large network.
      members: the small networks, each with the shape of its images.
      seeds: numbers of runs of each that are trained at once.
      member_batch: images in a step of a small network.
      member_steps: steps of every small network in one timing.
      small_steps: steps of the small network that is trained with `fit`.
      small_samples: its training images.
      shown: the network that is put on another task, and the side of its images.
      shown_batch: images in a step of it.
    """

    models: tuple[str, ...]
    image: tuple[int, int, int]
    sparsity: float
    rounds: int
    slow_rounds: int
    all_rules: bool
    repeats: int
    steps: int
    batch: int
    members: tuple[tuple[str, tuple[int, int, int]], ...]
    seeds: tuple[int, ...]
    member_batch: int
    member_steps: int
    small_steps: int
    small_samples: int
    shown: tuple[str, int]
    shown_batch: int


def make_sizes(
    quick: bool,
    sparsity: float,
    models: tuple[str, ...] = (),
    rounds: int | None = None,
    members: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
) -> Sizes:
    """The sizes for this backend: the one place that looks at it.

    Args:
      quick: whether trees are small and rounds few.
      sparsity: zeros among the prunable weights.
      models: names of large networks; the usual ones if empty.
      rounds: timings of every candidate; the usual number if None.
      members: names of small networks; the usual ones if empty.
      seeds: numbers of their runs; the usual ones if empty.

    >>> make_sizes(quick=True, sparsity=0.8, rounds=2).slow_rounds
    1
    """
    accelerated = jax.default_backend() != "cpu"
    small = ("resnet8", "lenet_300_100") if accelerated else ("convnet_s",)
    images = IMAGES if accelerated and not quick else {}
    rounds = rounds or (3 if quick else 9)
    large = accelerated and not quick
    networks = models or (("resnet8",) if quick else ("resnet18", "resnet50"))
    return Sizes(
        models=networks,
        image=TINY if quick else (32, 32, 3),
        sparsity=sparsity,
        rounds=rounds,
        slow_rounds=min(rounds, 1 if quick else 3 if accelerated else 2),
        all_rules=quick or not accelerated,
        repeats=20 if accelerated else 1,
        steps=2 if quick else 5,
        batch=8 if quick else 1024 if accelerated else 128,
        members=tuple((name, images.get(name, TINY)) for name in members or small),
        seeds=seeds or ((2,) if quick else (1, 8, 32, 128)[: 4 if accelerated else 3]),
        member_batch=16 if quick else 64,
        member_steps=2 if quick else 25 if accelerated else 10,
        small_steps=40 if quick else 500,
        small_samples=64 if quick else 1500,
        shown=("resnet50", 224) if large else (networks[0], 8 if quick else 32),
        shown_batch=8 if quick else 128 if accelerated else 32,
    )


def make_params(model: str, image: tuple[int, ...]) -> PyTree:
    """Random parameters with the shapes of a model, made on the host.

    Raises:
      ValueError: the model is unknown, or the image too small for it.
    """
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)),
        param_shapes(model, image),
    )


def param_shapes(model: str, image: tuple[int, ...]) -> PyTree:
    """The parameters of a model as `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: the model is unknown, or the image too small for it.
    """
    network = make_model(model, num_classes=CLASSES)
    images = jnp.zeros((1, *image))
    return jax.eval_shape(network.init, jax.random.key(0), images)[0]


def random_masks(params: PyTree, sparsity: float) -> PyTree:
    """A random pattern, its budget shared between the leaves by ERK.

    Drawn on the host, which has nothing to compile for it.
    """
    rng = np.random.default_rng(0)
    shapes = tree.shapes(params)
    counts = distributions.erk(shapes, sparsity)
    drawn = {}
    for path, shape in shapes.items():
        live = np.arange(math.prod(shape)) < int(counts[path])
        drawn[path] = jnp.asarray(rng.permutation(live).reshape(shape))
    return tree.replace(dense_masks(params), drawn)


def random_data(samples: int, image: tuple[int, ...]) -> train.Data:
    """Noise with random labels, on the device."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (samples, *image), np.uint8)
    return train.to_device(Split(images, rng.integers(0, CLASSES, samples, np.int32)))


def machine() -> str:
    """The processor, its cores, the memory, the version of jax and its backend."""
    device = jax.devices()[0]
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        f"{_processor()}, {num_cores()} cores, {size / 2**30:.0f} GiB of memory, "
        f"jax {jax.__version__} on {device.platform} ({device.device_kind})"
    )


def num_cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()
