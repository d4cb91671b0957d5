"""LaCoOT: blocks learn to be the identity, and those that nearly are get dropped."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from d2sparse import regularizers, tree
from d2sparse.checks import check_number, check_whole
from d2sparse.constraints.gating import changed_gates, with_gates
from d2sparse.models import Model, taps
from d2sparse.models.gates import Layers, dropped, get_gates, remaining
from d2sparse.train import (
    Constraint,
    Context,
    Data,
    Masks,
    Metrics,
    Program,
    Progress,
    Training,
    TrainState,
    check_finite,
    end,
    growth_batch,
)
from d2sparse.tree import PyTree

_MOST = 3e38  # Of float32.
_SAMPLES = 512  # Training examples that distances of trained blocks are taken on.


class Passed(NamedTuple):
    """What a network returns in training.

    Attributes:
      outputs: those of the network.
      pairs: by block, its input and its output.
    """

    outputs: Any
    pairs: dict[str, tuple[jax.Array, jax.Array]]


def layer_collapse(
    weight: float = 1.0, removed: int = 4, directions: int = 50, paired: bool = False
) -> Constraint:
    """LaCoOT: blocks whose output is distributed as their input are left out.

    The loss gets `weight` times the mean over blocks of the distance between what
    enters and what leaves them, see `regularizers.layer_collapse`. After the training,
    distances are taken on training examples in evaluation, and blocks dropped one by
    one, the smallest distance first: each drop is a titled phase without steps, so that
    one run shows the whole trade-off. The memory has "distances" by block. From
    arXiv 2406.08933.

    Candidates are blocks that keep the shape of their input; the others are what leads
    through the network in any case. The training ends early where none is left. A
    dropped block has no weights and costs nothing in what is counted; the penalty's
    projections are not counted. Directions are new in every step, and those of every
    run are the same.

    In training the network returns `Passed`: put this last, after all that looks at
    its outputs.

    Args:
      weight: of the penalty, at least 0; how strong it must be depends on the size of
        the features. A setting, "collapse": runs of one program may differ in it.
      removed: blocks that are dropped, at most.
      directions: of every block.
      paired: compare each example with itself and not the distributions.

    Raises:
      ValueError: a number is out of its range, or when applied, as in `with_gates`;
        when the training begins, there is no block that keeps the shape of its input.

    >>> from d2sparse import models, train
    >>> plain = train.plain(models.resnet8(), train.images_like((8, 8, 3)))
    >>> [(phase.stop, phase.title) for phase in layer_collapse(removed=1)(plain).phases]
    [(1000, '0 dropped'), (1000, '1 dropped')]
    """
    check_number("weight", weight, 0, _MOST)
    check_whole("removed", removed, least=1)
    check_whole("directions", directions, least=1)

    def constrained(training: Training) -> Training:
        own = with_gates(training, "lacoot", _check_blocks)

        def loss(
            outputs: Passed, batch: Data, context: Context
        ) -> tuple[jax.Array, Metrics]:
            value, logs = training.loss(outputs.outputs, batch, context)
            key = jax.random.fold_in(jax.random.key(0), context.step)
            distance = regularizers.layer_collapse(
                outputs.pairs, key, directions, paired=paired
            )
            both = value + context.settings["collapse"] * distance
            return both, logs | {"collapse": distance}

        def begin(progress: Progress, data: Data) -> Progress:
            progress = training.begin(progress, data)
            blocks = get_gates(progress.state.model_state).blocks
            distances = {path: jnp.float32(0) for path in blocks}
            return progress._replace(memory={**progress.memory, "distances": distances})

        def drop(progress: Progress, data: Data, program: Program) -> Progress:
            state = progress.state
            gates = get_gates(state.model_state)
            left = remaining(gates.blocks)
            if not left:
                return end(progress)
            if len(left) == len(gates.blocks):
                progress = measured(progress, data, program)
            found = progress.memory["distances"]
            path = min(left, key=lambda own: float(found[own]))
            return progress._replace(state=changed_gates(state, dropped(gates, path)))

        def measured(progress: Progress, data: Data, program: Program) -> Progress:
            state = progress.state
            key = jax.random.fold_in(state.key, 0)
            examples = growth_batch(data, _SAMPLES, key)
            apply, inputs = program.training.model.apply, program.training.inputs
            measure = _measurer(apply, inputs, directions, paired)
            found = measure(state.params, state.model_state, examples, key)
            check_finite(found, "distances", state)
            return progress._replace(memory={**progress.memory, "distances": found})

        *others, last = training.phases
        return own._replace(
            model=_passing(own.model),
            loss=loss,
            settings={**own.settings, "collapse": weight},
            begin=begin,
            masks=lambda state: _without_dropped(training.masks(state), state),
            phases=(
                *others,
                last._replace(title="0 dropped"),
                *(
                    last._replace(enter=drop, title=f"{number} dropped")
                    for number in range(1, removed + 1)
                ),
            ),
        )

    return constrained


def _passing(model: Model) -> Model:
    """A network with gates that returns in training what its blocks do."""

    def apply(
        params: PyTree, model_state: Any, x: Any, *, train: bool
    ) -> tuple[Any, PyTree]:
        if not train:
            return model.apply(params, model_state, x, train=False)
        read = taps.read(model.apply, tuple(get_gates(model_state).blocks))
        (outputs, after), found = read(params, model_state, x, train=True)
        pairs = {path: (tap.input, tap.output) for path, tap in found.items()}
        return Passed(outputs, pairs), after

    return Model(model.init, apply)


@functools.lru_cache(maxsize=16)
def _measurer(
    apply: Callable[..., Any],
    inputs: Callable[..., Any],
    directions: int,
    paired: bool,
) -> Any:
    @jax.jit
    def measure(
        params: PyTree, model_state: Any, data: Data, key: jax.Array
    ) -> dict[str, jax.Array]:
        blocks = sorted(get_gates(model_state).blocks)
        read = taps.read(apply, blocks)
        _, found = read(params, model_state, inputs(data, None), train=False)
        pairs = {path: (found[path].input, found[path].output) for path in blocks}
        return regularizers.block_distances(pairs, key, directions, paired=paired)

    return measure


def _without_dropped(masks: Masks, state: TrainState) -> Masks:
    """Masks without the leaves of blocks that are dropped."""
    gates = get_gates(state.model_state)

    def live(path: str, mask: Any) -> Any:
        for block, on in gates.blocks.items():
            if f"/{block}/" in f"/{path}":
                mask = mask & on
        return mask

    def each(parts: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        return tuple(tree.map_with_path(live, own) for own in parts)

    return Masks(*map(each, masks))


def _check_blocks(layers: Layers) -> None:
    if not layers.blocks:
        raise ValueError(
            "expected a network with blocks that keep the shape of their input for "
            "lacoot, got none; take a residual network such as resnet20"
        )
