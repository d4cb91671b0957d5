"""Non-finite values: no update that is not finite reaches a run."""

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.train.state import Data, Faults, Metrics, TrainState
from d2sparse.train.steps import Step, is_finite
from d2sparse.transforms import refreshes_are_sound
from d2sparse.tree import PyTree


def guard(step: Step) -> Step:
    """A step that keeps the state where its update would not be finite.

    An update is rejected if a metric of the step, its gradient, a batch statistic or
    an updated parameter is infinite or NaN, or a refresh of the masks has met a NaN. It
    is left out and counted. A run that does not skip faults takes no update from the
    first one on; only its step continues to count, as it does in the runs that are
    vmapped with it.

    Args:
      step: `(state, data, indices) -> (state, metrics)`. Its metrics may hold "finite",
        bool[]: whether its gradient is.

    Returns:
      The guarded step. In place of "finite" its metrics hold "skipped": 1 where there
      was no update, 0 elsewhere.
    """

    def guarded(
        state: TrainState, data: Data, indices: jax.Array
    ) -> tuple[TrainState, Metrics]:
        new, logs = step(state, data, indices)
        # Of a finite gradient the optimiser may make an update that is not.
        sound = logs.pop("finite", True) & is_finite(new.params)
        sound &= is_finite((logs, new.model_state))
        sound &= refreshes_are_sound(new.opt_state)
        going = state.faults.skip | (state.faults.total == 0)
        faults = _note(state.faults, going & ~sound, state.step)
        updated = sound & going
        # A select by what is known before the update: a branch would copy the state.
        params, model_state, opt_state = jax.tree.map(
            lambda after, before: jnp.where(updated, after, before),
            (new.params, new.model_state, new.opt_state),
            (state.params, state.model_state, state.opt_state),
        )
        kept = new._replace(
            params=params, model_state=model_state, opt_state=opt_state, faults=faults
        )
        return kept, logs | {"skipped": 1.0 - updated}

    return guarded


def check_finite(values: PyTree, what: str, state: TrainState) -> None:
    """Refuses what a trained network says where it is infinite or NaN.

    Args:
      values: arrays, in any tree.
      what: what they are, in the plural.
      state: of the network.

    Raises:
      FloatingPointError: naming how many updates were skipped in its training.
    """
    if all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(values)):
        return
    raise FloatingPointError(
        f"its {what} are not finite after {int(state.faults.total)} skipped updates; "
        "lower the learning rate or clip the gradient"
    )


def has_failed(state: TrainState) -> bool:
    """Whether a fault has stopped a run; of several runs, every one of them."""
    total, skip = np.asarray(state.faults.total), np.asarray(state.faults.skip)
    return bool(np.all((total > 0) & ~skip))


def failure(state: TrainState) -> str:
    """What to tell the user of runs that a fault has stopped."""
    return (
        f"the update of step {int(np.max(state.faults.first))} is not finite, or NaN "
        "was met at its refresh of the masks; lower the learning rate, clip the "
        "gradient, or leave such steps out with skip_faults (--on_nonfinite=skip)"
    )


def last_good(state: TrainState) -> TrainState:
    """The state before the fault that stopped a run; others as they are.

    Args:
      state: of one run, outside of compiled functions.
    """
    if not has_failed(state):
        return state
    none = jnp.zeros_like(state.faults.total)
    faults = state.faults._replace(total=none, first=none)
    return state._replace(step=jnp.copy(state.faults.first), faults=faults)


def _note(faults: Faults, found: jax.Array, step: jax.Array) -> Faults:
    is_first = found & (faults.total == 0)
    return faults._replace(
        total=faults.total + found, first=jnp.where(is_first, step, faults.first)
    )
