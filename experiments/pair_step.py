"""The step of a pair that `constraints.coupled` replaces."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from d2sparse import losses, metrics
from d2sparse.data import Augment
from d2sparse.dual.consolidation import Consolidation, begin_trace, consolidate
from d2sparse.dual.coupling import Coupling, apart, discourage, trust
from d2sparse.dual.pair import Dual
from d2sparse.masks import Selection, select
from d2sparse.train import (
    Data,
    Metrics,
    Step,
    TrainState,
    growth_batch,
    init_state,
    inputs,
    is_finite,
    step_keys,
    take,
)
from d2sparse.transforms import get_masks, set_masks, zero_pruned
from d2sparse.transforms.inputs import as_key
from d2sparse.tree import Prunable, PyTree, is_kernel
from experiments.pair_account import get_pair_masks


def init_pair(
    models: Dual,
    tx: Dual,
    data: Data,
    key: jax.Array,
    coupling: Coupling,
    prunable: Prunable = is_kernel,
    settings: Mapping[str, float] | None = None,
    skip_faults: bool = False,
    selection: Selection = select,
) -> TrainState:
    """The pair's state at step 0.

    With a mask coupling the slow learner's random mask starts where the fast one's is
    not (kappa > 0) or is (kappa < 0).

    Args:
      models: the two networks; they may differ, if the masks are not coupled.
      tx: their optimisers made by `sparsify`; a `Consolidation` for a slow learner that
        has none.
      data: examples whose shape the networks are built for.
      key: random key of the run, or its seed.
      coupling: how they influence each other.
      prunable: predicate on (path, leaf).
      settings: numbers that tell this run from others of the same program.
      skip_faults: whether updates that are not finite are left out, instead of
        stopping the run.
      selection: which patterns may be live, that of the optimisers' rules.

    Raises:
      ValueError: masks are coupled between networks of different shapes.
    """
    fast_key, slow_key, mask_key, run_key = jax.random.split(as_key(key), 4)
    fast = init_state(models.fast, tx.fast, data, fast_key, settings, skip_faults)
    if isinstance(tx.slow, Consolidation):
        trace, params = begin_trace(fast.params, tx.slow, prunable)
        slow = fast._replace(params=params, opt_state=trace)
    else:
        slow = init_state(models.slow, optax.identity(), data, slow_key)
        opt_state = tx.slow.init(slow.params)
        masks = get_masks(opt_state)
        if coupling.masks:
            peer = get_masks(fast.opt_state)
            how = (coupling.masks, mask_key, prunable, selection)
            masks = apart(masks, peer, *how)
        params = zero_pruned(slow.params, set_masks(opt_state, masks))
        # Once more, since a state may hold copies of the weights, such as an average.
        opt_state = set_masks(tx.slow.init(params), masks)
        slow = slow._replace(params=params, opt_state=opt_state)
    joined = jax.tree.map(jnp.array, slow)  # Copies: donation allows no sharing.
    return fast._replace(
        params=Dual(fast.params, joined.params),
        model_state=Dual(fast.model_state, joined.model_state),
        opt_state=Dual(fast.opt_state, joined.opt_state),
        key=run_key,
    )


def make_dual_step(
    models: Dual,
    tx: Dual | Callable[[Mapping[str, jax.Array]], Dual],
    coupling: Coupling,
    augment: Augment | None = None,
    smoothing: float = 0.0,
    growth_samples: int = 1024,
    prunable: Prunable = is_kernel,
    when: Dual | None = None,
) -> Step:
    """One step of the pair, pure: `(state, data, indices) -> (state, metrics)`.

    Where `tx.slow` is an optimiser both learners are trained by gradient (mode
    "trained"); where it is a `Consolidation` the slow one is a masked running average
    of the fast one and has no loss (mode "consolidated").

    Args:
      models: the two networks; two of one shape where the slow one consolidates.
      tx: their optimisers, or a function that makes them of the run's settings.
      coupling: how they influence each other. The run's setting "coupling", where it
        has one, stands for both weights of the teaching.
      augment: `(key, images) -> images`.
      smoothing: label smoothing in [0, 1).
      growth_samples: examples of the growth gradient (at most all); 0 means the batch.
      prunable: predicate on (path, leaf).
      when: step -> bool of each, when its masks are refreshed, as the optimisers have
        it themselves. Runs that are vmapped need it, see `train.make_train_step`.
    """
    whens = when or Dual(None, None)

    def step(
        state: TrainState, data: Data, indices: jax.Array
    ) -> tuple[TrainState, Metrics]:
        params, opt_state = state.params, state.opt_state
        own = tx(state.settings) if callable(tx) else tx
        consolidated = isinstance(own.slow, Consolidation)
        objective = _make_objective(models, coupling, augment, smoothing, consolidated)
        due = Dual(*({} if f is None else {"refresh": f(state.step)} for f in whens))
        loss_key, order_key, growth_key = step_keys(state)

        def gradient(batch: Data, key: jax.Array) -> tuple[Dual, Any]:
            return jax.grad(objective, has_aux=True)(params, state, batch, key)

        batch = take(data, indices)
        grads, (model_state, logs) = gradient(batch, loss_key)

        def elsewhere(own: Dual) -> Dual:
            return jax.grad(objective, has_aux=True)(own, state, batch, loss_key)[0]

        def dense_grads() -> Dual:
            if not growth_samples:
                return grads
            examples = growth_batch(data, growth_samples, order_key)
            return gradient(examples, growth_key)[0]

        kappa, masks = coupling.masks, get_pair_masks(state)
        fast, fast_state = _descend(
            own.fast,
            params.fast,
            opt_state.fast,
            grads.fast,
            lambda: discourage(dense_grads().fast, masks.slow, kappa),
            lambda own, _: elsewhere(params._replace(fast=own)).fast,
            **due.fast,
        )
        fast_masks = get_masks(fast_state)
        if consolidated:
            slow, slow_state = consolidate(
                opt_state.slow, fast, fast_masks, state.step, own.slow, prunable
            )
        else:
            slow, slow_state = _descend(
                own.slow,
                params.slow,
                opt_state.slow,
                grads.slow,
                lambda: discourage(dense_grads().slow, fast_masks, kappa),
                lambda own, _: elsewhere(params._replace(slow=own)).slow,
                **due.slow,
            )
        after = state._replace(
            step=state.step + 1,
            params=Dual(fast, slow),
            model_state=model_state,
            opt_state=Dual(fast_state, slow_state),
        )
        return after, logs | {"finite": is_finite(grads)}

    return step


def _make_objective(
    models: Dual,
    coupling: Coupling,
    augment: Augment | None,
    smoothing: float,
    consolidated: bool,
) -> Callable[..., tuple[jax.Array, Any]]:
    """The one scalar whose gradient trains both learners, the other side detached."""

    def objective(
        params: Dual, state: TrainState, batch: Data, key: jax.Array
    ) -> tuple[jax.Array, tuple[Dual, Metrics]]:
        views = _views(batch, key, augment, coupling.independent_views)
        outputs = [
            model.apply(p, s, x, train=True)
            for model, p, s, x in zip(
                models, params, state.model_state, views, strict=True
            )
        ]
        (fast, fast_state), (slow, slow_state) = outputs
        ramp = jnp.minimum(1.0, state.step / coupling.ramp) if coupling.ramp else 1.0

        def loss(logits: jax.Array, peer: jax.Array, given: float) -> jax.Array:
            weight = state.settings.get("coupling", given)
            own = losses.cross_entropy(logits, batch.labels, smoothing)
            taught = losses.distillation(logits, peer, coupling.temperature)
            if coupling.weighted or coupling.threshold:
                taught *= trust(peer, coupling)
            return jnp.mean(own + ramp * weight * taught)

        value = loss(fast, slow, coupling.fast)
        if not consolidated:
            value += loss(slow, fast, coupling.slow)
        logs = pair_logs(Dual(fast, slow), batch.labels)
        return value, (Dual(fast_state, slow_state), logs)

    return objective


def _views(
    batch: Data, key: jax.Array, augment: Augment | None, independent: bool
) -> Dual:
    x = inputs(batch)
    if augment is None:
        return Dual(x, x)
    if not independent:
        return Dual(*[augment(key, x)] * 2)
    return Dual(*(augment(k, x) for k in jax.random.split(key)))


def pair_logs(logits: Dual, labels: jax.Array) -> Metrics:
    """What is told of a step of a pair: both losses, accuracy and disagreement."""
    fast, slow = (jax.nn.softmax(x.astype(jnp.float32)) for x in logits)
    return {
        "loss": jnp.mean(losses.cross_entropy(logits.fast, labels)),
        "loss_slow": jnp.mean(losses.cross_entropy(logits.slow, labels)),
        "train_accuracy": metrics.accuracy(fast + slow, labels),
        "disagreement": metrics.disagreement(logits.fast, logits.slow),
    }


def _descend(
    tx: optax.GradientTransformation,
    params: PyTree,
    opt_state: optax.OptState,
    grads: PyTree,
    growth_fn: Callable[[], PyTree],
    grad_fn: Callable[[PyTree, int], PyTree],
    **extra: Any,
) -> tuple[PyTree, optax.OptState]:
    tx = optax.with_extra_args_support(tx)
    updates, opt_state = tx.update(
        grads, opt_state, params, growth_fn=growth_fn, grad_fn=grad_fn, **extra
    )
    return optax.apply_updates(params, updates), opt_state
