"""D2-Sparse: two constrained trainings of one network that teach each other.

`coupled(fast, slow, coupling)` takes two tuples of any constraints. What is trained is
a `Dual` tree by a joint optimiser and a joint loss; nothing outside of this file knows
that there are two networks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from d2sparse import losses, metrics
from d2sparse.constraints.found_scales import find_scales
from d2sparse.dual import (
    Coupling,
    Dual,
    Trace,
    joint,
    joint_masks,
    joint_state,
    trust,
)
from d2sparse.masks import Selection, apply_masks, select
from d2sparse.models import Model
from d2sparse.train import (
    Constraint,
    Context,
    Data,
    Masks,
    Metrics,
    Program,
    Progress,
    Settings,
    Training,
    TrainState,
    begin_state,
    claim,
    constrain,
    forward_macs,
    growth_share,
    inputs,
    make_program,
    step_macs,
    take,
)
from d2sparse.tree import Prunable


def coupled(
    fast: tuple[Constraint, ...],
    slow: tuple[Constraint, ...],
    coupling: Coupling | None = None,
    selection: Selection = select,
) -> Constraint:
    """D2-Sparse: two networks teach each other, and their masks avoid each other.

    This project's reconstruction of Misra, Nolte, Mishra and Yin (PML4LRS, ICLR 2024),
    see `d2sparse.dual`. The prediction that counts is the mean of both probabilities;
    that of the slow learner where it consolidates the fast one.

    Args:
      fast: constraints of the fast learner.
      slow: constraints of the slow learner; `consolidated(...)` makes it the running
        average of the fast one.
      coupling: how they influence each other; `Coupling()` if not given. The setting
        "coupling" of a run stands for both weights of the teaching.
      selection: which masks the slow learner may begin with, where masks are coupled:
        that of its constraint.

    Raises:
      ValueError: when applied, where masks are coupled that are not there.
    """
    chosen = coupling or Coupling()

    def constrained(training: Training) -> Training:
        claimed = claim(training, "the networks", "coupled")
        two = Dual(constrain(training, *fast), constrain(training, *slow))
        if any(learner.scores is not None for learner in two):
            raise ValueError(
                "expected learners that need no scores beside their gradient, got one "
                "whose decay goes by sensitivities; take score='gradient'"
            )
        parts = {
            **_forward(two, chosen, training),
            **_optimiser(two, chosen, training.network.prunable, selection),
            **_end(two),
            **_account(two, training),
        }
        settings = dict(training.settings)
        if chosen.fast and chosen.fast == chosen.slow:
            settings["coupling"] = chosen.fast
        return claimed._replace(
            settings=settings,
            phases=_same_phases(two),
            claims={**claimed.claims, **two.slow.claims, **two.fast.claims},
            **parts,
        )

    return constrained


def pair_masks(state: TrainState) -> Dual:
    """The masks of both learners."""
    return joint_masks(state.params, joint_state(state.opt_state))


def _forward(two: Dual, coupling: Coupling, plain: Training) -> dict[str, Any]:
    """The model, the inputs, the loss and the predictions of a pair."""

    def init(key: jax.Array, x: Any) -> tuple[Dual, Dual]:
        both = [
            t.model.init(k, x) for t, k in zip(two, jax.random.split(key), strict=True)
        ]
        return Dual(*(p for p, _ in both)), Dual(*(s for _, s in both))

    def apply(
        params: Dual, model_state: Dual, x: Any, *, train: bool
    ) -> tuple[Any, Dual]:
        shown = x if isinstance(x, Dual) else Dual(x, x)
        every_part = zip(two, params, model_state, shown, strict=True)
        both = [t.model.apply(p, s, own, train=train) for t, p, s, own in every_part]
        return Dual(*(out for out, _ in both)), Dual(*(after for _, after in both))

    def views(batch: Data, key: jax.Array | None) -> Any:
        if key is None or not coupling.independent_views:
            return plain.inputs(batch, key)
        return Dual(*(plain.inputs(batch, own) for own in jax.random.split(key)))

    def probabilities(outputs: Dual) -> dict[str, jax.Array]:
        own = Dual(*(_headline(t, out) for t, out in zip(two, outputs, strict=True)))
        named = {"ensemble": (own.fast + own.slow) / 2, **own._asdict()}
        first = "slow" if _consolidates(two) else "ensemble"
        return {first: named[first], **named}

    return {
        "model": Model(init, apply),
        "inputs": views,
        "loss": functools.partial(_loss, two, coupling),
        "probabilities": probabilities,
    }


def _loss(
    two: Dual, coupling: Coupling, outputs: Dual, batch: Data, context: Context
) -> tuple[jax.Array, Metrics]:
    """The one scalar whose gradient trains both learners, the peer's side detached."""
    ramp = jnp.minimum(1.0, context.step / coupling.ramp) if coupling.ramp else 1.0

    def learner(which: str, peer: str, given: float) -> jax.Array:
        one, out, other = (
            getattr(x, name)
            for x, name in ((two, which), (outputs, which), (outputs, peer))
        )
        inside = context._replace(
            params=getattr(context.params, which),
            model_state=getattr(context.model_state, which),
            x=getattr(context.x, which) if isinstance(context.x, Dual) else context.x,
        )
        weight = context.settings.get("coupling", given)
        taught = losses.distillation(out, other, coupling.temperature)
        if coupling.weighted or coupling.threshold:
            taught *= trust(other, coupling)
        return one.loss(out, batch, inside)[0] + ramp * weight * jnp.mean(taught)

    value = learner("fast", "slow", coupling.fast)
    if not _consolidates(two):
        value += learner("slow", "fast", coupling.slow)
    return value, _logs(outputs, batch.labels)


