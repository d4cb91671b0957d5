"""Cost of a training step that puts a trained network on another task."""

from typing import Any

import jax
import jax.numpy as jnp

from d2sparse import models, train
from d2sparse.constraints import TRANSFER_METHODS, Transferred
from d2sparse.models import Model
from d2sparse.models.pretrained import Pretrained
from d2sparse.models.quantised import post_training
from experiments.benchmark.measure import Candidate, stateful, time_in_turns
from experiments.benchmark.tables import Table
from experiments.benchmark.training import ENDLESS, at_constant_rate, init_runs
from experiments.benchmark.workload import CLASSES, Sizes, random_data

IMAGENET = 224  # Side of the images that large networks saw.
BITS = 4
PROMPT, FEW_BITS = "border prompt", f"border prompt, {BITS} bits"
PROBE, TUNING = "linear probe", "fine-tuning"
_METHODS = {PROMPT: "prompted_random", PROBE: "probed", TUNING: "fine_tuned"}


def prompts_table(sizes: Sizes) -> Table:
    """A step of a prompt and of a probe on a frozen network, beside fine-tuning."""
    name, side = sizes.shown
    network = random_network(name, (side, side, sizes.image[-1]))
    candidates = {
        way: _step(_METHODS[way], network, sizes) for way in (PROMPT, PROBE, TUNING)
    }
    candidates[FEW_BITS] = _step(_METHODS[PROMPT], _rounded(network), sizes)
    timings = time_in_turns(candidates, sizes.rounds, sizes.slow_rounds)
    rows = [
        {
            "training": way,
            "model": name,
            **timing.over(sizes.repeats).cells(),
            "images per s": sizes.shown_batch * sizes.repeats / timing.wall,
            "relative": timing.wall / timings[TUNING].wall,
        }
        for way, timing in timings.items()
    ]
    return Table(
        f"One step on another task, {sizes.shown_batch} images",
        f"On a canvas of {side} × {side}, images of half the side, which the probe and "
        "fine-tuning see enlarged. Relative: to fine-tuning.",
        rows,
    )


def random_network(name: str, shape: tuple[int, int, int]) -> Pretrained:
    """A network with random weights, as if it had been trained on images of a shape."""
    model = _model(name, shape[0])
    like = jnp.zeros((1, *shape))
    params, model_state = jax.jit(model.init)(jax.random.key(0), like)
    return Pretrained(model, params, model_state, 0.5, 0.25, shape)


def _model(name: str, side: int) -> Model:
    """A network of the classes of ImageNet, with its stem where images are as large."""
    if name == "resnet50" and side == IMAGENET:
        return models.resnet50(1000, stem="imagenet")
    return models.make_model(name, CLASSES)


def _rounded(network: Pretrained) -> Pretrained:
    """The network in few bits, with the scales of inputs of one image."""
    images = [jax.random.normal(jax.random.key(1), (1, *network.shape))]
    parts = (network.model, network.params, network.model_state)
    model, params, model_state = post_training(*parts, images, BITS, BITS)
    return network._replace(model=model, params=params, model_state=model_state)


def _step(method: str, network: Pretrained, sizes: Sizes) -> Candidate:
    """As many steps as a call takes, in one program."""
    height, width, channels = network.shape
    half = (height // 2, width // 2, channels)
    data = random_data(sizes.shown_batch, half)
    given: Any = Transferred(network, CLASSES, ENDLESS)
    training = train.constrain(
        train.plain(network.model, data, at_constant_rate(sizes.shown_batch)),
        *TRANSFER_METHODS[method].constraints(given),
    )
    program = train.make_program(training)
    (state,) = init_runs(program, data, 1)
    indices = jnp.tile(jnp.arange(sizes.shown_batch), (sizes.repeats, 1))
    return Candidate(stateful(program.run, state, data, indices))
