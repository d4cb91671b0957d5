"""The networks that are transferred: trained or read, compressed, kept on disk.

All networks of one seed descend from one dense network, its base: they have been
trained on for as many steps from its weights, also `dense` itself. What is rounded
after training, `ptq`, is rounded from what it is compared with. Only RigL trains from
the beginning, for as many steps as the others altogether.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import checkpoint, data, disk, models, quantisation, train
from d2sparse.checks import check_choice, check_least
from d2sparse.constraints import (
    Moves,
    Rewinds,
    iterative_magnitude,
    one_shot,
    quantised,
    rigl,
    sees,
    started_from,
)
from d2sparse.data import Source
from d2sparse.masks import dense_masks
from d2sparse.models import Model, pretrained
from d2sparse.models.pretrained import Pretrained
from d2sparse.models.quantised import in_order, post_training
from d2sparse.records.files import read_text, write_json
from d2sparse.schedules import refresh_interval, refresh_stop
from d2sparse.study.flags import PrunableName, aside
from d2sparse.study.judging import zeros
from d2sparse.study.trainings import make_prunable
from d2sparse.train import Constraint, Data, Network, Program, Recipe, Training
from d2sparse.tree import PyTree

OWN, BASE, TURNED = "own", "base", "turned_digits"
FLOAT_BITS = 32
_CALIBRATED_ON = 512  # Training images of the source.


class Compression(NamedTuple):
    """How a source network is compressed.

    Attributes:
      pruning: "one_shot", "imp", "rigl", or "" for none.
      sparsity: fraction of zeros among what may be pruned.
      bits: of kernels; 0 for floats. The first and the last have 8.
      activation_bits: of the inputs of layers; 0 for floats.
      aware: whether it was trained with its bits, or rounded after training.
    """

    pruning: str = ""
    sparsity: float = 0.0
    bits: int = 0
    activation_bits: int = 0
    aware: bool = False


COMPRESSIONS: Mapping[str, Compression] = {
    "dense": Compression(),
    "one_shot80": Compression("one_shot", 0.8),
    "one_shot95": Compression("one_shot", 0.95),
    "imp50": Compression("imp", 0.5),
    "imp80": Compression("imp", 0.8),
    "imp95": Compression("imp", 0.95),
    "rigl80": Compression("rigl", 0.8),
    "rigl95": Compression("rigl", 0.95),
    "ptq8": Compression("", 0.0, 8, 8),
    "ptq4": Compression("", 0.0, 4, 4),
    "ptq3": Compression("", 0.0, 3, 3),
    "qat4": Compression("", 0.0, 4, 4, aware=True),
    "qat3": Compression("", 0.0, 3, 3, aware=True),
    "imp50_ptq8": Compression("imp", 0.5, 8, 8),
    "imp80_ptq8": Compression("imp", 0.8, 8, 8),
    "imp80_ptq4": Compression("imp", 0.8, 4, 4),
}
# Type checkers ask for literals that are written out; the names stand in the table.
CompressionName = Literal[*COMPRESSIONS]  # type: ignore[valid-type]


@dataclasses.dataclass(frozen=True)
class SourceFlags:
    """Source networks."""

    compression: CompressionName = "dense"  # of the source network
    source_seed: int = 0  # of the source network
    # Where source networks come from: "own" trains them; an .npz or .th file holds a
    # CIFAR ResNet in PyTorch's names, an .h5 file the ResNet-8 of MLPerf Tiny.
    source: str = OWN
    # What they were trained on: "turned_digits", 0 to 4 in four rotations as 20
    # classes, or a TFDS set.
    source_dataset: str = "turned_digits"
    source_model: str = "lenet_300_100"  # of own networks
    source_width: float | None = None  # in the model's own unit; None: its default
    source_steps: int = 1000  # of the dense network that the others descend from
    further_steps: int = 500  # of all networks from there on
    source_batch: int = 64  # examples per step
    source_rate: float = 0.1  # learning rate of own networks at the first step
    further_rate: float = 0.03  # learning rate from there on
    source_shift: int = 1  # augmentation, as --shift
    source_rounds: int = 5  # of iterative magnitude pruning
    # What of it is pruned; body is all kernels but the first layer's and the head's.
    source_prunable: PrunableName = "kernels"
    # Directory where source networks are kept, each under what it is made from.
    sources: str = aside("runs/sources")

    def __post_init__(self) -> None:
        """Refuses values out of their ranges.

        Raises:
          ValueError: naming the flag.
        """
        check_choice("compression", self.compression, COMPRESSIONS)
        check_choice("source_prunable", self.source_prunable, get_args(PrunableName))
        check_least(self, _LEAST)
        if self.source != OWN and self.compression.startswith("rigl"):
            raise ValueError(
                f"expected no {self.compression} of a network of others, since RigL "
                "trains from the beginning; leave it away or give --source=own"
            )


_OF_ONE = {"compression", "source_seed", "sources"}
_LEAST = {
    **dict.fromkeys(("source_seed", "source_shift"), 0),
    **dict.fromkeys(("source_rate", "further_rate"), 0),
    **dict.fromkeys(("source_steps", "further_steps", "source_batch"), 1),
    "source_rounds": 1,
}


class SourceNetwork(NamedTuple):
    """A network that is transferred, and what is known of it.

    Attributes:
      network: with the rounding of its activations in its model.
      compression: how it was made.
      facts: accuracy, nll, ece and brier on the test set of its own task; sparsity, of
        the kernels but the first and the last; size, the bits of its live weights.
    """

    network: Pretrained
    compression: Compression
    facts: Mapping[str, float]


class _Course(NamedTuple):
    """How a network comes about.

    Attributes:
      name: "base", or one of COMPRESSIONS.
      seed: of its training.
      start: the network it begins with.
      recipe: of its training.
      compression: while it is trained.
    """

    name: str
    seed: int
    start: Pretrained
    recipe: Recipe
    compression: Compression


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Makes source networks, and keeps what was trained for the next time.

    Attributes:
      flags: of the source.
      task: what they are trained on.
      place: directory where they are kept.
      say: told of every network that was trained.
      trains: whether what is not there is trained; else it stays as it begins.
      programs: compiled, by what is trained; all seeds share them.
      exact: the networks before they are rounded, by name and seed.
      made: the networks that were made, likewise.
    """

    flags: SourceFlags
    task: Source
    place: Path
    say: Callable[[str], None]
    trains: bool = True
    programs: dict[Any, Program] = dataclasses.field(default_factory=dict)
    exact: dict[tuple[str, int], Pretrained] = dataclasses.field(default_factory=dict)
    made: dict[tuple[str, int], SourceNetwork] = dataclasses.field(default_factory=dict)

    def make(self, name: str, seed: int) -> SourceNetwork:
        """The network of a compression and a seed.

        Args:
          name: of COMPRESSIONS.
          seed: of a network trained here, from its first weights on; of one that others
            trained, of what is trained after it was read.
        """
        if (name, seed) not in self.made:
            self.made[name, seed] = self._make(name, seed)
        return self.made[name, seed]

    def start(self, seed: int) -> Pretrained:
        """The network that everything begins with: not trained yet, or as read."""
        if self.flags.source != OWN:
            return self._read
        images = self.task.train.images
        shape, like = images.shape[1:], jnp.zeros((1, *images.shape[1:]))
        params, model_state = self._model.init(jax.random.key(seed), like)
        mean, std = map(jnp.asarray, data.channel_statistics(images))
        return Pretrained(self._model, params, model_state, mean, std, shape)

    def _make(self, name: str, seed: int) -> SourceNetwork:
        own = COMPRESSIONS[name]
        exact = self._exact(_unrounded(own), seed)
        network = self._rounded(exact, own) if own.bits else exact
        facts = {
            **self._quality(name, seed, network, own),
            "sparsity": zeros(self._described(exact), _live(exact.params)),
            "size": self._size(exact, own),
        }
        return SourceNetwork(network, own, facts)

    def _exact(self, name: str, seed: int) -> Pretrained:
        """A network before it is rounded, "base" or of COMPRESSIONS."""
        if (name, seed) not in self.exact:
            self.exact[name, seed] = self._come_about(name, seed)
        return self.exact[name, seed]

    def _come_about(self, name: str, seed: int) -> Pretrained:
        """What a network has become: read, or trained and written."""
        if name == BASE and self.flags.source != OWN:
            return self._read
        course, place = self._course(name, seed), self.place / f"{name}-{seed}"
        start, steps = course.start, course.recipe.steps
        if not place.exists():
            if not self.trains:
                return start
            trained = self._train(course)
            masks = {
                "params": _live(trained["params"]),
                "model_state": dense_masks(trained["model_state"]),
            }
            checkpoint.save_sparse(place, trained, masks)
            self.say(f"source {name}, seed {seed}: trained for {steps} steps")
        shapes = {"params": start.params, "model_state": start.model_state}
        found, _ = checkpoint.load_sparse(place, shapes)
        return start._replace(**found)

    def _course(self, name: str, seed: int) -> _Course:
        flags = self.flags
        own = Compression() if name == BASE else COMPRESSIONS[name]
        steps, rate, first = flags.further_steps, flags.further_rate, None
        if name == BASE:
            steps, rate, first = flags.source_steps, flags.source_rate, self.start(seed)
        if own.pruning == "rigl":
            steps += flags.source_steps
            rate, first = flags.source_rate, self.start(seed)
        augment = data.make_augment(padding=flags.source_shift)
        recipe = Recipe(steps, flags.source_batch, learning_rate=rate, augment=augment)
        return _Course(name, seed, first or self._exact(BASE, seed), recipe, own)

    @functools.cached_property
    def _read(self) -> Pretrained:
        """The network that others trained."""
        return read_network(self.flags.source)

    @functools.cached_property
    def _model(self) -> Model:
        """Of own networks; all seeds share what is compiled."""
        flags = self.flags
        return models.make_model(
            flags.source_model, self.task.num_classes, flags.source_width
        )

    def _train(self, course: _Course) -> dict[str, Any]:
        """Parameters and state of a network at the end of its training."""
        examples = train.to_device(self.task.train)
        program = self._program(course.name, self._training(course, examples))
        begun = program.init(jax.random.key(course.seed), examples)
        end = train.fit(program, begun, examples)
        state = program.training.finish(end, examples, program)
        return {"params": state.params, "model_state": state.model_state}

    def _program(self, key: Any, training: Training) -> Program:
        """A program of a training; those of one key differ in their starts alone."""
        if key not in self.programs:
            self.programs[key] = train.make_program(training)
        return train.starting_as(self.programs[key], training)

    def _training(self, course: _Course, examples: Data) -> Training:
        start, own = course.start, course.compression
        recipe = course.recipe._replace(prunable=self._described(start).prunable)
        plain = train.plain(start.model, examples, recipe)
        coarse = [quantised(own.bits, own.activation_bits)] if own.bits else []
        pruned = [self._pruning(own, recipe)] if own.pruning else []
        return train.constrain(
            plain, started_from(start), *coarse, sees(start), *pruned
        )

    def _pruning(self, own: Compression, recipe: Recipe) -> Constraint:
        if own.pruning == "one_shot":
            return one_shot(own.sparsity, prune_at=0.0)
        if own.pruning == "imp":
            # Every round begins with the weights of the base.
            rewinds = Rewinds(fraction=0.0)
            return iterative_magnitude(own.sparsity, self.flags.source_rounds, rewinds)
        size, stop = len(self.task.train.labels), refresh_stop(recipe.steps)
        interval = refresh_interval(size, recipe.batch_size, stop)
        return rigl(own.sparsity, Moves(interval, growth_samples=256))

    def _described(self, network: Pretrained) -> Network:
        """A network of which what the flags name may be pruned."""
        plain, name = Network(network.params, {}), self.flags.source_prunable
        return plain._replace(prunable=make_prunable(name, plain, network.shape))

    def _rounded(self, network: Pretrained, own: Compression) -> Pretrained:
        """A network of few bits, with scales of inputs from training images."""
        parts = post_training(
            *(network.model, network.params, network.model_state),
            self._calibration_images(network),
            bits=own.bits,
            activation_bits=own.activation_bits,
        )
        model, params, model_state = parts
        return network._replace(model=model, params=params, model_state=model_state)

    def _calibration_images(self, network: Pretrained) -> list[jax.Array]:
        """Training images as the network sees them, in one batch."""
        order = np.random.default_rng(0).permutation(len(self.task.train.labels))
        chosen = data.select(self.task.train, order[:_CALIBRATED_ON])
        return [data.standardize(chosen.images, network.mean, network.std)]

    def _quality(
        self, name: str, seed: int, network: Pretrained, own: Compression
    ) -> dict[str, float]:
        """What a network scores on the test set of its own task: read, or measured."""
        place = self.place / f"{name}-{seed}.json"
        if place.exists():
            found: dict[str, float] = json.loads(read_text(place))
            return found
        if not self.trains:  # It may not be trained yet.
            return dict.fromkeys(("accuracy", "nll", "brier", "ece"), np.nan)
        examples = train.to_device(self.task.test)
        training = train.constrain(
            train.plain(network.model, examples), started_from(network), sees(network)
        )
        program = self._program(("judged", own.activation_bits), training)
        state = program.init(jax.random.key(0), examples).state
        (probabilities,) = program.predict(state, examples).values()
        quality = train.evaluate(probabilities, self.task.test.labels)
        write_json(place, quality)
        return quality

    def _size(self, network: Pretrained, own: Compression) -> float:
        """Bits of the weights that are not 0."""
        if not own.bits:
            return quantisation.effective_size(network.params, {})
        images = jax.ShapeDtypeStruct((1, *network.shape), jnp.float32)
        order = in_order(
            *(network.model.apply, network.params, network.model_state, images),
            train=False,
        )
        bits = quantisation.edge_bits(order, own.bits)
        return quantisation.effective_size(network.params, bits)


