"""What does a step take when devices and work grow together?

One run per device, or one batch of a fixed size per device; the efficiency is the time
of one device over that of several. Fake devices share the cores of one machine: there
the highest possible efficiency is the number of cores over the number of devices.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
      python -m experiments.scaling.weak
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from d2sparse import train
from d2sparse.checks import check_whole
from d2sparse.study import cli
from d2sparse.train import Data, Training, TrainState
from experiments.benchmark.measure import Candidate, Timing, stateful, time_in_turns
from experiments.benchmark.tables import Table, to_markdown
from experiments.benchmark.training import endless, init_runs, under_rigl
from experiments.benchmark.workload import num_cores, random_data

IMAGE = (28, 28, 1)


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the measurement."""

    model: str = "lenet_300_100"  # network, by its name in d2sparse.models
    batch_size: int = 64  # examples per step on each device
    steps: int = 20  # steps of one timing, with one refresh of RigL at 90 %
    repeats: int = 5  # timings of each row, in turns; the median is reported


def run(config: Config) -> Table:
    """Measures on 1, 2, 4, ... devices, as many as there are, and prints a table.

    Raises:
      ValueError: a number is below 1, or the model is unknown.
    """
    for name in ("batch_size", "steps", "repeats"):
        check_whole(name, getattr(config, name), least=1)
    widths = [2**n for n in range(jax.device_count().bit_length())]
    training, data = _training(config, config.batch_size)
    states = init_runs(train.make_program(training), data, widths[-1])
    runs = {f"runs {n}": _runs(config, states[:n]) for n in widths}
    batches = {f"batch {n}": _batch(config, states[0], n) for n in widths}
    candidates = {name: Candidate(call) for name, call in (runs | batches).items()}
    timings = time_in_turns(candidates, config.repeats, config.repeats)
    note = (
        f"{config.model}, {config.batch_size} examples a device, RigL at 90 %. "
        "Efficiency: time of one device over that of the row."
    )
    table = Table("Steps on more and more devices", note, _rows(timings, config.steps))
    print(to_markdown(table))
    return table


def _runs(config: Config, states: list[TrainState]) -> Callable[[], Any]:
    """One run per device."""
    width, size = len(states), config.batch_size
    training, data = _training(config, size)
    program = train.make_program(training, train.make_mesh(1, width))
    indices = jnp.broadcast_to(jnp.arange(size), (config.steps, width, size))
    group = (train.stack_runs(states), train.stack_runs([data] * width))
    return stateful(program.run, *group, indices)


def _batch(config: Config, state: TrainState, width: int) -> Callable[[], Any]:
    """One run, whose batch grows with the devices."""
    size = config.batch_size * width
    training, data = _training(config, size)
    program = train.make_program(training, train.make_mesh(width))
    indices = jnp.broadcast_to(jnp.arange(size), (config.steps, size))
    return stateful(program.run, state, data, indices)


def _rows(timings: Mapping[str, Timing], steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, timing in timings.items():
        what, width = name.split()
        row = {
            "what grows": what,
            "devices": int(width),
            "ms per step": f"{1e3 * timing.wall / steps:.2f}",
            "efficiency": f"{timings[f'{what} 1'].wall / timing.wall:.2f}",
            "best of these cores": f"{min(1.0, num_cores() / int(width)):.2f}",
        }
        rows.append(row)
    return rows


def _training(config: Config, batch_size: int) -> tuple[Training, Data]:
    data = random_data(batch_size, IMAGE)
    dense = endless(config.model, data, batch_size)
    return under_rigl(dense, 0.9, interval=config.steps), data


if __name__ == "__main__":
    cli.main(run, Config)
