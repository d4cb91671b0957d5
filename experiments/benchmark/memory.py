"""The memory of a training: the estimate, the compiled program, and the device."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from d2sparse import train
from d2sparse.train import Data, Metrics, Training, TrainState
from d2sparse.train.program import make_step
from experiments.benchmark.tables import Table
from experiments.benchmark.training import (
    AT_ONCE,
    DENSE,
    SPARSE,
    large_runs,
    make_members,
)
from experiments.benchmark.workload import Sizes, random_data

STEPS = 2  # Of the measured programs.
LARGE = (DENSE, SPARSE)  # How the large network is trained.


class Case(NamedTuple):
    """A training whose memory is measured.

    Attributes:
      name: in the table.
      model: the network.
      training: of one run.
      state: of one run, or of several stacked ones.
      data: of one run.
    """

    name: str
    model: str
    training: Training
    state: TrainState
    data: Data


def memory_table(sizes: Sizes) -> Table:
    """The estimate beside what the program says and the peak of the device."""
    # The device reports its peak since the start: the smallest trainings go first.
    cases = sorted(((estimate(c), c) for c in _cases(sizes)), key=lambda pair: pair[0])
    rows = []
    for expected, case in cases:
        program, held = measured(case)
        row = {
            "training": case.name,
            "model": case.model,
            "images of each": case.training.batch_size,
            "estimate": expected / 2**20,
            "program": program / 2**20,
            "held": "" if held is None else held / 2**20,
            "relative": expected / program,
        }
        rows.append(row)
    return Table(
        "Memory of a training",
        "In MiB. Estimate: `train.estimate_memory`, times the runs. Program: "
        "arguments, results and temporaries of what was compiled. Held: the most that "
        "was in use on the device while it was compiled and run; empty where the "
        "device does not say, or has held more before. Relative: the estimate to the "
        "program.",
        rows,
    )


def _cases(sizes: Sizes) -> Iterator[Case]:
    for model, image in sizes.members:
        program, states, data = make_members(model, image, sizes)
        for n in sorted({sizes.seeds[0], sizes.seeds[-1]}):
            state = train.stack_runs(states[:n])
            yield Case(AT_ONCE.format(n), model, program.training, state, data)
    data = random_data(sizes.batch, sizes.image)
    runs = large_runs(data, sizes)
    for name in LARGE:
        program, state = runs[name]
        yield Case(name, sizes.models[0], program.training, state, data)


def estimate(case: Case) -> int:
    """Bytes that all runs are expected to need."""
    state, runs = case.state, 1
    if train.is_stacked(state):
        runs = len(state.key)
        stacked = state._replace(step=state.step[None])
        state = jax.eval_shape(lambda s: jax.tree.map(lambda x: x[0], s), stacked)
    run = _scanned(train.guard(make_step(case.training)))
    return runs * train.estimate_memory(run, state, case.data, case.training.batch_size)


def measured(case: Case) -> tuple[int, int | None]:
    """Bytes of the compiled program, and the peak of the device, if it is known."""
    before = _device_memory()
    step, data, batch = make_step(case.training), case.data, case.training.batch_size
    step = train.guard(step)
    indices = jnp.arange(batch, dtype=jnp.int32) % len(data.labels)
    indices = jnp.broadcast_to(indices, (STEPS, batch))
    if train.is_stacked(case.state):
        runs = len(case.state.key)
        step = jax.vmap(step, in_axes=(train.RUNS, 0, 0), out_axes=(train.RUNS, 0))
        data = train.stack_runs([data] * runs)
        indices = jnp.stack([indices] * runs, axis=1)
    state = jax.tree.map(jnp.copy, case.state)
    run = jax.jit(_scanned(step), donate_argnums=0)
    compiled = run.lower(state, data, indices).compile()
    jax.block_until_ready(compiled(state, data, indices))
    after, memory = _device_memory(), compiled.memory_analysis()
    program = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    peak = after.get("peak_bytes_in_use", 0)
    is_new = peak > before.get("peak_bytes_in_use", 0)
    return program, peak - before["bytes_in_use"] if is_new else None


def _scanned(step: train.Step) -> Any:
    """Steps as an accelerator takes them, in one scan, not compiled yet."""

    def run(
        state: TrainState, data: Data, indices: jax.Array
    ) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda s, row: step(s, data, row), state, indices)

    return run


def _device_memory() -> dict[str, int]:
    return jax.devices()[0].memory_stats() or {}
