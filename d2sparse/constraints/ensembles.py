"""Several networks out of one training, or averaged into one."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from d2sparse import rules
from d2sparse.constraints.growing import Moves
from d2sparse.constraints.masked import Structure, shared, under_masks, with_sparsity
from d2sparse.models import Model
from d2sparse.reparam import nonzero_masks
from d2sparse.schedules import Step, at, every
from d2sparse.train import (
    Constraint,
    Data,
    Masks,
    Phase,
    Program,
    Progress,
    Teacher,
    Training,
    TrainState,
    claim,
    same_masks,
    stay,
)
from d2sparse.tree import PyTree

_ESCAPE = 0.8  # Part of the mask that moves between two members.


class Members(tuple[Any, ...]):
    """Something of every member of an ensemble."""


jax.tree_util.register_pytree_node(
    Members, lambda own: (tuple(own), None), lambda _, own: Members(own)
)


def free_tickets(
    sparsity: float,
    members: int = 2,
    explore: float = 0.5,
    moves: Moves | None = None,
    structure: Structure | None = None,
) -> Constraint:
    """An ensemble out of one training, whose members share the weights of one network.

    The mask is explored at a large learning rate first; then the learning rate falls to
    0 again and again, each time leaving a member, with a large move of the mask in
    between. After FreeTickets (Liu et al., arXiv 2106.14568).

    Args:
      sparsity: fraction of zeros of one network that has all the members' weights.
      members: how many there are, at least 1.
      explore: part of the training, in (0, 1), before the first one is annealed.
      moves: how the masks move until then.
      structure: which masks are possible; shared by ERK if it names no distribution.

    Raises:
      ValueError: a number is out of its range; when applied, the training has too few
        steps.
    """
    chosen = moves or Moves()
    if members < 1 or not 0 < explore < 1:
        raise ValueError(
            "expected at least 1 member and an explored part in (0, 1), got "
            f"members={members} and explore={explore}"
        )

    def constrained(training: Training) -> Training:
        starts, ends = _annealings(training.horizon, members, explore)
        first, escapes = starts[0], starts[1:]
        explores = every(chosen.interval, stop=first)
        own = shared(training, structure)

        def drop(step: Step) -> jax.Array:
            early = jnp.asarray(step) < first
            return jnp.where(early, chosen.drop_fraction, _ESCAPE)

        def rate(largest: Any, horizon: int) -> optax.Schedule:
            del horizon
            falls = [
                optax.cosine_decay_schedule(largest, end - start)
                for start, end in zip(starts, ends, strict=True)
            ]
            return optax.join_schedules(
                [optax.constant_schedule(largest), *falls], starts
            )

        left = 1 - (1 - sparsity) / members
        masked = under_masks(
            with_sparsity(claim(training, "the learning rate", "free_tickets"), left),
            "free_tickets",
            lambda s: rules.rigl(s["sparsity"], drop, **own),
            lambda step: explores(step) | at(escapes)(step),
        )
        phases = [
            Phase(end, enter)
            for end, enter in zip(
                [*ends, ends[-1]],
                [stay, *(_keep(n) for n in range(members))],
                strict=True,
            )
        ]
        return ensembled(masked, members)._replace(
            rate=rate, phases=tuple(phases), growth_samples=chosen.growth_samples
        )

    return constrained


def ensembled(training: Training, members: int) -> Training:
    """A training that ends as an ensemble of the members in its memory."""
    model, begin = training.model, training.begin

    def apply(
        params: PyTree, model_state: PyTree, x: Any, *, train: bool
    ) -> tuple[Any, PyTree]:
        if not isinstance(params, Members):
            return model.apply(params, model_state, x, train=train)
        each = zip(params, model_state, strict=True)
        outputs = [model.apply(p, s, x, train=train)[0] for p, s in each]
        return Members(outputs), model_state

    def probabilities(outputs: Any) -> dict[str, jax.Array]:
        if not isinstance(outputs, Members):
            return training.probabilities(outputs)
        each = [next(iter(training.probabilities(out).values())) for out in outputs]
        named = {f"member{n}": own for n, own in enumerate(each, start=1)}
        return {"ensemble": jnp.mean(jnp.stack(each), axis=0), **named}

    def masks_of(state: TrainState) -> Masks:
        if not isinstance(state.params, Members):
            return training.masks(state)
        prunable = training.network.prunable
        return same_masks(*(nonzero_masks(own, prunable) for own in state.params))

    def prepared(progress: Progress, data: Data) -> Progress:
        progress = begin(progress, data)
        nobody = {f"member{n}": _copy(progress.state) for n in range(members)}
        return progress._replace(memory={**progress.memory, **nobody})

    def finish(progress: Progress, data: Data, program: Program) -> TrainState:
        del data, program
        kept = [progress.memory[f"member{n}"] for n in range(members)]
        params, model_state = zip(*kept, strict=True)
        return progress.state._replace(
            params=Members(params), model_state=Members(model_state)
        )

    return training._replace(
        model=Model(model.init, apply),
        probabilities=probabilities,
        masks=masks_of,
        begin=prepared,
        finish=finish,
    )


def _keep(number: int) -> Any:
    """Enters a phase by keeping what is trained so far as a member."""

    def enter(progress: Progress, data: Data, program: Program) -> Progress:
        del data, program
        member = {f"member{number}": _copy(progress.state)}
        return progress._replace(memory={**progress.memory, **member})

    return enter


def _annealings(
    steps: int, members: int, explore: float
) -> tuple[list[int], list[int]]:
    """The steps at which the learning rate begins to fall, and those where it is 0."""
    first = int(explore * steps)
    if steps - first < members:
        raise ValueError(
            f"expected a step for each of {members} members, got {steps - first} of "
            f"{steps} steps after exploration; raise --steps"
        )
    ends = [first + (steps - first) * n // members for n in range(1, members + 1)]
    return [first, *ends[:-1]], ends


def _copy(state: TrainState) -> Teacher:
    return jax.tree.map(jnp.copy, Teacher(state.params, state.model_state))
