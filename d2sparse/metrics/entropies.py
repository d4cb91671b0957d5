"""Entropy of ON/OFF states: how undecided rectified units are, which layers are linear.

A layer whose units are always ON or always OFF is linear on the data, which the entropy
of the states tells,

    H_i = -p_i log2 p_i - (1 - p_i) log2(1 - p_i),    p_i = P(z_i > 0),

in bits: 0 for a unit that never changes its state, 1 for one that is ON half the time.
The conventions of the papers are arguments here and in `metrics.count_states`:

| paper | `zero` | `varying_only` | `pool` |
| --- | --- | --- | --- |
| EGP, arXiv 2308.06619 | "off" | True | "channel" |
| NEPENTHE, arXiv 2404.16890 | "ignored" | True | "channel" |
| EASIER, arXiv 2404.18949 | "on" | False | "channel" |
| PSP-entropy, arXiv 2004.14765 | "off" | | "unit", by class |
"""

import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.checks import check_choice
from d2sparse.metrics.states import StateCounts

Zero = Literal["off", "on", "ignored"]


def unit_entropies(
    counts: Mapping[str, StateCounts], *, zero: Zero = "off"
) -> dict[str, jax.Array]:
    """Entropy of the state of every unit, in bits.

    Args:
      counts: by layer, from `count_states`.
      zero: what z = 0 is: "off", as a rectifier has it; "on"; or "ignored", and then a
        unit that was never anything else has entropy 0.

    Returns:
      By layer, `float32[...]` of the shape of the counts; NaN for a unit that was never
      counted, or more than 2^31 - 1 times.

    Raises:
      ValueError: another `zero`.

    >>> counts = StateCounts(*jnp.array([[1, 4], [1, 0], [2, 0]]))  # Of two units.
    >>> print(unit_entropies({"dense1": counts})["dense1"].round(4))
    [0.8113 0.    ]
    >>> unit_entropies({"dense1": counts}, zero="on")["dense1"].tolist()
    [1.0, 0.0]
    """
    check_choice("zero", zero, ("off", "on", "ignored"))
    return {layer: _entropies(StateCounts(*own), zero) for layer, own in counts.items()}


def layer_entropy(
    counts: Mapping[str, StateCounts], *, zero: Zero = "off", varying_only: bool = True
) -> dict[str, jax.Array]:
    """Mean entropy of the units of every layer, in bits.

    Args:
      counts: by layer, from `count_states`.
      zero: as in `unit_entropies`.
      varying_only: the mean is over units that were in both states, and 0 where there
        are none; otherwise over all units.

    Returns:
      By layer, a scalar; NaN if a unit has NaN.

    Raises:
      ValueError: another `zero`.

    >>> counts = StateCounts(*jnp.array([[2, 4], [0, 0], [2, 0]]))  # Of two units.
    >>> float(layer_entropy({"dense1": counts})["dense1"])
    1.0
    >>> float(layer_entropy({"dense1": counts}, varying_only=False)["dense1"])
    0.5
    """
    units = unit_entropies(counts, zero=zero)

    def mean(entropies: jax.Array) -> jax.Array:
        number = jnp.sum(entropies > 0) if varying_only else entropies.size
        return jnp.sum(entropies) / jnp.maximum(number, 1)

    return {layer: mean(entropies) for layer, entropies in units.items()}


def psp_entropy(
    counts: Mapping[str, StateCounts], *, zero: Zero = "off"
) -> dict[str, jax.Array]:
    """Entropy of the state of every unit among the samples of each class, in bits.

    The entropy of post-synaptic potentials (Tartaglione et al., arXiv 2004.14765): low
    where the class determines the state. Their `H_i` of a unit is the sum over classes,
    in [0, classes]. Their code keeps p in [1e-4, 1 - 1e-4], so that no entropy is 0;
    here it is.

    Args:
      counts: by layer, from `count_states_by_class`.
      zero: as in `unit_entropies`.

    Returns:
      By layer, `float32[..., classes]`, NaN for a class without samples.

    Raises:
      ValueError: another `zero`.

    >>> from d2sparse.metrics import count_states_by_class
    >>> z = {"dense1": jnp.array([[-1.0], [1.0], [2.0], [3.0]])}
    >>> counts = count_states_by_class(None, z, jnp.array([0, 0, 1, 1]), classes=2)
    >>> psp_entropy(counts)["dense1"].tolist()
    [[1.0, 0.0]]
    """
    return unit_entropies(counts, zero=zero)


def gaussian_off_probability(scale: jax.Array, bias: jax.Array) -> jax.Array:
    """How often a normalised unit is OFF if it is Gaussian, without data.

    `P(z <= 0) = Phi(-bias / |scale|)` for z of mean `bias` and deviation `|scale|`,
    which are the parameters of a batch normalisation in front of a rectifier (TLC,
    arXiv 2412.15077); a scale of 0 gives 1 where `bias <= 0` and else 0. After other
    normalisations give deviations and means that were measured on data.

    Args:
      scale: `float[...]`, of either sign.
      bias: of the same shape.

    Returns:
      Of the same shape.

    >>> gaussian_off_probability(jnp.array([-2.0, 0.0]), jnp.array([0.0, 1.0])).tolist()
    [0.5, 0.0]
    """
    return jax.scipy.special.ndtr(-_standardised(scale, bias))


def gaussian_layer_entropy(scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Mean entropy over a layer of states that are Gaussian, in bits, without data.

    Args:
      scale: `float[channels]`, as in `gaussian_off_probability`.
      bias: of the same shape.

    Returns:
      A scalar, the mean over all channels.

    >>> float(gaussian_layer_entropy(jnp.array([3.0, 0.0]), jnp.zeros(2)))
    0.5
    """
    return _gaussian_layer_entropy(scale, bias)


@jax.jit
def _gaussian_layer_entropy(scale: jax.Array, bias: jax.Array) -> jax.Array:
    ratio = _standardised(scale, bias)
    tails = jax.scipy.special.ndtr(ratio), jax.scipy.special.ndtr(-ratio)
    return jnp.mean(_entropy(*tails))


def _standardised(scale: jax.Array, bias: jax.Array) -> jax.Array:
    fixed = scale == 0
    always = jnp.where(bias > 0, jnp.inf, -jnp.inf)
    return jnp.where(fixed, always, bias / jnp.where(fixed, 1, jnp.abs(scale)))


def _entropy(on: jax.Array, off: jax.Array) -> jax.Array:
    """Bits of a state of two probabilities, which sum to 1."""
    # Of the smaller one, as given: 1 - p of the larger has lost its digits.
    p = jnp.minimum(on, off)
    nats = jax.scipy.special.entr(p) - (1 - p) * jnp.log1p(-p)
    return nats / np.float32(np.log(2))


@functools.partial(jax.jit, static_argnames="zero")
def _entropies(counts: StateCounts, zero: Zero) -> jax.Array:
    lost = jnp.min(jnp.stack(counts), axis=0) < 0
    positive, zeros, negative = (count.astype(jnp.float32) for count in counts)
    on = positive + zeros if zero == "on" else positive
    off = negative + zeros if zero == "off" else negative
    number = jnp.maximum(on + off, 1)
    never = positive + zeros + negative == 0
    return jnp.where(lost | never, jnp.nan, _entropy(on / number, off / number))
