"""What is learned: the labels, the network and the length of training.

All experiments share these flags, so that their numbers can be compared.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from d2sparse import data, macs, models, train, tree
from d2sparse.data import Augment
from d2sparse.distributions import check_sparsity
from d2sparse.lottery import Ticket
from d2sparse.models import Model
from d2sparse.schedules import refresh_interval, refresh_stop
from d2sparse.train import Data
from d2sparse.transforms import average_weights
from d2sparse.tree import Prunable, PyTree, is_kernel
from experiments.tickets import load_ticket

PrunableName = Literal["kernels", "convolutions", "body"]
_LEAST = {
    "seeds": 1,
    "steps": 1,
    "batch_size": 1,
    "report_every": 1,
    "refresh_interval": 0,
    "growth_samples": 0,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
    "data_parallel": 0,
    "runs_at_once": 0,
    "learning_rate": 0,
    "momentum": 0,
    "weight_decay": 0,
    "sharpness": 0,
}


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Flags that every experiment has."""

    dataset: str = "digits"  # "digits", or any TFDS image classification set
    data_dir: str | None = None  # directory of prepared TFDS sets
    samples_per_class: int = 10  # training labels of every class; 0 for all
    # Long tail: how many times more labels the largest class has, which has those of
    # --samples_per_class, than the smallest; 1: all have as many.
    imbalance: float = 1.0
    label_noise: float = 0.0  # part of the training labels that are wrong
    # Part of the labels to validate on. Above 0 the table shows validation accuracy
    # and the test set is not read: choose settings this way.
    validation_fraction: float = 0.0

    model: str = "lenet_300_100"  # network, by its name in d2sparse.models
    width: float | None = None  # width, in the model's own unit; None: its default
    seeds: int = 5  # runs of every method: labels, weights and order differ
    # Directory of a ticket that `experiments.lottery` has saved: single networks start
    # from its weights and masks.
    ticket: str = ""

    steps: int = 1000  # optimiser steps of one training
    batch_size: int = 32  # examples per step
    # sgd adds the weight decay to the gradient, sgdw and adamw to the step.
    optimizer: Literal["sgd", "sgdw", "adamw"] = "sgd"
    learning_rate: float = 0.1  # at the first step
    # What becomes of the learning rate: it falls to 0 along a cosine, or stays.
    schedule: Literal["cosine", "constant"] = "cosine"
    momentum: float = 0.9  # of sgd; the first moment's decay in adamw
    weight_decay: float = 5e-4  # on live kernels
    sharpness: float = 0.0  # how far uphill gradients are taken (SAM); 0: not at all
    # Last part of the run whose weights are averaged into those that count; 0: none.
    averaging: float = 0.0
    label_smoothing: float = 0.0  # in every method's loss
    refresh_interval: int = 0  # steps between mask refreshes; 0: from data and steps
    growth_samples: int = 1024  # examples of a growth gradient; 0: those of the step

    shift: int = 1  # augmentation: random crop after padding by so many pixels
    flip: bool = False  # augmentation: mirror left and right
    cutout: int = 0  # augmentation: side of an erased square, in pixels
    jitter: float = 0.0  # augmentation: strength of colour jitter

    report_every: int = 100  # steps between two measurements
    # What an update that is not finite does: it stops its unit, or is left out.
    on_nonfinite: Literal["stop", "skip"] = "stop"
    # Steps between two checkpoints; 0: once a minute. A signal saves one as well.
    checkpoint_every: int = dataclasses.field(default=0, compare=False)
    # How many of the latest checkpoints of a unit are kept, besides its best.
    keep_checkpoints: int = dataclasses.field(default=2, compare=False)
    # Runs of one method that are trained as one program; 0: as many as fit into the
    # memory of an accelerator, and one after another on CPU, where that is faster.
    runs_at_once: int = dataclasses.field(default=0, compare=False)
    # Devices that every batch is cut up between; 0: all of them.
    data_parallel: int = dataclasses.field(default=1, compare=False)
    # Several processes of one run: "auto" on a cluster that jax knows, or
    # HOST:PORT,COUNT,INDEX, with the host of process 0. They share the workdir.
    distributed: str = dataclasses.field(default="", compare=False)
    workdir: str = dataclasses.field(default="", compare=False)  # run directory
    progress: bool = dataclasses.field(default=True, compare=False)  # live display


