"""What a run is: its state, and the data that it sees."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2sparse.data import Split, channel_statistics, standardize
from d2sparse.models import Model
from d2sparse.transforms import zero_pruned
from d2sparse.transforms.inputs import as_key
from d2sparse.tree import PyTree

Metrics = dict[str, jax.Array]

_WIDTH = 512  # Examples of a forward pass in evaluation, at most.


class Faults(NamedTuple):
    """Updates of a run that were not finite, see `guard`.

    Attributes:
      total: int32[], how many there were.
      first: int32[], the step of the first; 0 where there was none.
      skip: bool[], whether the run continues without them; else the first stops it.
    """

    total: jax.Array
    first: jax.Array
    skip: jax.Array


class TrainState(NamedTuple):
    """Everything that changes in a run; a copy of it is the run.

    Attributes:
      step: int32[], the number of steps taken.
      params: trained parameters.
      model_state: what a forward pass changes, such as BatchNorm statistics.
      opt_state: the optimiser's state, masks included.
      key: random key of the run, never changed: order and augmentation follow from it
        and the step.
      faults: updates that were not finite.
      settings: numbers by name that tell this run from others of the same program,
        such as a learning rate; no step changes them.
    """

    step: jax.Array
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    key: jax.Array
    faults: Faults
    settings: Mapping[str, jax.Array]


class Data(NamedTuple):
    """Labelled examples on the device, and how to standardise images.

    Attributes:
      images: uint8[n, height, width, channels], which the network sees standardised, or
        float[n, ...] of any shape, which it sees as they are.
      labels: int32[n].
      mean: float[channels], subtracted from uint8 images scaled to [0, 1].
      std: float[channels], divided by.
      further: further labels by name, such as a bias, a group or a domain: arrays of n
        rows. A loss finds those of its batch in `batch.further`.
    """

    images: jax.Array
    labels: jax.Array
    mean: jax.Array
    std: jax.Array
    further: Mapping[str, jax.Array] = {}


def to_device(split: Split, like: Data | None = None) -> Data:
    """Labelled examples on the default device.

    Args:
      split: images or floats, and labels.
      like: data whose channel statistics are used, the training data for a test set;
        if not given, those of the images themselves. Floats need none.

    Raises:
      ValueError: the examples are neither uint8[n, h, w, c] nor floats.

    >>> split = Split(np.zeros((4, 8, 8, 1), np.uint8), np.arange(4, dtype=np.int32))
    >>> to_device(split).images.shape
    (4, 8, 8, 1)
    """
    if like is not None:
        mean, std = like.mean, like.std
    elif jnp.issubdtype(split.images.dtype, jnp.floating):
        mean, std = jnp.zeros(()), jnp.ones(())
    else:
        mean, std = map(jnp.asarray, channel_statistics(split.images))
    images, labels = jnp.asarray(split.images), jnp.asarray(split.labels)
    further = {name: jnp.asarray(values) for name, values in split.further.items()}
    return Data(images, labels, mean, std, further)


def take(data: Data, indices: jax.Array) -> Data:
    """The examples at the given indices, with all their labels.

    >>> split = Split(np.zeros((4, 8, 8, 1), np.uint8), np.arange(4, dtype=np.int32))
    >>> take(to_device(split), jnp.array([3, 1])).labels.tolist()
    [3, 1]
    """
    return data._replace(
        images=data.images[indices],
        labels=data.labels[indices],
        further={name: values[indices] for name, values in data.further.items()},
    )


def passes(size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All examples of a set, in passes of one size over at most 512 of them.

    The last pass is filled up, and smaller sets to a power of two, so that sets that
    grow compile a few programs.

    Args:
      size: number of examples, at least 1.

    Yields:
      int[width] indices, and bool[width], which of them are not there to fill up.

    >>> [(rows.tolist(), counts.tolist()) for rows, counts in passes(3)]
    [([0, 1, 2, 0], [True, True, True, False])]
    """
    width = min(_WIDTH, 1 << (size - 1).bit_length())
    for start in range(0, size, width):
        places = np.arange(start, start + width)
        yield places % size, places < size


def inputs(data: Data) -> jax.Array:
    """What a network sees: standardised images, or floats as they are, float[n, ...].

    Raises:
      ValueError: the examples are neither uint8 nor floats.
    """
    if jnp.issubdtype(data.images.dtype, jnp.floating):
        return data.images
    return standardize(data.images, data.mean, data.std)


def as_pixels(data: Data) -> Data:
    """The examples with images that come out in [0, 1] instead of standardised.

    >>> split = Split(np.full((1, 2, 2, 1), 255, np.uint8), np.zeros(1, np.int32))
    >>> inputs(as_pixels(to_device(split))).max().item()
    1.0
    """
    mean, std = jnp.zeros_like(data.mean), jnp.ones_like(data.std)
    return data._replace(mean=mean, std=std)


def images_like(shape: tuple[int, ...]) -> Data:
    """An abstract example whose image has a shape, as a network sees it.

    >>> images_like((8, 8, 3)).images.shape
    (1, 8, 8, 3)
    """
    images: Any = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    labels: Any = jax.ShapeDtypeStruct((1,), jnp.int32)
    number: Any = jax.ShapeDtypeStruct((), jnp.float32)
    return Data(images, labels, number, number)


def init_state(
    model: Model,
    tx: optax.GradientTransformation,
    data: Data,
    key: jax.Array,
    settings: Mapping[str, float] | None = None,
    skip_faults: bool = False,
) -> TrainState:
    """The state at step 0, with the masks of the optimiser applied to the parameters.

    Args:
      model: the network.
      tx: its optimiser, with or without `sparsify`.
      data: examples whose shape the network is built for.
      key: random key of the run, or its seed.
      settings: numbers that tell this run from others of the same program.
      skip_faults: whether updates that are not finite are left out, instead of
        stopping the run.
    """
    init_key, run_key = jax.random.split(as_key(key))
    params, model_state = model.init(init_key, inputs(take(data, jnp.arange(1))))
    opt_state = tx.init(params)
    masked = zero_pruned(params, opt_state)
    state = begin_state(masked, model_state, opt_state, run_key, settings)
    return state._replace(faults=state.faults._replace(skip=jnp.asarray(skip_faults)))


def begin_state(
    params: PyTree,
    model_state: PyTree,
    opt_state: PyTree,
    key: jax.Array,
    settings: Mapping[str, float] | None = None,
) -> TrainState:
    """The state at step 0 of the parts of a training, which stops at a fault.

    Args:
      params: trained parameters, masked.
      model_state: what a forward pass changes.
      opt_state: the optimiser's state.
      key: random key of the run.
      settings: numbers that tell this run from others of the same program.
    """
    none = jnp.zeros((), jnp.int32)
    return TrainState(
        jnp.copy(none),
        params,
        model_state,
        opt_state,
        key,
        Faults(jnp.copy(none), none, jnp.asarray(False)),
        {k: jnp.asarray(v, jnp.float32) for k, v in (settings or {}).items()},
    )
