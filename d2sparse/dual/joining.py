"""One Optax transformation of two learners, each growing where the other is not."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from d2sparse.dual.consolidation import Consolidation, Trace, begin_trace, consolidate
from d2sparse.dual.coupling import apart, discourage
from d2sparse.dual.pair import Dual
from d2sparse.masks import Selection, apply_masks, select
from d2sparse.train import live_masks
from d2sparse.transforms import get_masks, mask_states, set_masks, sparse_states
from d2sparse.tree import Prunable, PyTree


class JointState(NamedTuple):
    """State of the joint optimiser: that of each learner."""

    fast: Any
    slow: Any


def joint(
    txs: Dual,
    kappa: float,
    key: Any,
    prunable: Prunable,
    selection: Selection = select,
) -> optax.GradientTransformationExtraArgs:
    """Two optimisers as one of a `Dual` tree, each growing where the other is not.

    The fast learner moves first: the slow one sees the masks that it has just got.

    Args:
      txs: optimisers of the learners; a `Consolidation` for a slow one that has none.
      kappa: coupling of the masks, in [-1, 1].
      key: of the slow learner's first mask, where masks are coupled.
      prunable: which leaves may be pruned.
      selection: which masks may be drawn then.

    Raises:
      ValueError: by `init`, where masks are coupled and a learner has none.
    """
    fast_tx = optax.with_extra_args_support(txs.fast)
    consolidates = isinstance(txs.slow, Consolidation)
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

    def update(
        updates: Dual, state: JointState, params: Dual, **extra: Any
    ) -> tuple[Dual, JointState]:
        def given(which: str, peer: PyTree) -> dict[str, Any]:
            own = _extra_of(which, params, extra)
            if not mask_states(getattr(state, which)):
                return own
            grow = extra.get("growth_fn") or (lambda: updates)
            own["growth_fn"] = lambda: discourage(getattr(grow(), which), peer, kappa)
            if extra.get("refresh") is not None:
                own["refresh"] = getattr(extra["refresh"], which)
            return own

        peer = joint_masks(params, state).slow
        fast_up, fast = fast_tx.update(
            updates.fast, state.fast, params.fast, **given("fast", peer)
        )
        if slow_tx is not None:
            peer = live_masks(params.fast, fast)
            slow_up, slow = slow_tx.update(
                updates.slow, state.slow, params.slow, **given("slow", peer)
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


def joint_masks(params: Dual, state: JointState) -> Dual:
    """The masks of both learners."""
    followed = isinstance(state.slow, Trace)
    slow = state.slow.masks if followed else live_masks(params.slow, state.slow)
    return Dual(live_masks(params.fast, state.fast), slow)


def joint_state(opt_state: PyTree) -> JointState:
    """The state of the joint optimiser, however deep it is nested in another one."""
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_joint)
    (found,) = [node for node in nodes if _is_joint(node)]
    return found


def _extra_of(which: str, params: Dual, extra: Mapping[str, Any]) -> dict[str, Any]:
    """One learner's part of what any optimiser may be given beside gradients."""
    own = {k: v for k, v in extra.items() if k not in ("growth_fn", "refresh")}
    if "grad_fn" in own:
        grad_fn = own["grad_fn"]
        own["grad_fn"] = lambda weights, number: getattr(
            grad_fn(params._replace(**{which: weights}), number), which
        )
    return own


def _is_joint(node: Any) -> bool:
    return isinstance(node, JointState)