def _unrounded(own: Compression) -> str:
    """The name of what a network is before it is rounded after training."""
    if own.bits and not own.aware:
        own = Compression(own.pruning, own.sparsity)
    (name,) = [name for name, other in COMPRESSIONS.items() if other == own]
    return name


def _live(params: PyTree) -> PyTree:
    """Masks of what is not 0."""
    return jax.tree.map(lambda leaf: leaf != 0, params)


def make_workshop(
    flags: SourceFlags,
    data_dir: str | None,
    trains: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Workshop:
    """A workshop that keeps networks in a directory of what they are made from.

    Args:
      flags: of the source.
      data_dir: of prepared TFDS sets.
      trains: whether what is not there is trained.
      say: told of every network that was trained.

    Raises:
      ValueError: a file of a network, or a data set, is not there.
    """
    task = load_task(flags.source_dataset, data_dir)
    fields = {field.name for field in dataclasses.fields(SourceFlags)}
    made_from = {name: getattr(flags, name) for name in sorted(fields - _OF_ONE)}
    digest = hashlib.sha256(json.dumps(made_from).encode())
    if flags.source != OWN:
        digest.update(disk.existing_file(flags.source).read_bytes())
    name = Path(flags.source).stem
    place = disk.local_path(flags.sources, "--sources")
    place = place / f"{name}-{flags.source_dataset}-{digest.hexdigest()[:6]}"
    return Workshop(flags, task, place, say, trains)


def load_task(name: str, data_dir: str | None = None) -> Source:
    """What source networks are trained on.

    Args:
      name: "turned_digits", the digits 0 to 4 in four rotations, of 16 x 16 pixels, or
        a name as for `data.load`.
      data_dir: likewise.

    >>> task = load_task("turned_digits")
    >>> task.num_classes, task.train.images.shape[1:], len(task.test.labels)
    (20, (16, 16, 1), 1000)
    """
    if name != TURNED:
        return data.load(name, data_dir)
    digits = data.only_classes(data.load("digits"), "0-4")
    return data.enlarged(data.with_rotations(digits), 16)


def read_network(path: str) -> Pretrained:
    """A network that others trained on CIFAR-10.

    Args:
      path: of a CIFAR ResNet in PyTorch's names (.npz, .th, .pt, .safetensors), or of
        the ResNet-8 of MLPerf Tiny (.h5).

    Raises:
      ValueError: there is no such file, or it holds another network.
    """
    arrays = pretrained.load_arrays(path)
    if path.endswith((".h5", ".keras")):
        return pretrained.mlperf_resnet8(arrays)
    return pretrained.cifar_resnet(arrays)
