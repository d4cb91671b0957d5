"""Networks that have diverged where no single update was to blame."""

from typing import Any

import jax
import numpy as np

from d2sparse.train import TrainState


def check_finite(values: Any, what: str, state: TrainState) -> None:
    """Refuses what a network says where it is infinite or NaN.

    Args:
      values: arrays, in any tree.
      what: what they are, in the plural.
      state: of the network.

    Raises:
      FloatingPointError: naming how many updates were skipped on the way there.
    """
    if all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(values)):
        return
    raise FloatingPointError(
        f"its {what} are not finite after {int(state.faults.total)} skipped updates; "
        "lower the learning rate or clip the gradient"
    )
