"""What `train.estimate_memory` expects a training to need, and what it takes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from d2sparse import train
from d2sparse.train import Data, Metrics, TrainState
from experiments.benchmark.measure import Table
from experiments.benchmark.training import (
    AT_ONCE,
    DENSE,
    SPARSE,
    large_runs,
    make_members,
    pick_members,
)
from experiments.benchmark.workload import Sizes, random_data

STEPS = 2  # Of the measured programs.
LARGE = (DENSE, SPARSE)  # How the large network is trained.


class Training(NamedTuple):
    """A run, or several in one program.

    Attributes:
      what: how they are trained.
      model: the network.
      batch: images in a step of each.
      step: of one run.
      state: of one run, or of several stacked ones.
      data: of one run.
    """

    what: str
    model: str
    batch: int
    step: train.Step
    state: TrainState
    data: Data


def memory_table(sizes: Sizes) -> Table:
    """The estimate beside what the program says and what the device has held."""
    # What the device has held is a maximum over all so far: the smallest go first.
    planned = sorted(((estimate(t), t) for t in _trainings(sizes)), key=lambda x: x[0])
    rows = []
    for expected, training in planned:
        program, held = used(training)
        row = {
            "what": training.what,
            "model": training.model,
            "batch": training.batch,
            "estimate": expected / 2**20,
            "program": program / 2**20,
            "relative": expected / program,
        }
        rows.append(row | ({} if held is None else {"held": held / 2**20}))
    return Table(
        "Memory of a training",
        "In MiB. Estimate: `train.estimate_memory`, times the runs. Program: "
        "arguments, results and temporaries of what was compiled. Held: the most that "
        "was in use on the device while it was compiled and run; empty where the "
        "device does not say, or has held more before. Relative: the estimate to the "
        "program.",
        {
            "what": "training",
            "model": "model",
            "batch": "images of each",
            "estimate": "estimate",
            "program": "program",
            "held": "held",
            "relative": "relative",
        },
        rows,
    )


def _trainings(sizes: Sizes) -> Iterator[Training]:
    for model, image in sizes.members:
        data = random_data(4 * sizes.member_batch, image)
        step, states = make_members(model, data, max(sizes.seeds), sizes)
        for n in sorted({*sizes.seeds[:1], *sizes.seeds[-1:]}):
            some, what = pick_members(states, slice(n)), AT_ONCE.format(n)
            yield Training(what, model, sizes.member_batch, step, some, data)
    data = random_data(sizes.batch, sizes.image)
    large = large_runs(data, sizes)
    for what in LARGE:
        step, state = large[what]
        yield Training(what, sizes.models[0], sizes.batch, step, state, data)


def estimate(training: Training) -> int:
    """Bytes that all runs are expected to need."""
    state, runs = training.state, 1
    if train.is_stacked(state):
        state, runs = pick_members(state, 0), len(state.key)
    run = _scanned(train.guard(training.step))
    return runs * train.estimate_memory(run, state, training.data, training.batch)


def used(training: Training) -> tuple[int, int | None]:
    """Bytes of the compiled program, and the most that the device has held for it."""
    before = _device_memory()
    step, data = train.guard(training.step), training.data
    rows = jnp.arange(training.batch, dtype=jnp.int32) % len(data.labels)
    rows = jnp.broadcast_to(rows, (STEPS, training.batch))
    if train.is_stacked(training.state):
        runs = len(training.state.key)
        step = jax.vmap(step, in_axes=(train.RUNS, 0, 0), out_axes=(train.RUNS, 0))
        data = train.stack_runs([data] * runs)
        rows = jnp.stack([rows] * runs, axis=1)
    state = jax.tree.map(jnp.copy, training.state)
    run = jax.jit(_scanned(step), donate_argnums=0)
    compiled = run.lower(state, data, rows).compile()
    jax.block_until_ready(compiled(state, data, rows))
    after, memory = _device_memory(), compiled.memory_analysis()
    grown = after.get("peak_bytes_in_use", 0) > before.get("peak_bytes_in_use", 0)
    program = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    held = after["peak_bytes_in_use"] - before["bytes_in_use"] if grown else None
    return program, held


def _scanned(step: train.Step) -> Any:
    """The runner that `train.make_runner` makes on an accelerator, not compiled yet."""

    def run(
        state: TrainState, data: Data, indices: jax.Array
    ) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda s, row: step(s, data, row), state, indices)

    return run


def _device_memory() -> dict[str, int]:
    return jax.devices()[0].memory_stats() or {}
