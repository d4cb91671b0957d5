"""Rules: what happens to the masks at a refresh.

A rule is a pair of pure functions, free of Optax: usable in any loop, and lifted into
Optax by `sparsify`. Each function here is one row of the product
scores x distribution x schedule x what happens at a refresh, with the name its paper
gave it.

Scores that are NaN are treated as the lowest there is, so that the density holds.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import distributions, scores, tree
from d2sparse.distributions import Distribution, Sparsity
from d2sparse.masks import (
    copy_masks,
    count_live,
    dense_masks,
    select,
)
from d2sparse.schedules import Schedule, Step
from d2sparse.scores import Score
from d2sparse.tree import Count, Prunable, PyTree, is_kernel

_LOWEST = float(np.finfo(np.float32).min)


class MaskRule(NamedTuple):
    """How masks begin and how they change.

    Attributes:
      init: `(params, key) -> masks`.
      update: `(masks, params, grads, step, key) -> masks`, called at a refresh. The
        gradients are dense: pruned weights have theirs too.
    """

    init: Callable[[PyTree, jax.Array], PyTree]
    update: Callable[[PyTree, PyTree, PyTree, Step, jax.Array], PyTree]


def fixed(masks: PyTree) -> MaskRule:
    """The given masks for the whole run: a ticket, a pattern, all of them dense.

    Args:
      masks: tree of bool with the structure of the parameters.

    Raises:
      ValueError: at `init`, where the masks do not fit the parameters.

    >>> rule = fixed({"w": jnp.array([True, False])})
    >>> rule.init({"w": jnp.zeros(2)}, jax.random.key(0))["w"].tolist()
    [True, False]
    """

    def init(params: PyTree, key: jax.Array) -> PyTree:
        del key
        return copy_masks(masks, params)

    return MaskRule(init, _keep_masks)


def static(
    sparsity: Sparsity,
    distribution: Distribution = distributions.erk,
    prunable: Prunable = is_kernel,
) -> MaskRule:
    """A random pattern drawn at the start and kept: static sparse training.

    Args:
      sparsity: fraction of zeros among the prunable weights, in [0, 1); may be traced.
      distribution: how the budget is shared between the leaves.
      prunable: predicate on (path, leaf).

    >>> rule = static(0.75)
    >>> masks = rule.init({"kernel": jnp.ones((4, 4))}, jax.random.key(0))
    >>> int(masks["kernel"].sum())
    4
    """
    distributions.check_sparsity(sparsity)

    def init(params: PyTree, key: jax.Array) -> PyTree:
        counts = distribution(tree.shapes(params, prunable), sparsity)
        ranks = scores.random(tree.prunable_leaves(params, prunable), None, key)
        return tree.replace(dense_masks(params), select(ranks, counts))

    return MaskRule(init, _keep_masks)


def one_shot(
    sparsity: Sparsity,
    score: Score = scores.magnitude,
    distribution: Distribution = distributions.global_,
    prunable: Prunable = is_kernel,
) -> MaskRule:
    """Dense until the first refresh, then pruned once to the given sparsity.

    Give it to `sparsify` with `at([step])`. At step 0 with `scores.saliency` it prunes
    at initialisation by the gradient of the first batch.

    Args:
      sparsity: fraction of zeros among the prunable weights, in [0, 1); may be traced.
      score: which weights matter; the largest are kept.
      distribution: how the budget is shared between the leaves.
      prunable: predicate on (path, leaf).

    >>> rule, key = one_shot(0.5), jax.random.key(0)
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    >>> masks = rule.update(rule.init(params, key), params, None, 0, key)
    >>> masks["kernel"].tolist()
    [[False, True], [True, False]]
    """
    distributions.check_sparsity(sparsity)
    return gradual(lambda step: sparsity, score, distribution, prunable)


def gradual(
    sparsity: Schedule,
    score: Score = scores.magnitude,
    distribution: Distribution = distributions.global_,
    prunable: Prunable = is_kernel,
) -> MaskRule:
    """Dense at first; at every refresh the lowest scores go, as a schedule says.

    Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878) is
    `gradual(cubic(0.9, steps))`. A pruned weight never comes back. The final sparsity
    is reached at the first refresh after the schedule's end, so there must be one.

    Args:
      sparsity: step -> fraction of zeros among the prunable weights.
      score: which weights matter; the largest are kept.
      distribution: how the budget is shared between the leaves.
      prunable: predicate on (path, leaf).

    Raises:
      ValueError: the sparsity is a number and not a schedule.

    >>> from d2sparse.schedules import linear
    >>> rule, key = gradual(linear(0.0, 0.5, 2)), jax.random.key(0)
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    >>> masks = rule.update(rule.init(params, key), params, None, 1, key)
    >>> masks["kernel"].tolist()
    [[False, True], [True, True]]
    """
    if not callable(sparsity):
        raise ValueError(
            f"expected a schedule, step -> sparsity, got {sparsity!r}; pass "
            f"`cubic({sparsity!r}, steps)`, or use `one_shot({sparsity!r})`"
        )

    def init(params: PyTree, key: jax.Array) -> PyTree:
        del key
        tree.prunable_leaves(params, prunable)  # Complains where there is none.
        return dense_masks(params)

    def update(
        masks: PyTree, params: PyTree, grads: PyTree, step: Step, key: jax.Array
    ) -> PyTree:
        shapes = tree.shapes(params, prunable)
        live = _pick(masks, shapes)
        ranks = _pick(score(params, grads, key), shapes)
        ranks = {path: _among(live[path], ranks[path]) for path in shapes}
        counts = distribution(shapes, sparsity(step))
        if isinstance(counts, Mapping):
            counts = _at_most_live(counts, live)
        return tree.replace(masks, select(ranks, counts))

    return MaskRule(init, update)


def prune_and_grow(
    sparsity: Sparsity,
    growth: Score,
    drop_fraction: Schedule | float = 0.3,
    distribution: Distribution = distributions.erk,
    prunable: Prunable = is_kernel,
) -> MaskRule:
    """Random pattern at first; a refresh moves a fraction of it, leaf by leaf.

    In a leaf with `k` live weights, the `k - floor(fraction * k)` largest magnitudes
    stay and as many weights as fell grow where the growth score outside of them is
    largest, ties going to random ones: so they do where no score is above 0. A weight
    that falls and grows at one refresh keeps its value.

    Args:
      sparsity: fraction of zeros among the prunable weights, in [0, 1); may be traced.
      growth: score of the weights that may grow.
      drop_fraction: step -> fraction of the live weights that falls, or a number.
      distribution: how the budget is shared between the leaves at the start; a refresh
        keeps the number of every leaf.
      prunable: predicate on (path, leaf).

    >>> rule, key = prune_and_grow(0.5, scores.gradient, 0.5), jax.random.key(0)
    >>> params = {"kernel": jnp.array([[1.0, 4.0], [0.0, 0.0]])}
    >>> masks = {"kernel": jnp.array([[True, True], [False, False]])}
    >>> grads = {"kernel": jnp.array([[0.0, 0.0], [0.1, 0.2]])}
    >>> rule.update(masks, params, grads, 0, key)["kernel"].tolist()
    [[False, True], [False, True]]
    """
    begin = static(sparsity, distribution, prunable)

    def update(
        masks: PyTree, params: PyTree, grads: PyTree, step: Step, key: jax.Array
    ) -> PyTree:
        weights = tree.prunable_leaves(params, prunable)
        live = _pick(masks, weights)
        counts = {path: count_live(mask) for path, mask in live.items()}
        fraction = drop_fraction(step) if callable(drop_fraction) else drop_fraction
        falls = {path: _share(fraction, n) for path, n in counts.items()}
        stays = {path: counts[path] - falls[path] for path in weights}
        ranks = {path: _among(live[path], jnp.abs(w)) for path, w in weights.items()}
        kept = select(ranks, stays)

        growth_key, tie_key = jax.random.split(key)
        wanted = _pick(growth(params, grads, growth_key), weights)
        ranks = {path: _among(~kept[path], wanted[path]) for path in weights}
        grown = select(ranks, falls, tie_key)
        return tree.replace(masks, {path: kept[path] | grown[path] for path in weights})

    return MaskRule(begin.init, update)


def set_(
    sparsity: Sparsity,
    drop_fraction: Schedule | float = 0.3,
    distribution: Distribution = distributions.erk,
    prunable: Prunable = is_kernel,
) -> MaskRule:
    """Sparse evolutionary training: small weights fall, random ones grow.

    Mocanu et al., arXiv 1707.04780. All growth scores are alike, so that ties, which go
    to random weights, decide. Arguments as in `prune_and_grow`.

    >>> params = {"kernel": jnp.ones((10, 10))}
    >>> int(set_(0.9).init(params, jax.random.key(0))["kernel"].sum())
    10
    """
    return prune_and_grow(
        sparsity, scores.constant, drop_fraction, distribution, prunable
    )


def rigl(
    sparsity: Sparsity,
    drop_fraction: Schedule | float = 0.3,
    distribution: Distribution = distributions.erk,
    prunable: Prunable = is_kernel,
) -> MaskRule:
    """RigL: small weights fall, those with the largest gradients grow.

    Evci et al., arXiv 1911.11134. The paper lets the drop fraction fall along
    `cosine(0.3, steps)` and stops refreshing at three quarters of the run, which is
    `every(100, stop=steps)`. Arguments as in `prune_and_grow`.

    >>> params = {"kernel": jnp.ones((10, 10))}
    >>> int(rigl(0.9).init(params, jax.random.key(0))["kernel"].sum())
    10
    """
    return prune_and_grow(
        sparsity, scores.gradient, drop_fraction, distribution, prunable
    )


def _keep_masks(
    masks: PyTree, params: PyTree, grads: PyTree, step: Step, key: jax.Array
) -> PyTree:
    del params, grads, step, key
    return masks


def _pick(values: PyTree, paths: Iterable[str]) -> dict[str, jax.Array]:
    leaves = tree.flatten(values)
    return {path: leaves[path] for path in paths}


def _among(eligible: jax.Array, score: jax.Array) -> jax.Array:
    """The scores of eligible entries, which NaN leaves eligible; `-inf` elsewhere."""
    return jnp.where(eligible, jnp.fmax(score.astype(jnp.float32), _LOWEST), -jnp.inf)


def _at_most_live(
    counts: Mapping[str, Count], live: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Counts that no leaf has too few live weights for, with the same total.

    Shares by largest remainder can rise by one in a leaf while the total falls.
    """
    wanted = jnp.stack([jnp.asarray(counts[path], jnp.int32) for path in live])
    available = jnp.stack([count_live(mask) for mask in live.values()])
    possible = jnp.minimum(wanted, available)
    missing = jnp.sum(wanted) - jnp.sum(possible)
    possible = distributions.hand_out(missing, possible, available)
    return dict(zip(live, possible, strict=True))


def _share(fraction: jax.Array | float, count: jax.Array) -> jax.Array:
    share = jnp.floor(jnp.float32(fraction) * count).astype(jnp.int32)
    return jnp.clip(share, 0, count)  # A schedule may leave [0, 1]; the density holds.
