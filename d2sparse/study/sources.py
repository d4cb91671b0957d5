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
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import checkpoint, data, disk, models, quantisation, train, tree
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
from d2sparse.study.flags import aside
from d2sparse.study.trainings import make_prunable
from d2sparse.train import Constraint, Data, Program, Recipe, Training

OWN, TURNED = "own", "turned_digits"
FLOAT_BITS = 32
_CALIBRATED_ON = 512  # Training images of the source.


class Compression(NamedTuple):
    """How a source network is compressed.

    Attributes:
      pruning: "one_shot", "imp", "rigl", or "" for none.
      sparsity: fraction of zeros among the kernels but the first and the last.
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
    "imp80": Compression("imp", 0.8),
    "imp95": Compression("imp", 0.95),
    "rigl80": Compression("rigl", 0.8),
    "rigl95": Compression("rigl", 0.95),
    "ptq8": Compression("", 0.0, 8, 8),
    "ptq4": Compression("", 0.0, 4, 4),
    "ptq3": Compression("", 0.0, 3, 3),
    "qat4": Compression("", 0.0, 4, 4, aware=True),
    "qat3": Compression("", 0.0, 3, 3, aware=True),
    "imp80_ptq8": Compression("imp", 0.8, 8, 8),
    "imp80_ptq4": Compression("imp", 0.8, 4, 4),
}
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
    # Directory where source networks are kept, each under what it is made from.
    sources: str = aside("runs/sources")

    def __post_init__(self) -> None:
        """Refuses values out of their ranges.

        Raises:
          ValueError: naming the flag.
        """
        check_choice("compression", self.compression, COMPRESSIONS)
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


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Makes source networks, and keeps what was trained for the next time.

    Attributes:
      flags: of the source.
      task: what they are trained on.
      place: directory where they are kept.
      say: told of every network that was trained.
      programs: compiled, by what is trained; all seeds share them.
      made: the networks that were made, by name and seed.
      trains: whether what is not there is trained; else it stays as it begins.
    """

    flags: SourceFlags
    task: Source
    place: Path
    say: Callable[[str], None]
    programs: dict[Any, Program]
    made: dict[tuple[str, int], SourceNetwork]
    trains: bool = True

    def make(self, name: str, seed: int) -> SourceNetwork:
        """The network of a compression and a seed.

        Args:
          name: of COMPRESSIONS.
          seed: of a network trained here, from its first weights on; of one that others
            trained, of what is trained after it was read.
        """
        if (name, seed) not in self.made:
            self.made[name, seed] = self._compress(name, seed)
        return self.made[name, seed]

    def _compress(self, name: str, seed: int) -> SourceNetwork:
        own = COMPRESSIONS[name]
        exact = self._trained(own, seed)
        network = self._rounded(exact, own) if own.bits else exact
        facts = {
            **self._quality(name, seed, network, own),
            "sparsity": self._sparsity(exact),
            "size": self._size(exact, own),
        }
        return SourceNetwork(network, own, facts)

    def start(self, seed: int) -> Pretrained:
        """The network that everything begins with: not trained yet, or as read."""
        if self.flags.source != OWN:
            return read_network(self.flags.source)
        return self._fresh(seed)

    def _trained(self, own: Compression, seed: int) -> Pretrained:
        """A network before it is rounded."""
        if own.bits and not own.aware:
            own = Compression(own.pruning, own.sparsity)
        (name,) = [name for name, other in COMPRESSIONS.items() if other == own]
        if own.pruning == "rigl":
            steps = self.flags.source_steps + self.flags.further_steps
            recipe = self._recipe(steps, self.flags.source_rate)
            return self._kept(name, seed, self.start(seed), recipe, own)
        recipe = self._recipe(self.flags.further_steps, self.flags.further_rate)
        return self._kept(name, seed, self._base(seed), recipe, own)

    def _base(self, seed: int) -> Pretrained:
        """The dense network that the others of a seed descend from."""
        start = self.start(seed)
        if self.flags.source != OWN:
            return start
        recipe = self._recipe(self.flags.source_steps, self.flags.source_rate)
        return self._kept("base", seed, start, recipe, Compression())

    def _fresh(self, seed: int) -> Pretrained:
        """A network that is not trained yet."""
        images = self.task.train.images
        shape, like = images.shape[1:], jnp.zeros((1, *images.shape[1:]))
        params, model_state = self._model.init(jax.random.key(seed), like)
        mean, std = map(jnp.asarray, data.channel_statistics(images))
        return Pretrained(self._model, params, model_state, mean, std, shape)

    @functools.cached_property
    def _model(self) -> Model:
        """Of own networks; all seeds share what is compiled."""
        flags = self.flags
        return models.make_model(
            flags.source_model, self.task.num_classes, flags.source_width
        )

    def _recipe(self, steps: int, rate: float) -> Recipe:
        augment = data.make_augment(padding=self.flags.source_shift)
        return Recipe(
            steps, self.flags.source_batch, learning_rate=rate, augment=augment
        )

    def _kept(
        self,
        name: str,
        seed: int,
        start: Pretrained,
        recipe: Recipe,
        own: Compression,
    ) -> Pretrained:
        """What a network has become: read, or trained and written."""
        place = self.place / f"{name}-{seed}"
        shapes = {"params": start.params, "model_state": start.model_state}
        if not place.exists():
            if not self.trains:
                return start
            trained = self._train(name, seed, start, recipe, own)
            zeros = jax.tree.map(lambda leaf: leaf != 0, trained["params"])
            stays = dense_masks(trained["model_state"])
            masks = {"params": zeros, "model_state": stays}
            checkpoint.save_sparse(place, trained, masks)
            self.say(f"source {name}, seed {seed}: trained for {recipe.steps} steps")
        found, _ = checkpoint.load_sparse(place, shapes)
        return start._replace(**found)

    def _train(
        self,
        name: str,
        seed: int,
        start: Pretrained,
        recipe: Recipe,
        own: Compression,
    ) -> dict[str, Any]:
        """Parameters and state of a network at the end of its training."""
        examples = train.to_device(self.task.train)
        training = self._training(start, examples, recipe, own)
        if name not in self.programs:
            self.programs[name] = train.make_program(training)
        program = train.starting_as(self.programs[name], training)
        begun = program.init(jax.random.key(seed), examples)
        end = train.fit(program, begun, examples)
        state = program.training.finish(end, examples, program)
        return {"params": state.params, "model_state": state.model_state}

    def _training(
        self, start: Pretrained, examples: Data, recipe: Recipe, own: Compression
    ) -> Training:
        network = train.describe(start.model, examples)
        recipe = recipe._replace(
            prunable=make_prunable("body", network, examples.images.shape[1:])
        )
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
        key = ("judged", own.activation_bits)
        if key not in self.programs:
            self.programs[key] = train.make_program(training)
        program = train.starting_as(self.programs[key], training)
        state = program.init(jax.random.key(0), examples).state
        (probabilities,) = program.predict(state, examples).values()
        quality = train.evaluate(probabilities, self.task.test.labels)
        write_json(place, quality)
        return quality

    def _sparsity(self, network: Pretrained) -> float:
        """Fraction of zeros among the kernels but the first and the last."""
        prunable = make_prunable(
            "body",
            train.Network(network.params, {}),
            network.shape,
        )
        kernels = tree.prunable_leaves(network.params, prunable)
        zeros = sum(int(jnp.sum(kernel == 0)) for kernel in kernels.values())
        return zeros / tree.size(kernels)

    def _size(self, network: Pretrained, own: Compression) -> float:
        """Bits of the weights that are not 0."""
        if not own.bits:
            live = [
                jnp.sum(x != 0) for x in tree.prunable_leaves(network.params).values()
            ]
            return float(FLOAT_BITS * sum(int(count) for count in live))
        images = jax.ShapeDtypeStruct((1, *network.shape), jnp.float32)
        order = in_order(
            *(network.model.apply, network.params, network.model_state, images),
            train=False,
        )
        bits = quantisation.edge_bits(order, own.bits)
        return quantisation.effective_size(network.params, bits)


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
    return Workshop(flags, task, place, say, {}, {}, trains)


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
