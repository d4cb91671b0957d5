"""What does sparsity cost the optimiser?

Times one optimiser step with and without `sparsify`, and one refresh of the masks in
units of one pass over the weights (`abs(w) >= t` with `t` known), on the parameter tree
of a real network. All candidates of a table take turns in one process, so that the load
of the machine falls on each alike; ratios are of medians.

    python -m experiments.benchmark
"""

import dataclasses
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from d2sparse import distributions, models, records, rules, tree
from d2sparse.masks import apply_masks
from d2sparse.rules import MaskRule
from d2sparse.schedules import at
from d2sparse.transforms import sparsify
from experiments import cli

IMAGE = (1, 32, 32, 3)


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the benchmark."""

    model: str = "resnet18"  # whose parameter tree is used
    sparsity: float = 0.8  # zeros among the prunable weights
    steps: int = 10  # optimiser steps in one timing
    rounds: int = 15  # timings of every candidate; the median counts


def run(config: Config) -> list[dict[str, Any]]:
    """Prints and returns the table of costs.

    Raises:
      ValueError: a number is out of its range or the model is unknown.
    """
    if config.rounds < 1 or config.steps < 1:
        raise ValueError(
            f"expected rounds and steps of at least 1, got {config.rounds} and "
            f"{config.steps}"
        )
    params = make_params(config.model)
    rows = step_costs(params, config) + refresh_costs(params, config)
    console = Console(soft_wrap=True)
    size = tree.size(params) / 1e6
    console.print(f"{config.model}, {size:.2f} M parameters, on {_machine()}\n")
    console.print(records.markdown_table(rows, _COLUMNS))
    return rows


def make_params(model: str) -> Any:
    """Random parameters with the shapes of a model, made on the host."""
    network = models.make_model(model, num_classes=10)
    shapes, _ = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(IMAGE))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), shapes
    )


def step_costs(params: Any, config: Config) -> list[dict[str, str]]:
    """Optimiser steps between two refreshes, donated, against the plain optimiser."""
    inner = optax.sgd(0.1, momentum=0.9)
    rule, never = rules.rigl(config.sparsity), at([])
    candidates = {
        "sgd+momentum step": inner,
        "with sparsify(rigl), no refresh": sparsify(inner, rule, never),
    }
    loops = {
        name: _stepper(tx, params, config.steps) for name, tx in candidates.items()
    }
    return _rows(_take_turns(loops, config.rounds), config.steps, "× the plain step")


def refresh_costs(params: Any, config: Config) -> list[dict[str, str]]:
    """Refreshes of the masks against one pass over the weights."""
    grads = jax.tree.map(lambda w: w[..., ::-1], params)
    magnitude = rules.one_shot(config.sparsity, distribution=distributions.erk)
    candidates = {
        "refresh: magnitude, each leaf (ERK)": magnitude,
        "refresh: magnitude, global": rules.one_shot(config.sparsity),
        "refresh: SET": rules.set_(config.sparsity),
        "refresh: RigL": rules.rigl(config.sparsity),
    }
    passes = jax.jit(lambda p: [jnp.abs(w) >= 1 for w in _weights(p)])
    loops = {"one pass over the weights": lambda: jax.block_until_ready(passes(params))}
    for name, rule in candidates.items():
        loops[name] = _refresher(rule, params, grads)
    return _rows(_take_turns(loops, config.rounds), 1, "passes")


def _weights(params: Any) -> list[jax.Array]:
    return list(tree.prunable_leaves(params).values())


def _stepper(
    tx: optax.GradientTransformation, params: Any, steps: int
) -> Callable[[], None]:
    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=0)
    grads = jax.tree.map(lambda w: 1e-3 * w[..., ::-1], params)
    state = jax.jit(tx.init)(params)
    carry = [jax.tree.map(jnp.copy, (params, state))]

    def loop() -> None:
        for _ in range(steps):
            carry[0] = compiled(carry[0], grads)
        jax.block_until_ready(carry[0])

    return loop


def _refresher(rule: MaskRule, params: Any, grads: Any) -> Callable[[], None]:
    key = jax.random.key(0)
    masks = jax.jit(rule.init)(params, key)
    sparse = apply_masks(params, masks)
    update = jax.jit(rule.update)

    def loop() -> None:
        jax.block_until_ready(update(masks, sparse, grads, jnp.int32(1), key))

    return loop


def _take_turns(loops: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of every candidate, the first, compiling call left out."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop()
    for _ in range(rounds):
        for name, loop in loops.items():
            begin = time.perf_counter()
            loop()
            seconds[name].append(time.perf_counter() - begin)
    return {name: float(np.median(values)) for name, values in seconds.items()}


_COLUMNS = {"what": "what", "milliseconds": "milliseconds", "relative": "relative"}


def _rows(seconds: dict[str, float], steps: int, unit: str) -> list[dict[str, str]]:
    """The first candidate is what the others are measured by."""
    reference, *_ = seconds.values()
    return [
        {
            "what": name,
            "milliseconds": f"{1e3 * value / steps:.2f}",
            "relative": f"{value / reference:.2f} {unit}",
        }
        for name, value in seconds.items()
    ]


def _machine() -> str:
    device = jax.devices()[0]
    return f"{device.device_kind} ({platform.machine()}), jax {jax.__version__}"


if __name__ == "__main__":
    cli.main(run, Config)
