"""How many weights each layer loses, by the entropy of its ON/OFF states."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from d2sparse.checks import check_by_path, check_number
from d2sparse.distributions.budget import largest_remainder


def layer_budget(
    entropies: Mapping[str, float | jax.Array],
    kernels: Mapping[str, jax.Array],
    fraction: float,
    *,
    protect: Collection[str] = (),
) -> dict[str, int]:
    """How many of its live weights each layer loses, most in the least relevant.

    Entropy-guided pruning (EGP, arXiv 2308.06619) takes weights from layers whose units
    hardly change their state, until these are linear. Of the n live weights of all
    layers with `H_l > 0`, a fraction B is shared by

        I_l = H_l mean(|w| : w != 0),    R_l = sum_k I_k / I_l,
        b_l = B exp(R_l) / sum_k exp(R_k).

    The exponential is steep: mostly all of B goes to one layer. Layers that would lose
    more than they have are emptied, all such at once, and what is left of B is shared
    by the others, by their sum of I. Counts are rounded by largest remainder and sum
    to B exactly, or to all that may go where that is less.

    An emptied layer disconnects a network in which no shortcut leads around it: protect
    it, or drop the block that it is in. This runs on the host and cannot be compiled.

    Args:
      entropies: by layer, from `layer_entropy`. Layers of entropy 0 need no pruning:
        they lose nothing, and their weights do not count for B.
      kernels: by layer, `float[...]`, 0 where pruned.
      fraction: of the live weights, in [0, 1].
      protect: layers that keep at least one weight.

    Returns:
      By layer, a number of weights; the smallest of the layer are those to go.

    Raises:
      ValueError: a layer has no kernel, an entropy is not finite or negative, a
        protected layer has no entropy, or the fraction is outside of [0, 1].

    >>> kernels = {"dense1": np.ones((2, 3)), "dense2": np.ones((3, 4))}
    >>> layer_budget({"dense1": 0.1, "dense2": 0.9}, kernels, fraction=0.5)
    {'dense1': 6, 'dense2': 3}
    >>> layer_budget({"dense1": 0.1, "dense2": 0.9}, kernels, 0.5, protect=["dense1"])
    {'dense1': 5, 'dense2': 4}
    """
    check_number("fraction", fraction, 0, 1)
    bits = _checked(entropies, kernels, protect)
    sizes = {layer: np.abs(np.asarray(kernels[layer], np.float64)) for layer in bits}
    live = {layer: int(np.count_nonzero(own)) for layer, own in sizes.items()}
    chosen = [layer for layer in bits if bits[layer] > 0 and live[layer]]
    limits = np.array([live[layer] - (layer in protect) for layer in chosen], int)
    total = round(float(fraction) * sum(live[layer] for layer in chosen))
    total = min(total, int(limits.sum()))
    importance = [bits[own] * sizes[own].sum() / live[own] for own in chosen]
    ideal = _share(np.array(importance), limits, total)
    counts = largest_remainder(ideal, limits, total, np)
    return dict.fromkeys(bits, 0) | dict(zip(chosen, counts.tolist(), strict=True))


def _share(importance: np.ndarray, limits: np.ndarray, total: int) -> np.ndarray:
    """Shares of the total, float[layers], of which none exceeds its limit."""
    shares = np.zeros(len(limits))
    open_ = np.ones(len(limits), bool)
    while open_.any():
        relevance = importance[open_].sum() / importance[open_]
        weight = np.exp(relevance - relevance.max())
        rest = total - limits[~open_].sum()
        shares[open_] = rest * weight / weight.sum()
        too_much = shares > limits
        if not too_much.any():
            break
        shares[too_much] = limits[too_much]
        open_ &= ~too_much
    return shares


def _checked(
    entropies: Mapping[str, Any], kernels: Mapping[str, Any], protect: Collection[str]
) -> dict[str, float]:
    check_by_path("entropies", entropies, of="entropies")
    check_by_path("kernels", kernels, of="arrays")
    missing, unknown = set(entropies) - set(kernels), set(protect) - set(entropies)
    if missing or unknown or isinstance(protect, str):
        raise ValueError(
            f"expected a kernel for each of {sorted(entropies)} and protected layers "
            f"among them, got no kernel for {sorted(missing)} and {protect!r} to "
            "protect; name layers as in `entropies`"
        )
    bits = {layer: float(value) for layer, value in entropies.items()}
    wrong = {path: h for path, h in bits.items() if not 0 <= h < math.inf}
    if wrong:
        raise ValueError(
            f"expected finite entropies of at least 0, got {wrong}; NaN tells of units "
            "that were never counted"
        )
    return bits
