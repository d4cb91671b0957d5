"""Training of a small network: `fit` against a loop written by hand with Optax."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2sparse import models, rules, train
from d2sparse.schedules import every
from d2sparse.train import Data, Training
from d2sparse.transforms import sparsify
from experiments.benchmark.measure import Candidate, Timing, time_in_turns
from experiments.benchmark.tables import Table
from experiments.benchmark.training import under_rigl
from experiments.benchmark.workload import CLASSES, LENET, TINY, Sizes, random_data

NETWORK = LENET[0]
BATCH, INTERVAL = 32, 25
DENSE, RIGL = "dense", f"rigl, a refresh every {INTERVAL} steps"
BY_HAND, FIT = "{}, loop by hand", "{}, fit"
BETWEEN = FIT.format("rigl, no refresh")


def small_table(sizes: Sizes) -> Table:
    """Steps of LeNet-300-100 on 8 × 8 images, dense and under RigL."""
    data = random_data(sizes.small_samples, TINY)
    network = models.make_model(NETWORK, num_classes=CLASSES)
    recipe = train.Recipe(sizes.small_steps, BATCH, schedule="constant")
    dense = train.plain(network, data, recipe._replace(weight_decay=0.0))
    sgd = optax.sgd(recipe.learning_rate, recipe.momentum)
    rigl = sparsify(sgd, rules.rigl(sizes.sparsity), every(INTERVAL))
    sparse = under_rigl(dense, sizes.sparsity, INTERVAL)
    calls = {
        BY_HAND.format(DENSE): by_hand(dense, sgd, data),
        FIT.format(DENSE): by_fit(dense, data),
        BY_HAND.format(RIGL): by_hand(dense, rigl, data),
        FIT.format(RIGL): by_fit(sparse, data),
        # A refresh is part of the program, and never due.
        BETWEEN: by_fit(sparse._replace(when=lambda step: step < 0), data),
    }
    candidates = {name: Candidate(call) for name, call in calls.items()}
    timings = time_in_turns(candidates, sizes.rounds, sizes.slow_rounds)
    return Table(
        f"Training a small network, {BATCH} images of 8 × 8",
        f"A call takes {sizes.small_steps} steps. The loop by hand calls a compiled "
        "step of Optax from Python with images in floats; `fit` also draws its "
        "batches, standardises them, guards the weights against updates that are not "
        "finite, and reports. Of the loop by hand: steps per second over its own. "
        "Over dense: time of a step over that of the dense network.",
        [_row(name, timings, sizes) for name in timings],
    )


def _row(name: str, timings: dict[str, Timing], sizes: Sizes) -> dict[str, Any]:
    wall, dense = timings[name].wall, timings[FIT.format(DENSE)].wall
    loop = timings.get(BY_HAND.format(name.removesuffix(", fit")))
    row = {
        "training": name,
        "model": NETWORK,
        **timings[name].over(sizes.small_steps).cells(),
        "steps per s": sizes.small_steps / wall,
    }
    if loop is not None and name.endswith("fit"):
        row["of the loop by hand"] = loop.wall / wall
    if name == BETWEEN:
        row["over dense"] = wall / dense
    return row


def by_fit(training: Training, data: Data) -> Callable[[], Any]:
    """A whole training from a state that is made once."""
    program = train.make_program(training)
    begin = program.init(jax.random.key(0), data)

    def call() -> Any:
        return train.fit(program, jax.tree.map(jnp.copy, begin), data).state

    return call


def by_hand(
    training: Training, tx: optax.GradientTransformation, data: Data
) -> Callable[[], Any]:
    """The same number of steps, as one writes them in an afternoon."""
    model, steps = training.model, training.phases[0].stop
    x, labels = np.asarray(train.inputs(data)), np.asarray(data.labels)
    params, model_state = model.init(jax.random.key(0), x[:1])
    rows = np.random.default_rng(0).integers(len(x), size=(steps, BATCH))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any, x: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits, _ = model.apply(params, model_state, x, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        params, opt_state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    def call() -> Any:
        carry = (jax.tree.map(jnp.copy, params), tx.init(params))
        for row in rows:
            carry, value = step(carry, x[row], labels[row])
        return carry, value

    return call
