"""What belongs to two learners: a container and a budget."""

from typing import Any, NamedTuple


class Dual(NamedTuple):
    """Something of the fast learner and the same of the slow learner."""

    fast: Any
    slow: Any


def split_sparsity(size: int, sparsity: float, share: float = 0.5) -> Dual:
    """Sparsities of the two learners that together keep one network's budget.

    `k = round((1 - sparsity) * size)` weights are kept in all, `round(share * k)` of
    them by the fast learner.

    Args:
      size: number of prunable weights of one network.
      sparsity: fraction of zeros of one network of the same budget, in [0, 1).
      share: the fast learner's part of the budget, in (0, 1).

    Raises:
      ValueError: the sparsity or the share is outside of its range, or one learner
        would have no weights.

    >>> split_sparsity(1000, 0.8)
    Dual(fast=0.9, slow=0.9)
    """
    if not 0 <= sparsity < 1 or not 0 < share < 1:
        raise ValueError(
            "expected a sparsity in [0, 1) and a share in (0, 1), got "
            f"sparsity={sparsity}, share={share}"
        )
    total = round((1 - sparsity) * size)
    fast = round(share * total)
    if not 0 < fast < total:
        raise ValueError(
            f"expected a budget that leaves both learners weights, got {total} for "
            f"both and {fast} for the fast one; lower the sparsity {sparsity} or take "
            "a wider network"
        )
    return Dual(1 - fast / size, 1 - (total - fast) / size)