def _logs(logits: Dual, labels: jax.Array) -> Metrics:
    """Metrics of a step: both losses, accuracy of the ensemble, disagreement."""
    fast, slow = (jax.nn.softmax(x.astype(jnp.float32)) for x in logits)
    return {
        "loss": jnp.mean(losses.cross_entropy(logits.fast, labels)),
        "loss_slow": jnp.mean(losses.cross_entropy(logits.slow, labels)),
        "train_accuracy": metrics.accuracy(fast + slow, labels),
        "disagreement": metrics.disagreement(logits.fast, logits.slow),
    }


def _optimiser(
    two: Dual, coupling: Coupling, prunable: Prunable, selection: Selection
) -> dict[str, Any]:
    """The joint optimiser, its refreshes, and the state at step 0."""

    def transform(
        rate: optax.Schedule, settings: Settings, key: Any
    ) -> optax.GradientTransformation:
        del rate  # Each learner has a schedule of its own.
        keys = key if isinstance(key, tuple) else (key, key, key)
        txs = [
            t.transform(
                t.rate(settings["learning_rate"], t.horizon), _own(t, settings), key
            )
            for t, key in zip(two, keys, strict=False)
        ]
        return joint(Dual(*txs), coupling.masks, keys[2], prunable, selection)

    def init(
        training: Training, key: jax.Array, data: Data, settings: Settings
    ) -> TrainState:
        mask_key, key = jax.random.split(key)
        fast_key, slow_key, apart_key, run_key = jax.random.split(key, 4)
        x = inputs(take(data, jnp.arange(1)))
        fast = two.fast.model.init(jax.random.split(fast_key)[0], x)
        slow = two.slow.model.init(jax.random.split(slow_key)[0], x)
        if _consolidates(two):
            slow = fast
        params, model_state = map(Dual, fast, slow)
        tx = training.transform(
            training.rate(settings["learning_rate"], training.horizon),
            settings,
            (*jax.random.split(mask_key), apart_key),
        )
        opt_state = tx.init(params)
        state = begin_state(params, model_state, opt_state, run_key, settings)
        masked = Dual(*map(apply_masks, params, pair_masks(state)))
        state = find_scales(training, state._replace(params=masked), data)
        # Copies: donation allows no sharing.
        return jax.tree.map(jnp.array, state)

    def when(step: jax.Array) -> Dual:
        never = jnp.zeros((), bool)
        return Dual(*(never if t.when is None else t.when(step) for t in two))

    return {
        "transform": transform,
        "init": init,
        "when": when,
        "growth_samples": max(t.growth_samples for t in two),
    }


