"""Scales of quantised networks that are found when a training begins, or trained on.

They are in the model state, as `Calibrated`. A scale that is trained is the one found
times a factor: a parameter beside the kernel, `input_scale` or `kernel_scale`, which
begins at 1.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from d2sparse import tree
from d2sparse.models import Model
from d2sparse.models.kernel_order import input_bits, layer_of, layers_of
from d2sparse.models.quantised import (
    Calibrated,
    unit_scales,
    with_dynamic_scales,
    with_inputs,
)
from d2sparse.models.taps import read
from d2sparse.quantisation import (
    Per,
    ScaleName,
    Statistics,
    calibration,
    edge_bits,
    fake_quantise,
    learned,
    observe,
    quantise_weights,
    scales,
    share_bits,
    survivors,
)
from d2sparse.train import Data, Network, Training, TrainState, take
from d2sparse.tree import PyTree

InputScales = Literal["dynamic", "calibrated", "learned"]

_EXAMPLES = 512  # That inputs are calibrated on, at most.
_LEAST = 1 / 64  # Of a factor: a scale of 0 would silence its layer.


class Precision(NamedTuple):
    """How a network is quantised: the arguments of `quantised`.

    Attributes:
      bits: of kernels.
      activation_bits: of the inputs of layers; 0 for floats.
      per: one scale of weights an output "channel" or one a "tensor".
      scale: of weights; "lsq" is trained.
      edges: bits of the first and the last layer.
      inputs: scales of inputs.
    """

    bits: int
    activation_bits: int
    per: Per
    scale: ScaleName
    edges: int
    inputs: InputScales

    @property
    def finds_inputs(self) -> bool:
        """Whether scales of inputs are found when the training begins."""
        return bool(self.activation_bits) and self.inputs != "dynamic"

    @property
    def trains_inputs(self) -> bool:
        """Whether scales of inputs are trained."""
        return self.finds_inputs and self.inputs == "learned"

    @property
    def trains_kernels(self) -> bool:
        """Whether scales of kernels are trained."""
        return self.scale == "lsq"


def with_found_scales(model: Model, how: Precision) -> Model:
    """A quantised network whose model state is `Calibrated`.

    Scales are 1 until `find_scales` finds them. Where the model state has None in their
    place, `apply` finds them on its batch and returns them.

    Args:
      model: the network, with its parameters in dicts where scales are trained.
      how: it is quantised.
    """

    def init(key: jax.Array, x: Any) -> tuple[PyTree, Calibrated]:
        params, own = model.init(key, x)
        ones, signed = unit_scales(params if how.finds_inputs else {})
        starts = {}
        if how.trains_kernels:
            leaves = tree.prunable_leaves(params)
            starts = {path: _ones(leaf, how) for path, leaf in leaves.items()}
        return with_factors(params, how), Calibrated(own, ones, signed, starts)

    def apply(
        params: PyTree, model_state: Calibrated, x: Any, *, train: bool
    ) -> tuple[Any, Calibrated]:
        weights, factors = without_factors(params, how), tree.flatten(params)
        layers = layers_of(model.apply, weights, model_state.own, x, train=train)
        state = model_state
        if state.scales is None:
            state = _found(model, weights, state.own, x, layers, how)

        def trained(path: str, bits: int) -> jax.Array:
            size = survivors(leaves[path], how.per)
            return _trained(
                state.kernels[path], factors[f"{path}_scale"], size, bits, True
            )

        leaves = tree.flatten(weights)
        coarse = _coarse(weights, trained, layers, how)
        inner = _with_inputs(model.apply, state, factors, layers, how)
        outputs, own = inner(coarse, state.own, x, train=train)
        return outputs, state._replace(own=own)

    return Model(init, apply)


def with_factors(params: PyTree, how: Precision) -> PyTree:
    """Parameters with the scales that are trained, as factors of 1.

    Args:
      params: in dicts.
      how: the network is quantised.

    >>> how = Precision(4, 8, "channel", "lsq", 8, "learned")
    >>> params = with_factors({"head": {"kernel": jnp.ones((2, 3))}}, how)
    >>> {path: leaf.shape for path, leaf in tree.flatten(params).items()}
    {'head/input_scale': (), 'head/kernel': (2, 3), 'head/kernel_scale': (3,)}
    """
    rounded = set(tree.prunable_leaves(params)) if how.trains_kernels else ()

    def added(node: PyTree, place: str = "") -> PyTree:
        if not isinstance(node, Mapping):
            return node
        inside = {name: added(own, f"{place}{name}/") for name, own in node.items()}
        if how.trains_inputs and "kernel" in node:
            inside["input_scale"] = jnp.ones(())
        for name in node:
            if place + name in rounded:
                # Without axes to spare, which would make it a kernel by its name.
                inside[f"{name}_scale"] = jnp.squeeze(_ones(node[name], how))
        return inside

    return added(params)


def without_factors(params: PyTree, how: Precision) -> PyTree:
    """Parameters without the scales that are trained: those of the network.

    Args:
      params: from `with_factors`.
      how: the network is quantised.

    >>> how = Precision(4, 8, "channel", "absmax", 8, "learned")
    >>> without_factors({"kernel": 1, "input_scale": 2, "logit_scale": 3}, how)
    {'kernel': 1, 'logit_scale': 3}
    """
    if not isinstance(params, Mapping):
        return params
    factors = {f"{name}_scale" for name in params} if how.trains_kernels else set()
    if how.trains_inputs and "kernel" in params:
        factors.add("input_scale")
    kept = {name: own for name, own in params.items() if name not in factors}
    return {name: without_factors(own, how) for name, own in kept.items()}


def describe_factors(network: Network, how: Precision) -> Network:
    """What is known of a network that has trained scales beside its kernels."""
    params = jax.eval_shape(lambda own: with_factors(own, how), network.params)
    own, prunable = set(tree.flatten(network.params)), network.prunable
    return Network(
        params,
        {path: network.macs.get(path, 0) for path in tree.flatten(params)},
        lambda path, leaf: path in own and prunable(path, leaf),
        network.outputs,
    )


def find_scales(training: Training, state: TrainState, data: Data) -> TrainState:
    """The state with the scales of its weights and of what it sees in evaluation.

    Args:
      training: as a whole, whose model and inputs these are.
      state: at step 0, its pruned weights at 0.
      data: training data, of which up to 512 examples are looked at.

    Returns:
      The state; the one that was given where there are no scales to be found.
    """
    nodes = jax.tree.leaves(state.model_state, is_leaf=_is_calibrated)
    if not any(map(_is_calibrated, nodes)):
        return state
    apply, inputs = training.model.apply, training.inputs
    found = _find(apply, inputs, state.params, state.model_state, data, state.key)
    return state._replace(model_state=found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _find(
    apply: Any,
    inputs: Any,
    params: PyTree,
    model_state: PyTree,
    data: Data,
    key: jax.Array,
) -> PyTree:
    """The model state with the scales of some examples."""

    def hollow(node: Any) -> Any:
        if not _is_calibrated(node):
            return node
        return node._replace(scales=None, signed=None, kernels=None)

    def chosen(node: Any, after: Any) -> Any:
        # Networks that are not applied yet, such as teachers, come back hollow.
        unseen = not _is_calibrated(node) or after.scales is None
        return node if unseen else after._replace(own=node.own)

    # Drawn, as data may lie in the order of their classes.
    drawn = jax.random.permutation(jax.random.fold_in(key, 1), len(data.labels))
    x = inputs(take(data, drawn[:_EXAMPLES]), None)
    empty = jax.tree.map(hollow, model_state, is_leaf=_is_calibrated)
    _, seen = apply(params, empty, x, train=False)
    return jax.tree.map(chosen, model_state, seen, is_leaf=_is_calibrated)


def _found(
    model: Model,
    weights: PyTree,
    own: PyTree,
    x: Any,
    layers: Mapping[str, str],
    how: Precision,
) -> Calibrated:
    """Scales of the weights, and of the inputs that layers then have on a batch."""
    starts = {}
    if how.trains_kernels:
        leaves = tree.prunable_leaves(weights)
        starts = {
            path: _positive(scales.lsq(leaves[path], bits, how.per))
            for path, bits in _kernel_bits(weights, layers, how).items()
        }
    if not how.finds_inputs:
        return Calibrated(own, {}, {}, starts)
    coarse = _coarse(weights, lambda path, bits: starts[path], layers, how)
    _, taps = read(model.apply, list(layers))(coarse, own, x, train=False)
    seen = {layer: observe(tap.input) for layer, tap in taps.items()}
    found, signed = unit_scales(weights)
    bits_of = input_bits(layers, how.activation_bits, how.edges)
    for layer, scale in _input_scales(seen, bits_of, how).items():
        found[layer_of(layers[layer])] = scale
        signed[layer_of(layers[layer])] = seen[layer].smallest < 0
    return Calibrated(own, found, signed, starts)


def _input_scales(
    seen: Mapping[str, Statistics], bits_of: Mapping[str, int], how: Precision
) -> dict[str, jax.Array]:
    """Scales of inputs; layers of as many bits are fitted side by side."""
    fitted = calibration.lsq if how.trains_inputs else calibration.mse
    found: dict[str, jax.Array] = {}
    for bits in sorted(set(bits_of.values())):
        layers = [layer for layer, own in bits_of.items() if own == bits]
        stacked = jax.tree.map(
            lambda *all_: jnp.stack(all_), *(seen[n] for n in layers)
        )

        def fit(own: Statistics, bits: int = bits) -> jax.Array:
            return _positive(fitted(own, bits, own.smallest < 0))

        found |= dict(zip(layers, jax.vmap(fit)(stacked), strict=True))
    return found


def _coarse(
    weights: PyTree,
    scale_of: Callable[[str, int], jax.Array],
    layers: Mapping[str, str],
    how: Precision,
) -> PyTree:
    """The weights that the network sees, by the scales of those that are trained."""
    table = _kernel_bits(weights, layers, how)
    if not how.trains_kernels:
        return quantise_weights(weights, table, how.per, how.scale)
    leaves = tree.prunable_leaves(weights)
    own = {p: fake_quantise(leaves[p], scale_of(p, n), n) for p, n in table.items()}
    return tree.replace(weights, own)


def _with_inputs(
    apply: Callable[..., Any],
    state: Calibrated,
    factors: Mapping[str, jax.Array],
    layers: Mapping[str, str],
    how: Precision,
) -> Callable[..., Any]:
    """The function with rounded inputs of layers."""
    if not how.activation_bits:
        return apply
    if not how.finds_inputs:
        order = list(layers.values())
        table = edge_bits(order, how.activation_bits, how.edges)
        return with_dynamic_scales(apply, table)

    def rounded(x: jax.Array, layer: str, bits: int) -> jax.Array:
        scale, signed = state.scales[layer], state.signed[layer]
        if how.trains_inputs:
            factor, size = factors[f"{layer}/input_scale"], math.prod(x.shape[1:])
            scale = _trained(scale, factor, size, bits, signed)
        return fake_quantise(x, scale, bits, signed)

    bits_of = input_bits(layers, how.activation_bits, how.edges)
    return with_inputs(apply, rounded, layers, bits_of)


def _trained(
    found: jax.Array,
    factor: jax.Array,
    size: int | jax.Array,
    bits: int,
    signed: bool | jax.Array,
) -> jax.Array:
    """A scale of LSQ, with the steps it would have if it were trained itself.

    Steps of a factor f are divided by the scale s that was found, `ds = s df`: a step
    of gradient descent then moves the scale by its own gradient, times that of
    `learned`.
    """
    factor = jnp.reshape(factor, found.shape)
    fixed = jax.lax.stop_gradient(factor)
    scale = found * jnp.maximum(fixed, _LEAST) + (factor - fixed) / found
    return learned(scale, size, bits, signed)


def _kernel_bits(
    weights: PyTree, layers: Mapping[str, str], how: Precision
) -> dict[str, int]:
    table = edge_bits(list(layers.values()), how.bits, how.edges)
    return share_bits(table, tree.prunable_leaves(weights))


def _ones(kernel: jax.Array, how: Precision) -> jax.Array:
    """Scales of a kernel, of 1."""
    return jnp.ones_like(survivors(kernel, how.per))


def _positive(scale: jax.Array) -> jax.Array:
    """Scales of pruned channels are the largest of the others, as they may regrow."""
    largest = jnp.max(scale)
    return jnp.where(scale > 0, scale, jnp.where(largest > 0, largest, 1.0))


def _is_calibrated(node: Any) -> bool:
    return isinstance(node, Calibrated)
