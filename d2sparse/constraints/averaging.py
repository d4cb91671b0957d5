"""The average of the weights over the end of a training."""

from typing import Any

import jax
import optax

from d2sparse.train import (
    Constraint,
    Data,
    Program,
    Progress,
    Settings,
    Training,
    TrainState,
)
from d2sparse.transforms import average_weights, get_average


def averaged(tail: float = 0.25) -> Constraint:
    """The average of the weights over the last part of a training is what counts.

    Statistics of normalisations are taken anew for it (Izmailov et al.,
    arXiv 1803.05407). It needs a learning rate that does not fall to 0.

    Args:
      tail: part of the training that is averaged, in (0, 1].

    Raises:
      ValueError: the tail is out of its range.
    """
    if not 0 < tail <= 1:
        raise ValueError(f"expected a tail in (0, 1], got {tail}")

    def constrained(training: Training) -> Training:
        begin = training.horizon - max(round(tail * training.horizon), 1)

        def transform(
            rate: optax.Schedule, settings: Settings, key: Any
        ) -> optax.GradientTransformation:
            return average_weights(training.transform(rate, settings, key), begin)

        def finish(progress: Progress, data: Data, program: Program) -> TrainState:
            state = training.finish(progress, data, program)
            known = not isinstance(state.step, jax.core.Tracer)
            if known and int(state.step) <= begin:
                return state  # The average begins with the weights after that step.
            params = get_average(state.opt_state)
            statistics = program.statistics(params, state.model_state, data, state.key)
            return state._replace(params=params, model_state=statistics)

        return training._replace(transform=transform, finish=finish)

    return constrained