def _end(two: Dual) -> dict[str, Any]:
    """What counts of a pair at the end: what counts of each learner."""
    programs: Callable[[], Dual] = functools.cache(
        lambda: Dual(*(make_program(t) for t in two))
    )

    def finish(progress: Progress, data: Data, program: Program) -> TrainState:
        del program
        state = progress.state
        if _consolidates(two):
            return state
        ends = []
        for number, learner in enumerate(programs()):
            alone = progress._replace(state=_alone(state, number))
            ends.append(learner.training.finish(alone, data, learner))
        return state._replace(
            params=Dual(*(end.params for end in ends)),
            model_state=Dual(*(end.model_state for end in ends)),
        )

    return {"finish": finish}


def _account(two: Dual, plain: Training) -> dict[str, Any]:
    """What a pair stores and costs, and how far its masks overlap."""

    def masks_of(state: TrainState) -> Masks:
        both, slow = pair_masks(state), joint_state(state.opt_state).slow
        if not isinstance(slow, Trace):
            return Masks(tuple(both), tuple(both), tuple(both))
        support = jax.tree.map(
            lambda a, m: (a != 0) | jnp.all(m), slow.average, slow.masks
        )
        return Masks((both.slow,), (both.fast,), (both.fast, support))

    def cost(outer: Training, state: TrainState, size: int) -> Any:
        del outer
        network, masks = plain.network, pair_masks(state)
        each = [forward_macs(network, (own,)) for own in masks]
        due, spent = two_due(state.step), jnp.float32(0.0)
        for number, t in enumerate(two):
            sparse, peer = each[number], each[1 - number]
            if number == 1 and _consolidates(two):
                spent += sparse
                continue
            spent += 3 * sparse + further(state, number, t)
            if t.growth_samples:
                batch = 2 * sparse + network.dense_macs + peer
                grown = growth_share(t, size) * batch
                spent += jnp.where(due[number], grown, 0.0)
        return spent

    def further(state: TrainState, number: int, t: Training) -> Any:
        """What a learner's step costs besides its gradient, such as sharpness."""
        alone = _alone(state, number)
        return t.cost(t, alone, 0) - step_macs(t, alone)

    def two_due(step: jax.Array) -> list[Any]:
        return [False if t.when is None else t.when(step) for t in two]

    def measure(state: TrainState) -> dict[str, Any]:
        return dict(jax.device_get(_overlaps(pair_masks(state))))

    return {"masks": masks_of, "cost": cost, "measure": measure}


@jax.jit
def _overlaps(masks: Dual) -> dict[str, jax.Array]:
    return {
        "overlap": metrics.mask_overlap(*masks),
        "chance_overlap": metrics.chance_overlap(*masks),
    }


def _same_phases(two: Dual) -> Any:
    if len(two.fast.phases) > 1 or len(two.slow.phases) > 1:
        raise ValueError(
            "expected learners that train in one phase, got one that trains in "
            "several, such as iterative pruning; prune before or after the pair"
        )
    return two.fast.phases


def _alone(state: TrainState, number: int) -> TrainState:
    """The state of one learner, as if it were trained alone."""
    return state._replace(
        params=state.params[number],
        model_state=state.model_state[number],
        opt_state=joint_state(state.opt_state)[number],
    )


def _own(training: Training, settings: Settings) -> Settings:
    """What a learner goes by: it shares the pair's numbers, and has others alone."""
    return {**training.settings, **settings}


def _consolidates(two: Dual) -> bool:
    return two.slow.claims.get("the masks") == "consolidated"


def _headline(training: Training, outputs: Any) -> jax.Array:
    return next(iter(training.probabilities(outputs).values()))
