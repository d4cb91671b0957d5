"""The training of a row: its network, its data, its constraints, its devices."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from d2sparse import checkpoint, data, models, train, tree
from d2sparse.constraints import METHODS, MIXES, Method, from_ticket
from d2sparse.lottery import Ticket
from d2sparse.masks import dense_masks
from d2sparse.models import Model
from d2sparse.study.flags import Config, given
from d2sparse.train import Data, Network, Program, Recipe, Training, constrain, describe
from d2sparse.tree import Prunable, is_kernel

MakeModel = Callable[[Config], Model]


def mixed(config: Config, method: Method) -> list[Method]:
    """A method and what it is mixed with."""
    return [method, *(MIXES[name] for name in config.with_)]


def named_model(classes: int) -> MakeModel:
    """The networks that --model and --width name."""
    return lambda flags: models.make_model(flags.model, classes, flags.width)


def make_training(
    flags: Config, like: Data, build: MakeModel, method: Method
) -> Training:
    """The training of a row whose flags are known.

    Args:
      flags: from `configure`.
      like: training data of one seed; all seeds have data of the same shapes.
      build: flags -> network.
      method: of the row.

    Raises:
      ValueError: a flag is out of its range, or two constraints claim the same thing.
    """
    model = build(flags)
    network = describe(model, like)
    steps = flags.count_steps(like.labels)
    recipe = Recipe(
        *(steps, flags.batch_size, flags.optimizer, flags.learning_rate),
        *(flags.schedule, flags.momentum, flags.weight_decay, flags.sharpness),
        label_smoothing=flags.label_smoothing,
        augment=_augment(flags, like),
        prunable=make_prunable(flags.prunable, network, like.images.shape[1:]),
    )
    training = train.plain(model, like, recipe)
    if flags.ticket:
        training = from_ticket(_load_ticket(flags, training, like))(training)
    rows = sorted(mixed(flags, method), key=lambda row: not row.innermost)
    constraints = [c for row in rows for c in row.constraints(flags)]
    return constrain(training, *constraints)


def make_prunable(
    name: str, network: Network, input_shape: tuple[int, ...]
) -> Prunable:
    """Which leaves of a network may be pruned.

    Args:
      name: "kernels" of all layers, those of "convolutions", or of the "body": all but
        the first layer and the head. The first layer is the first kernel in the tree
        whose input is an example, by its channels or by its numbers, and the head the
        last kernel of a dense layer.
      network: shapes.
      input_shape: of one example, the channels last.

    Raises:
      ValueError: there is no such leaf in the network.
    """
    if name == "kernels":
        return is_kernel
    kernels = tree.prunable_leaves(network.params)
    if name == "convolutions":
        kernels = {path: leaf for path, leaf in kernels.items() if leaf.ndim == 4}
    if name == "body":
        inputs = {2: math.prod(input_shape), 4: input_shape[-1]}
        first = [p for p, x in kernels.items() if x.shape[-2] == inputs.get(x.ndim)]
        heads = [path for path, leaf in kernels.items() if leaf.ndim == 2]
        ends = {*first[:1], *heads[-1:]}
        kernels = {path: leaf for path, leaf in kernels.items() if path not in ends}
    if not kernels:
        raise ValueError(
            f"expected a network with prunable {name}, got one without; choose kernels"
        )
    return lambda path, leaf: path in kernels


def run_width(flags: Any) -> int:
    """How many devices, or groups that share batches, can train runs side by side."""
    everything = jax.device_count()
    return everything // (flags.data_parallel or everything)


def make_mesh(flags: Any, size: int) -> Mesh | None:
    """The devices that share the batches of a data set of a size; None for one.

    Raises:
      ValueError: a batch cannot be shared evenly.
    """
    everything = jax.device_count()
    count = flags.data_parallel or everything
    if jax.process_count() > 1 and count != everything:
        raise ValueError(
            f"expected the devices of all {jax.process_count()} processes to share "
            f"every batch, got data_parallel={count} of {everything}; give "
            "--data_parallel=0"
        )
    alone = jax.default_backend() == "cpu"  # Where runs are trained one by one.
    runs = flags.runs_at_once or (1 if alone else run_width(flags))
    mesh = train.make_mesh(count, runs)
    if mesh.size == 1:
        return None
    train.check_batch(min(flags.batch_size, size), mesh)
    return mesh


def rehearse(program: Program, like: Data) -> None:
    """Traces the first state and loss, so that nothing is written before they work."""
    training = program.training.phases[0].training or program.training

    def first_loss(data: Data) -> Any:
        key, example = jax.random.key(0), train.take(data, jnp.arange(1))
        settings = {k: jnp.float32(v) for k, v in training.settings.items()}
        x = training.inputs(example, key)
        params, model_state = training.model.init(key, training.inputs(example, None))
        outputs, _ = training.model.apply(params, model_state, x, train=True)
        context = train.Context(params, model_state, jnp.int32(0), settings, x)
        rate = training.rate(training.settings["learning_rate"], training.horizon)
        training.transform(rate, training.settings, key).init(params)
        if training.scores is not None:
            state = training.init(training, key, data, training.settings)
            training.scores(training, state, example, key)
        return training.loss(outputs, example, context)[0]

    try:
        jax.eval_shape(first_loss, like)
    except ValueError as error:
        if "dense with `prunable`" not in str(error):
            raise
        hint = "or choose --prunable=body, which leaves the first layer and head dense"
        raise ValueError(f"{error}, {hint}") from error


def _augment(flags: Config, like: Data) -> Any:
    """The augmentation of images; other arrays have none."""
    if like.images.ndim == 4 and like.images.dtype == jnp.uint8:
        return data.make_augment(
            padding=flags.shift,
            flip=flags.flip,
            cutout=flags.cutout,
            jitter=flags.jitter,
        )
    for name in ("shift", "flip", "cutout", "jitter"):
        if name in given(flags) and getattr(flags, name):
            raise ValueError(
                f"expected no {name}, which is for uint8 images, got "
                f"{getattr(flags, name)} for arrays {like.images.dtype}"
                f"{list(like.images.shape[1:])}; augment them in advance"
            )
    return None


def _load_ticket(flags: Config, training: Training, like: Data) -> Ticket:
    """The ticket in a directory, for a network.

    Raises:
      ValueError: there is none, it is one of another network, or it is sparser than
        the weights that a method shall prune to.
    """
    example = jax.eval_shape(
        lambda data: training.inputs(train.take(data, jnp.arange(1)), None), like
    )
    form = jax.eval_shape(training.model.init, jax.random.key(0), example)
    shapes = dict(zip(("params", "model_state"), form, strict=True))
    values, masks = checkpoint.load_sparse(flags.ticket, shapes)
    ticket = Ticket(values["params"], values["model_state"], masks["params"])
    size = training.network.weights
    live = sum(train.live_weights(training.network, (ticket.masks,)).values())
    (name,) = flags.methods
    if METHODS[name].ticket == "prunes" and round((1 - flags.sparsity) * size) > live:
        raise ValueError(
            f"expected a sparsity of at least that of the ticket, {1 - live / size:.4g}"
            f", got {flags.sparsity:g}; what it has pruned does not come back"
        )
    return ticket


def save_ticket(directory: Any, ticket: Ticket) -> int:
    """Writes a ticket: its live weights, its masks in bits, its statistics.

    Returns:
      Bytes of what is stored.

    Raises:
      ValueError: the directory exists.
    """
    values = {"params": ticket.params, "model_state": ticket.model_state}
    masks = {"params": ticket.masks, "model_state": dense_masks(ticket.model_state)}
    return checkpoint.save_sparse(directory, values, masks)
