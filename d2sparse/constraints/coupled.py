"""D2-Sparse: two constrained trainings of one network that teach each other.

`coupled(fast, slow, coupling)` takes two tuples of any constraints. What is trained is
a `Dual` tree by a joint optimiser and a joint loss; nothing outside of this file knows
that there are two networks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from d2sparse import distributions, losses, metrics, rules
from d2sparse.constraints.averaging import averaged
from d2sparse.constraints.growing import Moves, moving
from d2sparse.constraints.masked import Structure
from d2sparse.constraints.pacing import paced
from d2sparse.dual import Consolidation, Coupling, Dual, Trace, split_sparsity
from d2sparse.dual.consolidation import begin_trace, consolidate
from d2sparse.dual.step import apart, discourage, pair_logs, trust
from d2sparse.masks import Selection, apply_masks, select
from d2sparse.models import Model
from d2sparse.rules import MaskRule
from d2sparse.rules.base import suited
from d2sparse.schedules import every, refresh_stop
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
    claim,
    constrain,
    forward_macs,
    growth_share,
    init_state,
    inputs,
    live_masks,
    make_program,
    take,
)
from d2sparse.transforms import get_masks, set_masks, sparse_states
from d2sparse.tree import Prunable, PyTree


class JointState(NamedTuple):
    """State of the joint optimiser: that of each learner."""

    fast: Any
    slow: Any


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


class Learners(NamedTuple):
    """How the learners of a pair of sparse networks are trained.

    Attributes:
      preset: "averaged", both keep the learning rate and average their weights over the
        tail; "symmetric", both anneal it; "constant", as averaged without the average;
        "fast_slow", the fast one keeps half of the rate and moves half of its mask, the
        slow one anneals and moves a tenth at every fourth refresh.
      interval: steps between two refreshes of the fast learner's mask.
      growth_samples: examples of a growth gradient; 0 for those of the step.
      tail: part of the training that preset "averaged" averages, in (0, 1].
      horizon: steps that a slow learner reaches back which consolidates the fast one;
        None where both are trained by gradient.
      rule: how the masks move, "rigl", "set" or "static".
    """

    preset: str = "averaged"
    interval: int = 100
    growth_samples: int = 1024
    tail: float = 0.25
    horizon: float | None = None
    rule: str = "rigl"


def paired(
    sparsity: float,
    learners: Learners | None = None,
    coupling: Coupling | None = None,
    structure: Structure | None = None,
) -> Constraint:
    """D2-Sparse of two sparse networks that share the weights of one between them.

    Args:
      sparsity: fraction of zeros of one network that has the weights of both.
      learners: how they are trained.
      coupling: how they influence each other.
      structure: which masks are possible; shared by ERK if it names no distribution.

    Raises:
      ValueError: an unknown preset, or an average of a pair that consolidates.
    """
    own = learners or Learners()
    if own.rule not in _RULES:
        raise ValueError(f"expected rule of {', '.join(_RULES)}, got {own.rule!r}")
    if own.preset not in ("averaged", "symmetric", "fast_slow", "constant"):
        raise ValueError(
            "expected preset of averaged, symmetric, fast_slow, constant, got "
            f"{own.preset!r}"
        )
    if own.horizon is not None and own.preset == "averaged":
        raise ValueError(
            "expected no average of a pair that consolidates, whose slow learner is "
            "one, got preset averaged; choose --preset=fast_slow"
        )

    def grown(sparsity: float, moves: Moves) -> Constraint:
        grow = moving(own.rule, _RULES[own.rule], sparsity, moves, structure)
        # The others need no growth gradients.
        samples = moves.growth_samples if own.rule == "rigl" else 0
        return lambda training: grow(training)._replace(growth_samples=samples)

    def constrained(training: Training) -> Training:
        halves = split_sparsity(training.network.weights, sparsity)
        two = own.preset == "fast_slow"
        plain, slower = (own.interval, 4 * own.interval if two else own.interval)
        fast_moves = Moves(plain, 0.5 if two else 0.3, own.growth_samples)
        slow_moves = Moves(slower, 0.1 if two else 0.3, own.growth_samples)
        stays = () if own.preset == "symmetric" else (paced("constant"),)
        tail = (averaged(own.tail),) if own.preset == "averaged" else ()
        fast = (*stays, grown(halves.fast, fast_moves), *tail)
        slow = (*stays, grown(halves.slow, slow_moves), *tail)
        if two:
            fast = (paced("constant", 0.5), grown(halves.fast, fast_moves))
            slow = (paced("cosine"), grown(halves.slow, slow_moves))
        elif own.preset == "symmetric":
            fast, slow = ((paced("cosine"), *side) for side in (fast, slow))
        if own.horizon is not None:
            slow = (consolidated(halves.slow, own.horizon, slower, structure),)
        possible = (structure or Structure()).selection
        return coupled(tuple(fast), tuple(slow), coupling, possible)(training)

    return constrained


def _static(sparsity: Any, drop_fraction: Any, **shared: Any) -> MaskRule:
    del drop_fraction
    return rules.static(sparsity, **shared)


_RULES: dict[str, Callable[..., MaskRule]] = {
    "rigl": rules.rigl,
    "set": rules.set_,
    "static": _static,
}


def consolidated(
    sparsity: float,
    horizon: float,
    interval: int = 100,
    structure: Structure | None = None,
) -> Constraint:
    """A slow learner that is a masked running average of the fast one.

    It has no loss of its own; its mask is drawn anew from the largest weights of the
    average. For the slow side of `coupled`.

    Args:
      sparsity: fraction of zeros of the slow learner, in [0, 1).
      horizon: steps the average reaches back, at least 1.
      interval: steps between two draws of the mask, in the first three quarters.
      structure: which masks are possible; shared by ERK if it names no distribution.

    Raises:
      ValueError: the horizon is below 1.
    """
    if not horizon >= 1:
        raise ValueError(f"expected a horizon of at least 1 step, got {horizon}")

    def constrained(training: Training) -> Training:
        when = every(interval, refresh_stop(training.horizon))
        own = structure or Structure()
        share = suited(own.distribution, own.selection, distributions.erk)
        how = Consolidation(sparsity, 1 - 1 / horizon, when, share, own.selection)
        claimed = claim(training, "the masks", "consolidated")
        return claimed._replace(transform=lambda rate, settings, key: how, when=when)

    return constrained


def joint(
    txs: Dual,
    kappa: float,
    key: Any,
    prunable: Prunable,
    selection: Selection = select,
) -> optax.GradientTransformationExtraArgs:
    """Two optimisers as one of a `Dual` tree, each growing where the other is not.

    Args:
      txs: optimisers of the learners; a `Consolidation` for a slow one that has none.
      kappa: coupling of the masks, in [-1, 1].
      key: of the slow learner's first mask, where masks are coupled.
      prunable: which leaves may be pruned.
      selection: which masks may be drawn then.
    """
    consolidates = isinstance(txs.slow, Consolidation)
    fast_tx = optax.with_extra_args_support(txs.fast)
    slow_tx = None if consolidates else optax.with_extra_args_support(txs.slow)

    def init(params: Dual) -> JointState:
        fast = fast_tx.init(params.fast)
        if slow_tx is None:
            begun = apply_masks(params.fast, get_masks(fast))
            return JointState(fast, begin_trace(begun, txs.slow, prunable)[0])
        slow = slow_tx.init(params.slow)
        if not kappa:
            return JointState(fast, slow)
        if not sparse_states(fast) or not sparse_states(slow):
            raise ValueError(
                "expected two sparse learners, since their masks are coupled, got a "
                "dense one; set the mask coupling to 0 (--mask_coupling=0)"
            )
        both = (get_masks(slow), get_masks(fast))
        masks = apart(*both, kappa, key, prunable, selection)
        return JointState(fast, set_masks(slow, masks))

    def learn(
        which: str,
        tx: Any,
        updates: Dual,
        state: Any,
        params: Dual,
        peer: PyTree,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        """The update of one learner, its growth scores discouraged by the peer."""
        growth_fn, grad_fn = extra.pop("growth_fn", None), extra.pop("grad_fn", None)
        refresh = extra.pop("refresh", None)
        if refresh is not None:
            extra["refresh"] = getattr(refresh, which)
        if sparse_states(state):
            grads = growth_fn or (lambda: updates)
            extra["growth_fn"] = lambda: discourage(
                getattr(grads(), which), peer, kappa
            )
        if grad_fn is not None:
            extra["grad_fn"] = lambda own, number: getattr(
                grad_fn(params._replace(**{which: own}), number), which
            )
        return tx.update(
            getattr(updates, which), state, getattr(params, which), **extra
        )

    def update(
        updates: Dual, state: JointState, params: Dual, **extra: Any
    ) -> tuple[Dual, JointState]:
        slow_masks = _slow_masks(params, state)
        fast_up, fast = learn(
            "fast", fast_tx, updates, state.fast, params, slow_masks, **extra
        )
        if slow_tx is not None:
            fast_masks = live_masks(params.fast, fast)
            slow_up, slow = learn(
                "slow", slow_tx, updates, state.slow, params, fast_masks, **extra
            )
            return Dual(fast_up, slow_up), JointState(fast, slow)
        (before,) = sparse_states(state.fast)
        after = optax.apply_updates(params.fast, fast_up)
        followed, trace = consolidate(
            state.slow, after, get_masks(fast), before.step, txs.slow, prunable
        )
        moved = jax.tree.map(jnp.subtract, followed, params.slow)
        return Dual(fast_up, moved), JointState(fast, trace)

    return optax.GradientTransformationExtraArgs(init, update)


def pair_masks(state: TrainState) -> Dual:
    """The masks of both learners."""
    found = joint_state(state.opt_state)
    return Dual(
        live_masks(state.params.fast, found.fast), _slow_masks(state.params, found)
    )


def joint_state(opt_state: PyTree) -> JointState:
    """The state of the joint optimiser, however deep it is nested in another one."""
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_joint)
    (found,) = [node for node in nodes if _is_joint(node)]
    return found


def _is_joint(node: Any) -> bool:
    return isinstance(node, JointState)


def _slow_masks(params: Dual, state: JointState) -> PyTree:
    if isinstance(state.slow, Trace):
        return state.slow.masks
    return live_masks(params.slow, state.slow)


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
    return value, pair_logs(outputs, batch.labels)


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
        empty = init_state(
            Model(lambda key, x: ({}, {}), training.model.apply),
            optax.identity(),
            data,
            key,
            settings,
        )
        state = empty._replace(
            params=params, model_state=model_state, opt_state=opt_state, key=run_key
        )
        masked = Dual(*map(apply_masks, params, pair_masks(state)))
        # Copies: donation allows no sharing.
        return jax.tree.map(jnp.array, state._replace(params=masked))

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
        own = joint_state(state.opt_state)
        ends = []
        for t, name in zip(two, Dual._fields, strict=True):
            alone = state._replace(
                params=getattr(state.params, name),
                model_state=getattr(state.model_state, name),
                opt_state=getattr(own, name),
            )
            learner = getattr(programs(), name)
            ends.append(t.finish(progress._replace(state=alone), data, learner))
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
            spent += 3 * sparse
            if t.growth_samples:
                batch = 2 * sparse + network.dense_macs + peer
                grown = growth_share(t, size) * batch
                spent += jnp.where(due[number], grown, 0.0)
        return spent

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


def _own(training: Training, settings: Settings) -> Settings:
    """What a learner goes by: it shares the pair's numbers, and has others alone."""
    return {**training.settings, **settings}


def _consolidates(two: Dual) -> bool:
    return two.slow.claims.get("the masks") == "consolidated"


def _headline(training: Training, outputs: Any) -> jax.Array:
    return next(iter(training.probabilities(outputs).values()))
