"""A trained network on another task: where it starts, what it sees, what is trained."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from d2sparse import rules, tree
from d2sparse.checks import check_whole
from d2sparse.constraints.masked import under_masks
from d2sparse.constraints.quantised import CALIBRATED
from d2sparse.models import Model
from d2sparse.models.pretrained import Pretrained, into
from d2sparse.models.taps import read
from d2sparse.prompts.images import (
    make_normalisation,
    resized,
    widened,
    with_channels,
)
from d2sparse.train import (
    Constraint,
    Data,
    Masks,
    Network,
    Training,
    TrainState,
    as_pixels,
    claim,
    describe,
    forward_macs,
    images_like,
)
from d2sparse.tree import PyTree

HEAD = "head"  # The last layer, in the networks of `d2sparse.models`.


class Frozen(NamedTuple):
    """Model state of a network of which leaves are not trained.

    Attributes:
      params: these leaves by path.
      own: the model state of the network.
    """

    params: Mapping[str, jax.Array]
    own: PyTree


def started_from(network: Pretrained) -> Constraint:
    """A trained network takes the place of the one that is there.

    Its weights and statistics are where every run starts; what the runs are shown, and
    what of the network is trained, other constraints say. Put it first.

    Args:
      network: from `d2sparse.models.pretrained`, or a user's own: a model, its
        parameters and state, and the shape of the images that it was trained on.

    Raises:
      ValueError: the parameters are not those of the model; the first that differs is
        named, with what is nearest to it. When applied, behind another constraint.

    >>> from d2sparse import data, models, train
    >>> model = models.from_linen(models.mlp.MLP((), 4))
    >>> params, state = model.init(jax.random.key(7), jnp.zeros((1, 8, 8, 1)))
    >>> source = Pretrained(model, params, state, 0.5, 0.25, (8, 8, 1))
    >>> images, labels = jnp.zeros((4, 8, 8, 1), jnp.uint8), jnp.arange(4)
    >>> split = train.to_device(data.Split(images, labels))
    >>> training = started_from(source)(train.plain(model, split))
    >>> started = train.make_program(training).init(jax.random.key(0), split).state
    >>> bool((started.params["head"]["kernel"] == params["head"]["kernel"]).all())
    True
    """
    like = jax.ShapeDtypeStruct((1, *network.shape), jnp.float32)
    params, own = jax.eval_shape(network.model.init, jax.random.key(0), like)
    form = {"params": params, "state": own}
    given = {"params": network.params, "state": network.model_state}
    checked = into(form, tree.flatten(given))

    def init(key: jax.Array, x: Any) -> tuple[PyTree, PyTree]:
        del key, x
        # Training uses up what it is given.
        return jax.tree.map(jnp.copy, (checked["params"], checked["state"]))

    def constrained(training: Training) -> Training:
        claimed = claim(training, "where runs start", "started_from")
        if training.claims:
            who, *_ = training.claims.values()
            raise ValueError(
                f"expected started_from before {who}, which may hold on to the network "
                "that it replaces, got it after; put it first"
            )
        model = Model(init, network.model.apply)
        return _seeing(claimed, model, network.shape)

    return constrained


def sees(network: Pretrained) -> Constraint:
    """Images are as a trained network saw its own: their size, channels, statistics.

    They are resized (bilinear), grey ones are repeated for every colour, and they are
    standardised with the statistics of the network instead of those of the data. The
    training's own augmentation acts before, on images in [0, 1].

    Args:
      network: whose shape, mean and std they get.

    Raises:
      ValueError: when data are shown, images of other channels.
    """
    height, width, channels = network.shape
    normalise = make_normalisation(network.mean, network.std, channels)

    def constrained(training: Training) -> Training:
        def inputs(batch: Data, key: jax.Array | None) -> jax.Array:
            pixels = training.inputs(as_pixels(batch), key)
            x = with_channels(widened(pixels), channels)
            return normalise(resized(x, (height, width)))

        claimed = claim(training, "the size of images", "sees")
        return _seeing(claimed, training.model, network.shape)._replace(inputs=inputs)

    return constrained


def frozen(but: Collection[str]) -> Constraint:
    """Weights and statistics stay as they are, but for those of some layers.

    Frozen leaves are state, not parameters: no gradient with respect to them is taken,
    and no optimiser, decay or average knows them. The network is in evaluation mode, so
    that statistics of its normalisations stay too. Its zeros count as pruned.

    Put it after what says where runs start and what stands in front of the network.

    Args:
      but: names of what is trained, the first parts of paths: {"prompt"}.

    Raises:
      ValueError: when applied, a name that no path begins with, or nothing is left to
        freeze; another constraint decides the masks.
    """

    def constrained(training: Training) -> Training:
        claimed = claim(training, "the masks", "frozen")
        stays = _staying(training.network, but)
        kernels = tree.prunable_leaves(
            training.network.params, training.network.prunable
        )

        def init(key: jax.Array, x: Any) -> tuple[PyTree, Frozen]:
            params, own = training.model.init(key, x)
            leaves = _flat(params)
            kept = {path: leaf for path, leaf in leaves.items() if path in stays}
            trained = {path: x for path, x in leaves.items() if path not in stays}
            return _nested(trained), Frozen(kept, own)

        def apply(
            params: PyTree, model_state: Frozen, x: Any, *, train: bool
        ) -> tuple[Any, Frozen]:
            del train
            whole = _nested({**model_state.params, **_flat(params)})
            outputs, _ = training.model.apply(whole, model_state.own, x, train=False)
            return outputs, model_state

        def masks(state: TrainState) -> Masks:
            kept = _frozen_of(state.model_state).params

            def live(path: str, form: Any) -> jax.Array:
                if path in kept and path in kernels:
                    return jnp.asarray(kept[path] != 0)
                return jnp.ones(form.shape, bool)

            def learned(path: str, mask: jax.Array) -> jax.Array:
                return jnp.full(mask.shape, path not in kept)

            used = tree.map_with_path(live, training.network.params)
            trained = tree.map_with_path(learned, used)
            return Masks((used,), (trained,), (used,))

        return claimed._replace(model=Model(init, apply), masks=masks)

    return constrained


def probed(classes: int, head: str = HEAD) -> Constraint:
    """A linear classifier is trained on the features of a network that is frozen.

    The features are what the last layer of the network is applied to; a new one, of the
    target's classes, takes its place and its path. Put it after `started_from` and
    `sees`.

    Args:
      classes: of the target.
      head: path of the last layer.

    Raises:
      ValueError: no class, or, when applied, no such dense layer; another constraint
        decides the masks.
    """
    replaced = with_head(classes, head)

    def constrained(training: Training) -> Training:
        probing = frozen([head])(replaced(training))

        def cost(own: Training, state: TrainState, size: int) -> Any:
            del size
            masks = own.masks(state)
            # No gradient passes the features.
            own_macs = forward_macs(own.network, masks.trained)
            return forward_macs(own.network, masks.used) + own_macs

        return probing._replace(cost=cost)

    return constrained


def fine_tuned(
    classes: int, head: str = HEAD, *, keeps_zeros: bool = True
) -> Constraint:
    """All of a network is trained on, under the masks that it came with.

    Its last layer is replaced by a new one, of the target's classes; normalisations are
    in training mode. Put it after `started_from` and `sees`.

    Args:
      classes: of the target.
      head: path of the last layer.
      keeps_zeros: whether the zeros of the network's weights stay 0; where a later
        constraint decides the masks, False.

    Raises:
      ValueError: no class, or, when applied, no such dense layer; another constraint
        decides the masks.
    """
    replaced = with_head(classes, head)

    def constrained(training: Training) -> Training:
        training = replaced(training)
        if not keeps_zeros:
            return training
        prunable = training.network.prunable
        return under_masks(training, "fine_tuned", lambda s: rules.nonzero(prunable))

    return constrained


def with_head(classes: int, head: str = HEAD) -> Constraint:
    """The last layer of a network is a new one, of other classes.

    Its kernel and bias begin uniform in ±1 / sqrt(features), and have the paths of
    those they replace.

    Args:
      classes: outputs of the new layer.
      head: path of the last layer.

    Raises:
      ValueError: no class, or, when applied, no such dense layer, or inputs of layers
        that are calibrated already.
    """
    check_whole("classes", classes, least=1)

    def constrained(training: Training) -> Training:
        if training.claims.get("the precision") == CALIBRATED:
            raise ValueError(
                "expected a new last layer before quantised looks at the inputs of "
                "layers, got it after; put quantised after it, or start from a network "
                "that d2sparse.models.quantised.post_training has rounded"
            )
        claimed = claim(training, "the last layer", "with_head")
        model, network = training.model, training.network
        old = _leaves_of(head, network.params)
        features = old[f"{head}/kernel"].shape[0]

        def init(key: jax.Array, x: Any) -> tuple[PyTree, PyTree]:
            params, model_state = model.init(key, x)
            bound = features**-0.5
            new = {
                path: jax.random.uniform(
                    jax.random.fold_in(key, number),
                    (*form.shape[:-1], classes),
                    minval=-bound,
                    maxval=bound,
                )
                for number, (path, form) in enumerate(old.items(), start=1)
            }
            return _nested({**_flat(params), **new}), model_state

        def apply(
            params: PyTree, model_state: PyTree, x: Any, *, train: bool
        ) -> tuple[jax.Array, PyTree]:
            # The layer that was there is applied to be tapped; nothing depends on it.
            unused = {path: jnp.zeros(form.shape) for path, form in old.items()}
            leaves = _flat(params)
            (_, after), taps = read(model.apply, [head])(
                _nested({**leaves, **unused}), model_state, x, train=train
            )
            logits = taps[head].input @ leaves[f"{head}/kernel"]
            if f"{head}/bias" in leaves:
                logits += leaves[f"{head}/bias"][None]
            return logits, after

        def described(path: str, form: Any) -> Any:
            shape = (*form.shape[:-1], classes) if path in old else form.shape
            return jax.ShapeDtypeStruct(shape, form.dtype)

        kernel = f"{head}/kernel"
        costs = {**network.macs, kernel: features * classes}
        headed = network._replace(
            params=tree.map_with_path(described, network.params), macs=costs
        )
        return claimed._replace(model=Model(init, apply), network=headed)

    return constrained


def _seeing(training: Training, model: Model, shape: tuple[int, ...]) -> Training:
    """The training of a network that sees images of a shape."""
    network = describe(model, images_like(shape), training.network.prunable)
    return training._replace(model=model, network=network)


def _staying(network: Network, but: Collection[str]) -> set[str]:
    """Paths of the leaves that are not trained."""
    paths = tree.flatten(network.params)
    for name in but:
        if not any(_is_under(name, path) for path in paths):
            raise ValueError(
                f"expected layers of the network to train, got {name!r}; it has "
                f"{sorted({path.partition('/')[0] for path in paths})}"
            )
    stays = {path for path in paths if not any(_is_under(n, path) for n in but)}
    if not stays:
        raise ValueError(
            f"expected leaves that are frozen, got none beside {sorted(but)}; leave "
            "frozen away"
        )
    return stays


def _leaves_of(layer: str, params: PyTree) -> dict[str, Any]:
    """Kernel and bias of a dense layer by path."""
    leaves = tree.flatten(params)
    kernel = leaves.get(f"{layer}/kernel")
    if kernel is None or kernel.ndim != 2:
        dense = [p for p, x in leaves.items() if p.endswith("/kernel") and x.ndim == 2]
        raise ValueError(
            f"expected a dense layer as the last, got {layer!r}; the network has "
            f"{[path.removesuffix('/kernel') for path in dense]}: name it by `head`"
        )
    return {path: x for path, x in leaves.items() if _is_under(layer, path)}


def _is_under(name: str, path: str) -> bool:
    return path == name or path.startswith(f"{name}/")


def _frozen_of(model_state: PyTree) -> Frozen:
    """The frozen leaves in a model state, of the network that predicts."""
    nodes = jax.tree.leaves(model_state, is_leaf=lambda x: isinstance(x, Frozen))
    found: Frozen = next(node for node in nodes if isinstance(node, Frozen))
    return found


def _flat(params: PyTree) -> dict[str, Any]:
    if not isinstance(params, Mapping):
        raise ValueError(
            "expected parameters in nested dictionaries, as those of Linen, got "
            f"{type(params).__name__}; wrap the network in a `Model` that has them"
        )
    return tree.flatten(params)


def _nested(leaves: Mapping[str, Any]) -> PyTree:
    return traverse_util.unflatten_dict(dict(leaves), sep="/")