class Task(NamedTuple):
    """What every method is given: the network, the budget, the length of training.

    Attributes:
      model: the network.
      params: shapes of its parameters.
      macs: its dense forward cost by path.
      augment: `(key, images) -> images`.
      optimizer: (learning rate, weight decay) -> inner optimiser.
      anneals: whether the learning rate falls.
      learning_rate: the largest one.
      weight_decay: on live kernels.
      smoothing: label smoothing.
      sparsity: fraction of zeros of a single network; a pair shares its budget.
      steps: steps of one training.
      batch_size: examples per step.
      growth_samples: examples of a growth gradient.
      interval: steps between two refreshes of a mask.
      sharpness: how far uphill gradients are taken; 0 for where the weights are.
      averaging: last part of a training whose weights are averaged.
      skip_faults: whether updates that are not finite are left out.
      image_shape: of one example, the channels last.
      ticket: the weights and masks that single networks begin with; None draws them.
      mesh: the devices that batches are cut up between; None for one.
      prunable: which leaves may be pruned.
    """

    model: Model
    params: PyTree
    macs: dict[str, int]
    augment: Augment
    optimizer: Callable[[optax.ScalarOrSchedule, Any], optax.GradientTransformation]
    anneals: bool
    learning_rate: float
    weight_decay: float
    smoothing: float
    sparsity: float
    steps: int
    batch_size: int
    growth_samples: int
    interval: int
    sharpness: float
    averaging: float
    skip_faults: bool
    image_shape: tuple[int, ...]
    ticket: Ticket | None
    mesh: Mesh | None = None
    prunable: Prunable = is_kernel

    def mean_interval(self, interval: int) -> float | None:
        """Steps per refresh over the whole run, None if there is no refresh."""
        refreshes = (refresh_stop(self.steps) - 1) // interval
        return self.steps / refreshes if refreshes else None

    def schedule(self, learning_rate: Any) -> optax.Schedule:
        """What becomes of a learning rate in one training."""
        if not self.anneals:
            return optax.constant_schedule(learning_rate)
        return optax.cosine_decay_schedule(learning_rate, self.steps)

    @property
    def average_from(self) -> int | None:
        """The step from which weights are averaged; None for no average."""
        tail = round(self.averaging * self.steps)
        return self.steps - tail if tail else None

    def averaged(
        self, tx: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """The optimiser, with an average of the weights where there is to be one."""
        if self.average_from is None:
            return tx
        return average_weights(tx, self.average_from)


def make_task(
    config: TaskConfig, labelled: Data, num_classes: int, sparsity: float
) -> Task:
    """What every method is given.

    Args:
      config: the flags.
      labelled: the labels of one seed; all seeds have as many.
      num_classes: number of classes.
      sparsity: fraction of zeros among the prunable weights, in [0, 1).

    Raises:
      ValueError: a number is out of its range, the network or the augmentation does
        not fit the images, the ticket does not fit the network, or a batch cannot be
        shared evenly by the devices.
    """
    check_least(config, _LEAST)
    check_choice("on_nonfinite", config.on_nonfinite, ("stop", "skip"))
    if not 0 <= config.label_smoothing <= 1:
        raise ValueError(
            f"expected label_smoothing in [0, 1], got {config.label_smoothing}"
        )
    if not 0 <= config.averaging <= 1:
        raise ValueError(f"expected averaging in [0, 1], got {config.averaging}")
    check_choice("schedule", config.schedule, ("cosine", "constant"))
    check_sparsity(sparsity)

    def optimizer(
        rate: optax.ScalarOrSchedule, decay: Any
    ) -> optax.GradientTransformation:
        return train.make_optimizer(
            config.optimizer, rate, decay, config.momentum, config.sharpness
        )

    # Methods make theirs when they are traced.
    optimizer(config.learning_rate, config.weight_decay)
    size, stop = len(labelled.labels), refresh_stop(config.steps)
    interval = refresh_interval(size, config.batch_size, stop)
    model = models.make_model(config.model, num_classes, config.width)
    params, state, costs = shapes_and_macs(model, labelled.images.shape[1:])
    task = Task(
        model=model,
        params=params,
        macs=costs,
        augment=data.make_augment(
            padding=config.shift,
            flip=config.flip,
            cutout=config.cutout,
            jitter=config.jitter,
        ),
        optimizer=optimizer,
        anneals=config.schedule == "cosine",
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        smoothing=config.label_smoothing,
        sparsity=sparsity,
        steps=config.steps,
        batch_size=config.batch_size,
        growth_samples=config.growth_samples,
        interval=config.refresh_interval or interval,
        sharpness=config.sharpness,
        averaging=config.averaging,
        skip_faults=config.on_nonfinite == "skip",
        image_shape=tuple(labelled.images.shape[1:]),
        ticket=load_ticket(config.ticket, params, state) if config.ticket else None,
        mesh=_make_mesh(config, size),
    )
    _rehearse(task, labelled)
    return task


def check_least(config: Any, least: Mapping[str, float]) -> None:
    """Refuses numbers below the least that makes sense.

    Raises:
      ValueError: naming the flag.
    """
    for name, value in least.items():
        if not getattr(config, name) >= value:
            raise ValueError(f"expected {name} >= {value}, got {getattr(config, name)}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuses a word that is none of the choices.

    Raises:
      ValueError: naming the flag and the choices.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"expected {name} of {', '.join(choices)}, got {value!r}")


def given(config: Any) -> dict[str, Any]:
    """The flags that differ from their defaults, with their values."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {name: own for name, own in values.items() if own != defaults[name]}


def check_effects(config: Any, effects: Mapping[str, tuple[object, str]]) -> None:
    """Refuses flags that would change nothing.

    Args:
      config: the flags.
      effects: by flag, whether it has an effect beside the others, and what says where
        it would have one.

    Raises:
      ValueError: naming the flag.
    """
    for name, value in given(config).items():
        has_effect, where = effects.get(name, (True, ""))
        if not has_effect:
            raise ValueError(f"expected no {name}, {where}, got {value}; leave it away")


def check_of(
    config: Any, chosen: Iterable[str], users: Mapping[str, Iterable[str]]
) -> None:
    """Refuses flags of methods none of which is chosen.

    Args:
      config: the flags.
      chosen: names of methods.
      users: names of those that go by a flag.

    Raises:
      ValueError: naming the flag and its methods.
    """
    names = {flag: list(own) for flag, own in users.items()}
    check_effects(
        config,
        {
            flag: (set(own) & set(chosen), f"which is for {', '.join(own)}")
            for flag, own in names.items()
        },
    )


def make_prunable(name: str, task: Task) -> Prunable:
    """Which leaves of the task's network may be pruned.

    Args:
      name: "kernels" of all layers, those of "convolutions", or of the "body": all but
        the first layer and the head. The first layer is the first kernel in the tree
        whose input is an image, by its channels or by its pixels, and the head the last
        kernel of a dense layer.
      task: the network.

    Raises:
      ValueError: unknown name, or no such leaf in the network.
    """
    check_choice("prunable", name, get_args(PrunableName))
    kernels = tree.prunable_leaves(task.params)
    if name == "convolutions":
        kernels = {path: leaf for path, leaf in kernels.items() if leaf.ndim == 4}
    if name == "body":
        inputs = {2: math.prod(task.image_shape), 4: task.image_shape[-1]}
        first = [p for p, x in kernels.items() if x.shape[-2] == inputs.get(x.ndim)]
        heads = [path for path, leaf in kernels.items() if leaf.ndim == 2]
        ends = {*first[:1], *heads[-1:]}
        kernels = {path: leaf for path, leaf in kernels.items() if path not in ends}
    if not kernels:
        raise ValueError(
            f"expected a network with prunable {name}, got one without; choose "
            "--prunable=kernels"
        )
    return lambda path, leaf: path in kernels


def default_workdir(experiment: str, config: TaskConfig) -> str:
    """A run directory of its own for every configuration.

    Returns:
      Such as "runs/prune-digits-10-1a2b3c", whose end is a digest of the flags.
    """
    flags = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.compare
    }
    digest = hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()
    samples = "" if config.samples_per_class is None else f"-{config.samples_per_class}"
    return f"runs/{experiment}-{config.dataset}{samples}-{digest[:6]}"


def shapes_and_macs(
    model: Model, image_shape: tuple[int, ...]
) -> tuple[PyTree, PyTree, dict[str, int]]:
    """Shapes of a network's parameters and state, and its forward cost by path."""
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        return model.apply(*variables, x, train=False)[0]

    costs = macs.forward_macs(apply, variables, x)
    params, state = variables
    return params, state, {path: costs[f"0/{path}"] for path in tree.flatten(params)}


def run_width(config: TaskConfig) -> int:
    """How many devices, or groups that cut up batches, can share out the runs."""
    everything = jax.device_count()
    return everything // (config.data_parallel or everything)


def _make_mesh(config: TaskConfig, size: int) -> Mesh | None:
    """The devices that batches of a data set of a size are cut up between."""
    everything = jax.device_count()
    count = config.data_parallel or everything
    if jax.process_count() > 1 and count != everything:
        raise ValueError(
            f"expected the devices of all {jax.process_count()} processes to share "
            f"every batch, got data_parallel={count} of {everything}; give "
            "--data_parallel=0"
        )
    alone = jax.default_backend() == "cpu"  # Where runs are not vmapped by themselves.
    runs = config.runs_at_once or (1 if alone else run_width(config))
    mesh = train.make_mesh(count, runs)
    if mesh.size == 1:
        return None
    train.check_batch(min(config.batch_size, size), mesh)
    return mesh


def _rehearse(task: Task, labelled: Data) -> None:
    """Traces the loss of one example, so that nothing is written before it works."""
    loss = train.make_loss(task.model, task.augment, task.smoothing)

    def first_loss(labelled: Data) -> Any:
        example, key = train.take(labelled, jnp.arange(1)), jax.random.key(0)
        return loss(*task.model.init(key, train.inputs(example)), example, key)

    jax.eval_shape(first_loss, labelled)
