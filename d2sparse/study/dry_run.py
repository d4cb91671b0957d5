"""What a comparison would do: its runs, their size, their cost, their time."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import records, train, tree
from d2sparse.checks import optional
from d2sparse.constraints import StreamOptions
from d2sparse.study.flags import Config
from d2sparse.study.grid import Plan
from d2sparse.study.splits import DrawSplits
from d2sparse.train import Data, Program, Progress

with optional(__name__):
    from rich.console import Console

_STEPS = 5  # That are timed.
_TITLES = {
    "name": "row",
    "runs": "runs",
    "steps": "steps",
    "parameters": "parameters",
    "nonzeros": "non-zeros at first",
    "macs": "MACs",
    "memory": "memory",
    "time": "time",
}


def print_plans(
    config: Config, plans: Sequence[Plan], draw_splits: DrawSplits
) -> list[dict[str, Any]]:
    """Prints what would be trained, and returns the rows.

    MACs are those of the masks at the first step, as a part of the dense network's
    training. Time is that of compiling, and of a few steps, with one run after another.
    """
    rows, cells = [], []
    for plan in plans:
        row = _describe(config, plan, draw_splits(plan.config, 0).train)
        rows.append(row)
        cells.append(
            {
                "name": row["name"],
                "runs": str(row["runs"]),
                "steps": f"{row['steps']:,}",
                "parameters": f"{row['parameters']:,}",
                "nonzeros": f"{row['nonzeros']:,}",
                "macs": f"{row['macs']:.2f}",
                "memory": f"{row['memory'] / 2**20:,.1f} MiB",
                "time": _duration(row["seconds"]),
            }
        )
    total = sum(row["seconds"] for row in rows)
    runs = sum(row["runs"] for row in rows)
    table = records.markdown_table(cells, _TITLES)
    Console(soft_wrap=True).print(
        f"{table}\n\n{runs} runs, about {_duration(total)}. Nothing has been written.",
        highlight=False,
    )
    return rows


def _describe(config: Config, plan: Plan, data: Data) -> dict[str, Any]:
    program = plan.program
    progress = program.init(jax.random.key(0), data, plan.training.settings)
    first = program.of(0)
    masks = jax.device_get(first.training.masks(progress.state))
    steps = _count_steps(plan)
    batch = plan.config.batch_size
    memory = train.estimate_memory(_one_step(first), progress.state, data, batch)
    size = tree.size(progress.state.params)
    macs = _mean_cost(first, progress, data) * steps / plan.dense_training_macs
    compiling, each = _time_steps(first, progress, data)
    return {
        "name": plan.row.name,
        "runs": config.seeds,
        "steps": steps,
        "parameters": size,
        "nonzeros": sum(int(np.sum(m)) for m in jax.tree.leaves(masks.stored)),
        "macs": macs,
        "memory": memory,
        "seconds": compiling + config.seeds * steps * each,
    }


def _one_step(program: Program) -> Any:
    """A runner of one step that can be traced on any backend."""
    step = train.make_step(program.training)
    return lambda state, data, indices: step(state, data, indices[0])


def _count_steps(plan: Plan) -> int:
    """Steps of all phases; one that rewinds begins where the one before it ended.

    On a stream none rewinds, and some are without steps.
    """
    if isinstance(plan.config, StreamOptions):
        return plan.training.horizon
    steps, last = 0, 0
    for phase in plan.training.phases:
        steps += phase.stop - last if phase.stop > last else phase.stop
        last = phase.stop
    return steps


def _mean_cost(program: Program, progress: Progress, data: Data) -> float:
    training, state = program.training, progress.state
    numbers = jnp.arange(training.horizon)
    costs = jax.lax.map(
        lambda step: jnp.float32(
            training.cost(training, state._replace(step=step), len(data.labels))
        ),
        numbers,
    )
    return float(jnp.mean(costs))


def _time_steps(
    program: Program, progress: Progress, data: Data
) -> tuple[float, float]:
    """Seconds of compiling a step, and of a step."""
    batch = min(program.training.batch_size, len(data.labels))
    rows = jnp.zeros((1, batch), jnp.int32)
    begin = time.perf_counter()
    state, _ = program.run(progress.state, data, rows)
    jax.block_until_ready(state.params)
    compiled = time.perf_counter()
    for _ in range(_STEPS):
        state, _ = program.run(state, data, rows)
    jax.block_until_ready(state.params)
    return compiled - begin, (time.perf_counter() - compiled) / _STEPS


def _duration(seconds: float) -> str:
    """Such as "40 s", "3 min" or "2.5 h".

    >>> _duration(40), _duration(200), _duration(9000)
    ('40 s', '3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
