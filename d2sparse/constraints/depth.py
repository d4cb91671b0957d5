"""Fewer layers: activation functions that hardly do anything are made linear.

After every whole training an activation function is replaced by the identity, by a gate
in the model state, and the network trains again with its weights as they are. Two
linear layers with nothing between them can then be merged, see `d2sparse.surgery`; what
a constraint here saves is not counted before that. Measurements count the activation
functions that are left. One is always left.

Put these constraints last: the phases of those before them come first.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import metrics, rules, tree
from d2sparse.checks import check_choice, check_number, check_whole
from d2sparse.constraints.gating import (
    Changed,
    changed_gates,
    count_states_on,
    entropies_of,
    in_rounds,
    layers_of,
    with_gates,
)
from d2sparse.constraints.masked import under_masks
from d2sparse.masks import dense_masks
from d2sparse.metrics import StateCounts
from d2sparse.models.gates import (
    Gates,
    Layers,
    get_gates,
    leaf_of,
    linearised,
    remaining,
)
from d2sparse.train import (
    Constraint,
    Data,
    Program,
    Progress,
    Training,
    TrainState,
    take,
)
from d2sparse.transforms import get_masks
from d2sparse.tree import PyTree

Order = Literal["lowest", "highest", "random"]
States = Literal["egp", "nepenthe"]

_LEAST = 1e-9  # A fraction of nothing would prune nothing.
_PROBED = 512  # Training examples that show whether a network is connected.


def easier(rounds: int = 4, order: Order = "lowest") -> Constraint:
    """EASIER: round after round, the least undecided activation becomes linear.

    The entropy of a layer is the mean over its channels of

        H = -p log2 p - (1 - p) log2(1 - p),    p = P(z >= 0),

    with z what enters the activation function, over all training data in evaluation
    (the released code takes the mean over batches of the last epoch). Every round makes
    the layer of the smallest entropy linear and trains again. The training ends early
    where one activation function is left. From arXiv 2404.18949.

    Args:
      rounds: activation functions that become linear, at most.
      order: those of the "lowest" entropy first; "highest" and "random" are controls.

    Raises:
      ValueError: a number or a choice is unknown, or when applied, as in `with_gates`;
        when the training begins, there are not two activation functions.

    >>> from d2sparse import models, train
    >>> plain = train.plain(models.resnet8(), train.images_like((8, 8, 3)))
    >>> [phase.title for phase in easier(rounds=2)(plain).phases]
    ['0 removed', '1 removed', '2 removed']
    """
    check_whole("rounds", rounds, least=1)
    check_choice("order", order, get_args(Order))

    def change(
        progress: Progress, data: Data, program: Program, number: int
    ) -> Changed:
        state = progress.state
        gates = get_gates(state.model_state)
        active = remaining(gates.active)
        if len(active) < 2:
            return None
        if order == "random":
            path = active[_draw(state, number, len(active))]
        else:
            counts = count_states_on(program, state, data)
            bits = entropies_of(counts, zero="on", varying_only=False)
            path = (min if order == "lowest" else max)(active, key=bits.__getitem__)
        return changed_gates(state, linearised(gates, path)), None

    def constrained(training: Training) -> Training:
        own = with_gates(training, "easier", _check_two)
        return in_rounds(own, rounds, change, "{} removed")

    return constrained


def tlc(rounds: int = 4) -> Constraint:
    """TLC: as EASIER, by the parameters of batch normalisations, without data.

    What a batch normalisation of scale g and bias b gives to an activation function is
    taken to be Gaussian: it is OFF with probability `Phi(-b / |g|)`. Every round takes
    the layer of the smallest mean entropy; its channels with b < 0 become 0, the others
    linear. An activation function is a candidate if a batch normalisation is what it is
    applied to, with no shortcut in between. Weights of channels that are 0 are still
    counted. From arXiv 2412.15077, whose released code goes by the loss of trial
    removals instead.

    Args:
      rounds: activation functions that become linear, at most.

    Raises:
      ValueError: as for `easier`, or there is no such activation function.
    """
    check_whole("rounds", rounds, least=1)

    def check(layers: Layers) -> None:
        _check_two(layers)
        if not any(own.norm for own in layers.activations.values()):
            raise ValueError(
                "expected a batch normalisation right before an activation function "
                f"for tlc, got none before {', '.join(layers.activations)}; take easier"
            )

    def change(
        progress: Progress, data: Data, program: Program, number: int
    ) -> Changed:
        del number
        state = progress.state
        gates, leaves = get_gates(state.model_state), tree.flatten(state.params)
        found = layers_of(program, state, data).activations
        norms = {
            path: tuple(
                leaves[leaf_of(state.params, found[path].norm, name)]
                for name in ("scale", "bias")
            )
            for path in remaining(gates.active)
            if found[path].norm
        }
        if len(remaining(gates.active)) < 2 or not norms:
            return None
        bits = {
            path: float(metrics.gaussian_layer_entropy(*own))
            for path, own in norms.items()
        }
        path = min(bits, key=bits.__getitem__)
        through = np.asarray(norms[path][1]) >= 0
        return changed_gates(state, linearised(gates, path, through)), None

    def constrained(training: Training) -> Training:
        own = with_gates(training, "tlc", check)
        return in_rounds(own, rounds, change, "{} removed")

    return constrained


def egp(rounds: int = 4, fraction: float = 0.5, states: States = "egp") -> Constraint:
    """EGP and NEPENTHE: layers whose units hardly change their state are pruned away.

    Every round removes a fraction of the live weights of the layers that feed an
    activation function, see `metrics.layer_budget`: nearly all in the layer where
    entropy times mean magnitude is smallest, until it is empty. Within a layer the
    smallest weights go. Where no unit changes its state the activation function becomes
    linear: channels that are always OFF are 0, so that nothing changes on the training
    data. From arXiv 2308.06619 and 2404.16890.

    An emptied layer cuts the network in two where no shortcut leads around it. Such a
    layer keeps its largest weight, and the training ends before all training examples
    looked at would be predicted alike. The last layer feeds no activation function and
    is never pruned.

    Args:
      rounds: prunings, at most; each is followed by a whole training.
      fraction: of the live weights of those layers that every round removes, above 0
        and at most 1.
      states: of units: of "egp" z <= 0 is OFF, of "nepenthe" z = 0 is no state.

    Raises:
      ValueError: a number or a choice is out of its range, another constraint decides
        the masks, or as for `easier`.
    """
    check_whole("rounds", rounds, least=1)
    check_number("fraction", fraction, _LEAST, 1)
    check_choice("states", states, get_args(States))

    def check(layers: Layers) -> None:
        _check_two(layers)
        if not any(own.kernels for own in layers.activations.values()):
            raise ValueError(
                "expected a layer with a kernel before an activation function for egp, "
                f"got none before {', '.join(layers.activations)}; take easier"
            )

    def change(
        progress: Progress, data: Data, program: Program, number: int
    ) -> Changed:
        del number
        state = progress.state
        feeding = layers_of(program, state, data).activations
        counts = count_states_on(program, state, data, feeding)
        zero: Any = "off" if states == "egp" else "ignored"
        bits = entropies_of(counts, zero=zero, varying_only=True)
        gates = _without_constant(get_gates(state.model_state), counts, bits)
        state = changed_gates(state, gates)
        entropies = {
            leaf_of(state.params, layer, "kernel"): bits[path]
            for path in remaining(gates.active)
            for layer in feeding[path].kernels
        }
        leaves = tree.prunable_leaves(state.params, program.training.network.prunable)
        entropies = {path: h for path, h in entropies.items() if path in leaves}
        masks = _prune(program, state, data, entropies, fraction)
        return None if masks is None else (state, masks)

    def constrained(training: Training) -> Training:
        dense = dense_masks(training.network.params)
        masked = under_masks(training, states, lambda s: rules.fixed(dense))
        own = with_gates(masked, states, check)
        return in_rounds(own, rounds, change, "round {}")

    return constrained


def _without_constant(
    gates: Gates, counts: Mapping[str, StateCounts], bits: Mapping[str, float]
) -> Gates:
    """Gates with all activation functions linear whose units never change state."""
    for path in remaining(gates.active):
        if bits[path] == 0 and len(remaining(gates.active)) > 1:
            gates = linearised(gates, path, np.asarray(counts[path].positive) > 0)
    return gates


def _prune(
    program: Program,
    state: TrainState,
    data: Data,
    entropies: Mapping[str, float],
    fraction: float,
) -> PyTree | None:
    """Masks without the budget of every layer; None where the network would break."""
    if not any(entropies.values()):
        return None
    live, params = jax.device_get((get_masks(state.opt_state), state.params))
    own, leaves = tree.flatten(live), tree.flatten(params)
    kernels = {path: leaves[path] * own[path] for path in entropies}
    probe = take(data, jnp.arange(min(_PROBED, len(data.labels))))

    def masks_of(counts: Mapping[str, int]) -> PyTree:
        fewer = {p: _smaller(kernels[p], own[p], n) for p, n in counts.items()}
        return tree.replace(live, fewer)

    def connects(masks: PyTree) -> bool:
        pruned = jax.tree.map(np.multiply, params, masks)
        said, *_ = program.predict(state._replace(params=pruned), probe).values()
        return float(np.ptp(said, axis=0).max()) > 1e-6  # More than rounding.

    protected: set[str] = set()
    while True:
        counts = metrics.layer_budget(entropies, kernels, fraction, protect=protected)
        emptied = {p: n for p, n in counts.items() if n and n == own[p].sum()}
        gone: dict[str, int] = {}
        for path in sorted(emptied, key=lambda p: entropies[p]):
            if connects(masks_of(gone | {path: emptied[path]})):
                gone[path] = emptied[path]
            else:
                protected.add(path)
        if len(gone) == len(emptied):
            masks = masks_of(counts)
            return masks if any(counts.values()) and connects(masks) else None


def _smaller(kernel: np.ndarray, live: np.ndarray, count: int) -> np.ndarray:
    """A mask without the smallest of the live weights."""
    size = np.where(live, np.abs(kernel), np.inf).ravel()
    mask = np.array(live)
    mask.ravel()[np.argsort(size, kind="stable")[:count]] = False
    return mask


def _draw(state: TrainState, number: int, size: int) -> int:
    """A number below another one, by the key of the run, in every round another."""
    seed = np.asarray(jax.random.key_data(state.key)).ravel()
    return int(np.random.default_rng([*seed.tolist(), number]).integers(size))


def _check_two(layers: Layers) -> None:
    if len(layers.activations) < 2:
        raise ValueError(
            "expected a network with at least 2 activation functions, of which one is "
            f"left, got {len(layers.activations)}; take a deeper one"
        )
