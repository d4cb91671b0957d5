"""What constraints on the depth share: gates, rounds of training, states of units."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import lottery, metrics
from d2sparse.metrics import StateCounts
from d2sparse.metrics.entropies import Zero
from d2sparse.models import taps
from d2sparse.models.gates import (
    Activation,
    Gates,
    Layers,
    find_layers,
    gated,
    get_gates,
    remaining,
    set_gates,
)
from d2sparse.train import (
    Data,
    Phase,
    Program,
    Progress,
    Training,
    TrainState,
    check_finite,
    claim,
    end,
    passes,
    take,
)
from d2sparse.transforms import get_masks, sparse_states
from d2sparse.tree import PyTree

# The state that a round goes on with, and its masks if they change; None to end.
Changed = tuple[TrainState, PyTree | None] | None
Change = Callable[[Progress, Data, Program, int], Changed]

_entropies = jax.jit(metrics.layer_entropy, static_argnames=("zero", "varying_only"))


def with_gates(
    training: Training, who: str, check: Callable[[Layers], None]
) -> Training:
    """A training of a network with gates, and of one network alone.

    Its measurements count the activation functions and blocks that are left.

    Args:
      training: what is constrained.
      who: decides the depth, as errors name it.
      check: raises where the layers of the network do not do.

    Raises:
      ValueError: several networks are trained, or another constraint decides the depth.
    """
    several = any(phase.training is not None for phase in training.phases)
    if several or "the networks" in training.claims:
        raise ValueError(
            f"expected the training of one network for {who}, got one of several; put "
            f"{who} first or leave the other constraint away"
        )

    def measure(state: TrainState) -> Mapping[str, Any]:
        gates = get_gates(state.model_state)
        return {
            **training.measure(state),
            "activations_left": len(remaining(gates.active)),
            "blocks_left": len(remaining(gates.blocks)),
        }

    claimed = claim(training, "the depth", who)
    return claimed._replace(model=gated(training.model, check), measure=measure)


def in_rounds(training: Training, rounds: int, change: Change, title: str) -> Training:
    """A training with gates, changed and trained as a whole again, round after round.

    Weights go on from where they are; step, learning rate and moments begin anew. The
    memory has "removed", by activation function the round that made it linear, 0 while
    none has.

    Args:
      training: from `with_gates`.
      rounds: changes at most; each is followed by a whole training.
      change: `(progress, data, program, round) -> (state, masks)`: the state with other
        gates, and other masks or None; None in place of both ends the training.
      title: of the phases, as "{} removed", with the number of changes.
    """

    def begin(progress: Progress, data: Data) -> Progress:
        progress = training.begin(progress, data)
        gates = get_gates(progress.state.model_state)
        kept = {
            "begun": jax.tree.map(jnp.copy, progress.state),
            "removed": {path: jnp.int32(0) for path in gates.active},
        }
        return progress._replace(memory={**progress.memory, **kept})

    def enter(
        progress: Progress, data: Data, program: Program, number: int
    ) -> Progress:
        changed = change(progress, data, program, number)
        if changed is None:
            return end(progress)
        state, masks = changed
        memory = progress.memory
        active = get_gates(state.model_state).active
        removed = {
            path: before if bool(active[path]) or int(before) else jnp.int32(number)
            for path, before in memory["removed"].items()
        }
        again = _again(memory["begun"], state, masks)
        return progress._replace(state=again, memory={**memory, "removed": removed})

    *others, last = training.phases
    first = (*others, last._replace(title=title.format(0)))
    later = tuple(
        Phase(
            training.horizon,
            functools.partial(enter, number=number),
            title=title.format(number),
        )
        for number in range(1, rounds + 1)
    )
    return training._replace(begin=begin, phases=(*first, *later))


def _again(begun: TrainState, state: TrainState, masks: PyTree | None) -> TrainState:
    """The trained state at step 0, with the moments of the first one."""
    if sparse_states(begun.opt_state):
        live = get_masks(state.opt_state) if masks is None else masks
        return lottery.rewind(begun, live, state)
    again = begun._replace(params=state.params, model_state=state.model_state)
    return jax.tree.map(jnp.copy, again)


def layers_of(program: Program, state: TrainState, data: Data) -> Layers:
    """The activation functions and blocks of what is trained."""
    training = program.training
    x = jax.eval_shape(lambda d: training.inputs(take(d, jnp.arange(1)), None), data)
    apply = training.model.apply
    return find_layers(apply, state.params, state.model_state, x, train=False)


def count_states_on(
    program: Program,
    state: TrainState,
    data: Data,
    activations: Mapping[str, Activation] | None = None,
) -> dict[str, StateCounts]:
    """States of the units of all activation functions, over all of the data.

    In evaluation, that is without augmentation and with running statistics, channels
    with all their positions, in one pass.

    Args:
      program: of the network.
      state: its weights and statistics.
      data: the examples.
      activations: those of `layers_of`, where they are known; to find them traces the
        network.

    Raises:
      ValueError: the network has no activation functions that are Linen modules.
      FloatingPointError: what enters an activation function is not finite.
    """
    found = activations or layers_of(program, state, data).activations
    if not found:
        raise ValueError(
            "expected activation functions that are Linen modules, to count states at, "
            "got none; make them such modules, as models.layers.ReLU"
        )
    count = _counter(program.training.model.apply, program.training.inputs)
    counts = {path: _none((own.channels,)) for path, own in found.items()}
    for rows, where in passes(len(data.labels)):
        given = (state.params, state.model_state, data, rows, where)
        counts, sound = count(counts, *given)
        check_finite(np.where(sound, 0, np.nan), "activations", state)
    return counts


def entropies_of(
    counts: Mapping[str, StateCounts], zero: Zero, varying_only: bool
) -> dict[str, float]:
    """Entropies of layers as numbers, see `metrics.layer_entropy`."""
    found = _entropies(dict(counts), zero=zero, varying_only=varying_only)
    return {path: float(own) for path, own in jax.device_get(found).items()}


# What is compiled stays for all rounds, and for all runs of a program.
@functools.lru_cache(maxsize=16)
def _counter(apply: Callable[..., Any], inputs: Callable[..., Any]) -> Any:
    @jax.jit
    def count(
        counts: dict[str, StateCounts],
        params: PyTree,
        model_state: PyTree,
        data: Data,
        rows: Any,
        where: Any,
    ) -> tuple[dict[str, StateCounts], jax.Array]:
        read = taps.read(apply, tuple(counts))
        x = inputs(take(data, rows), None)
        _, found = read(params, model_state, x, train=False)
        entering = {path: tap.input for path, tap in found.items()}
        sound = jnp.stack([jnp.all(jnp.isfinite(z)) for z in entering.values()])
        return metrics.count_states(counts, entering, where=where), jnp.all(sound)

    return count


def _none(shape: tuple[int, ...]) -> StateCounts:
    # Of numpy: zeros of jax are a program for every number of channels.
    zeros: Any = np.zeros(shape, np.int32)
    return StateCounts(zeros, zeros, zeros)


def changed_gates(state: TrainState, gates: Gates) -> TrainState:
    """The state with other gates."""
    return state._replace(model_state=set_gates(state.model_state, gates))
