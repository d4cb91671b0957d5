"""What does a step take when devices and work grow together?

One run per device, or one batch of a fixed size per device; the efficiency is the time
of one device over that of several. Fake devices share the cores of one machine: there
the best that can be had is the number of cores over the number of devices.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
      python -m experiments.scaling.weak
"""

import dataclasses
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from d2sparse import data, models, records, rules, train
from d2sparse.schedules import every
from d2sparse.transforms import sparsify
from experiments import cli
from experiments.task import check_least

_IMAGE = (28, 28, 1)
_COLUMNS = {
    "what": "what grows",
    "devices": "devices",
    "ms": "ms per step",
    "efficiency": "efficiency",
    "best": "best of these cores",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the measurement."""

    model: str = "lenet_300_100"  # network, by its name in d2sparse.models
    batch_size: int = 64  # examples of a device
    steps: int = 20  # steps of one timing, with one refresh of RigL at 90 %
    repeats: int = 5  # timings, in turns; the median counts


def run(config: Config) -> list[dict[str, Any]]:
    """Measures on 1, 2, 4, ... devices, as many as there are, and prints a table.

    Raises:
      ValueError: a number is below 1, or the model is unknown.
    """
    check_least(config, {"batch_size": 1, "steps": 1, "repeats": 1})
    widths = [2**n for n in range(jax.device_count().bit_length())]
    works = {
        (what, width): make(config, width)
        for what, make in (("runs", _runs), ("batch", _batch))
        for width in widths
        if width <= jax.device_count()
    }
    seconds: dict[Any, list[float]] = {key: [] for key in works}
    for turn in range(config.repeats + 1):
        for key, work in works.items():
            begin = time.perf_counter()
            work()
            if turn:  # The first one compiles.
                seconds[key].append(time.perf_counter() - begin)
    medians = {key: float(np.median(own)) for key, own in seconds.items()}
    rows = [
        {
            "what": what,
            "devices": width,
            "ms": f"{1e3 * median / config.steps:.2f}",
            "efficiency": f"{medians[what, 1] / median:.2f}",
            "best": f"{min(1.0, (os.cpu_count() or 1) / width):.2f}",
        }
        for (what, width), median in medians.items()
    ]
    Console(soft_wrap=True).print(records.markdown_table(rows, _COLUMNS))
    return rows


def _runs(config: Config, width: int) -> Any:
    """One run per device."""
    step, states, labelled = _network(config, config.batch_size, width)
    runner = train.make_runner(step, train.make_mesh(1, width))
    return _timed(
        config, runner, train.stack_runs(states), train.stack_runs([labelled] * width)
    )


def _batch(config: Config, width: int) -> Any:
    """One run, whose batch grows with the devices."""
    step, (state,), labelled = _network(config, config.batch_size * width, 1)
    runner = train.make_runner(step, train.make_mesh(width))
    return _timed(config, runner, state, labelled, config.batch_size * width)


def _network(config: Config, size: int, runs: int) -> Any:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (size, *_IMAGE), np.uint8)
    labels = rng.integers(0, 10, size, np.int32)
    labelled = train.to_device(data.Split(images, labels))
    model, when = models.make_model(config.model, 10), every(config.steps)
    tx = sparsify(train.make_optimizer("sgd", 0.01), rules.rigl(0.9), when)
    step = train.make_train_step(train.make_loss(model), tx, when=when)
    keys = jax.random.split(jax.random.key(0), runs)
    return step, [train.init_state(model, tx, labelled, key) for key in keys], labelled


def _timed(
    config: Config,
    runner: train.Runner,
    state: train.TrainState,
    labelled: train.Data,
    batch_size: int | None = None,
) -> Any:
    """A call that takes the steps of one timing."""
    size, position = batch_size or config.batch_size, int(state.step)

    def work() -> None:
        nonlocal state, position
        position += config.steps
        state = train.fit(runner, state, labelled, position, size)
        jax.block_until_ready(jnp.copy(state.step))

    return work


if __name__ == "__main__":
    cli.main(run, Config)
