"""A visual prompt in front of a network: its pixels are trained with it, or alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from d2sparse.models import Model
from d2sparse.prompts import Prompt
from d2sparse.prompts.images import check_pixels, is_known
from d2sparse.train import (
    Constraint,
    Data,
    Network,
    Progress,
    Training,
    as_pixels,
    claim,
    describe,
    images_like,
)
from d2sparse.tree import Prunable, PyTree


class Shown(NamedTuple):
    """What a network under a prompt with a random place is shown in training.

    Attributes:
      images: float[batch, h, w, c] in [0, 1].
      key: of the place.
    """

    images: jax.Array
    key: jax.Array


def prompted(prompt: Prompt) -> Constraint:
    """The network sees images through a visual prompt, which is trained.

    `f(P_theta(x))`, of Bahng et al. (arXiv 2203.17274) and Chen et al.
    (arXiv 2211.11635). Parameters become `{"network": ..., "prompt": theta}`, whose
    prunable leaves are those of the network; the network is that of the prompt's
    canvas, and its cost is counted there. It trains along unless another constraint
    freezes it.

    Images are given to the prompt in [0, 1], which normalises them as the network's
    source was; uint8 images are divided by 255, and those of floats have to be in
    [0, 1] already. Augmentations act on them before, where zero is black. A prompt with
    a random place has one for every step, and the same in all evaluations.

    Put it first: what decides masks, pairs networks or makes an ensemble goes by the
    leaves that there are.

    Args:
      prompt: from `d2sparse.prompts`.

    Raises:
      ValueError: when applied, where the masks or the networks are decided; when the
        training begins, where images of floats are not in [0, 1].

    >>> import numpy as np
    >>> from d2sparse import data, models, prompts, train
    >>> images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.arange(4, dtype="int32")
    >>> split = train.to_device(data.Split(images, labels))
    >>> plain = train.plain(models.lenet_300_100(num_classes=4), split)
    >>> training = prompted(prompts.border(canvas=16, inner=8, channels=1))(plain)
    >>> training.network.params["prompt"].shape, training.network.weights
    ((16, 16, 1), 107200)
    """

    def constrained(training: Training) -> Training:
        for what in ("the masks", "the networks"):
            if what in training.claims:
                raise ValueError(
                    f"expected a prompt before what decides {what}, got it after "
                    f"{training.claims[what]}; put prompted first"
                )
        claimed = claim(training, "the prompt", "prompted")
        seen = images_like(prompt.shape)
        network = describe(training.model, seen, training.network.prunable)

        def inputs(batch: Data, key: jax.Array | None) -> Any:
            pixels = as_pixels(batch)  # The prompt normalises them.
            if key is None or not prompt.is_random:
                return training.inputs(pixels, key)
            shown_key, place_key = jax.random.split(key)
            return Shown(training.inputs(pixels, shown_key), place_key)

        def begin(progress: Progress, data: Data) -> Progress:
            floats = jnp.issubdtype(data.images.dtype, jnp.floating)
            if floats and is_known(data.images):
                check_pixels(data.images)
            return training.begin(progress, data)

        return claimed._replace(
            model=in_front(prompt, training.model),
            network=_under(prompt, network),
            inputs=inputs,
            begin=begin,
        )

    return constrained


def in_front(prompt: Prompt, model: Model) -> Model:
    """A network behind a prompt; parameters are `{"network": ..., "prompt": theta}`.

    Args:
      prompt: what is put in front.
      model: of images as large as the prompt's canvas. Images that `apply` is given are
        in [0, 1], or `Shown` with a key.
    """

    def init(key: jax.Array, x: Any) -> tuple[PyTree, PyTree]:
        del x  # The network sees the canvas.
        params, model_state = model.init(key, jnp.zeros((1, *prompt.shape)))
        theta = prompt.init(jax.random.fold_in(key, 1))
        return {"network": params, "prompt": theta}, model_state

    def apply(
        params: PyTree, model_state: PyTree, x: Any, *, train: bool
    ) -> tuple[Any, PyTree]:
        images, key = x if isinstance(x, Shown) else (x, None)
        seen = prompt.apply(params["prompt"], images, key)
        return model.apply(params["network"], model_state, seen, train=train)

    return Model(init, apply)


def _under(prompt: Prompt, network: Network) -> Network:
    """What is known of a network, with the leaves and paths that it has now."""
    theta = jax.ShapeDtypeStruct(prompt.live.shape, jnp.float32)
    costs = {f"network/{path}": cost for path, cost in network.macs.items()}
    return Network(
        {"network": network.params, "prompt": theta},
        {**costs, "prompt": 0},
        _inside(network.prunable),
        network.outputs,
    )


def _inside(prunable: Prunable) -> Prunable:
    """A predicate on the leaves of the network, by the paths they had before."""

    def predicate(path: str, leaf: Any) -> bool:
        first, _, rest = path.partition("/")
        return first == "network" and prunable(rest, leaf)

    return predicate
