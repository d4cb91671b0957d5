"""Many runs in one program: their states stacked, their step shared."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from d2sparse.train.state import TrainState

# Where the axis of the runs is in a stacked state. The step is one for all: what
# depends on it alone, such as a refresh, stays a branch under `jax.vmap`.
_AXES: Any = dict.fromkeys(TrainState._fields, 0) | {"step": None}
RUNS = TrainState(**_AXES)


def stack_runs(runs: Sequence[Any]) -> Any:
    """States, or data sets, of several runs in one, with a leading axis for the runs.

    Args:
      runs: of one structure and shape, states at one step.

    Raises:
      ValueError: states stand at different steps.
    """
    stacked = jax.tree.map(lambda *leaves: _stack(leaves), *runs)
    if not isinstance(stacked, TrainState):
        return stacked
    steps = {int(run.step) for run in runs}
    if len(steps) > 1:
        raise ValueError(
            f"expected runs at one step, got runs at steps {sorted(steps)}; train "
            "those that are behind first"
        )
    return stacked._replace(step=jnp.copy(runs[0].step))


def unstack_runs(state: TrainState) -> list[TrainState]:
    """The states of the single runs, as copies."""
    return [_pick(state, number) for number in range(len(state.key))]


# A program for every shape of a leaf: one of all leaves of many runs, with thousands of
# arguments, takes far longer to compile.
@jax.jit
def _stack(leaves: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.stack(leaves)


@jax.jit
def _pick(state: TrainState, number: int) -> TrainState:
    own = jax.tree.map(lambda leaf: leaf[number], state[1:])
    return TrainState(jnp.copy(state.step), *own)


def is_stacked(state: TrainState) -> bool:
    """Whether a state holds several runs."""
    return state.key.ndim > 0
