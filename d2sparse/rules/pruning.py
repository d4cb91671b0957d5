"""Rules that keep the largest scores: of what is live, or of all weights."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from d2sparse import distributions, masks, scores, tree
from d2sparse.checks import check_function, check_whole
from d2sparse.distributions import Distribution, Sparsity
from d2sparse.masks import Pattern, Selection, apply_masks, count_live, dense_masks
from d2sparse.rules.base import (
    MaskRule,
    Nan,
    Noting,
    check_choices,
    either,
    is_local,
    largest_scores,
    plainly,
    refresh,
    suited,
)
from d2sparse.schedules import Ramp, Schedule, Step, When, constant
from d2sparse.scores import Score
from d2sparse.tree import Count, Counts, Prunable, PyTree, is_kernel


def one_shot(
    sparsity: Sparsity,
    score: Score = scores.magnitude,
    distribution: Distribution | None = None,
    prunable: Prunable = is_kernel,
    selection: Selection = masks.select,
    iterations: int = 1,
) -> MaskRule:
    """Dense until the first refresh, then pruned once to the given sparsity.

    Give it to `sparsify` with `at([step])`. With `at([0])` it prunes at initialisation:
    by `scores.saliency` on the gradient of the first batch, by `scores.snip`,
    `scores.grasp` or `scores.fisher` on batches of your own, by `scores.synflow` on
    none.

    With several iterations the density falls in equal ratios, `(1 - sparsity)^(i / n)`
    after iteration i of n, and the score is taken anew of the weights that are left.
    SynFlow needs them, or whole layers fall (Tanaka et al., arXiv 2006.05467, with
    100). A score of gradients sees the same gradients at each.

    Args:
      sparsity: fraction of zeros among the prunable weights, in [0, 1); may be traced.
      score: which weights matter; the largest are kept.
      distribution: how the budget is shared between the leaves; if not given, all
        weights compete (`global_`), and by `uniform` where whole groups live and fall.
      prunable: predicate on (path, leaf).
      selection: which patterns may be live.
      iterations: prunings in one refresh, at least 1.

    Raises:
      ValueError: the sparsity or the number of iterations is out of its range.

    >>> rule, key = one_shot(0.5), jax.random.key(0)
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    >>> masks = rule.update(rule.init(params, key), params, None, 0, key)
    >>> masks["kernel"].tolist()
    [[False, True], [True, False]]
    """
    distributions.check_sparsity(sparsity)
    check_whole("iterations", iterations, least=1)
    prune = _pruner(score, distribution, prunable, selection)
    init = gradual(constant(sparsity), score, distribution, prunable, selection).init

    def noted(
        masks: PyTree, params: PyTree, grads: PyTree, step: Step, key: jax.Array
    ) -> tuple[PyTree, Nan]:
        del step

        def pruned(masks: PyTree, sparsity: Sparsity) -> tuple[PyTree, Nan]:
            left = params if is_local(score) else apply_masks(params, masks)
            return prune(masks, left, grads, sparsity, key)

        def iteration(
            i: int | jax.Array, before: tuple[PyTree, Nan]
        ) -> tuple[PyTree, Nan]:
            share = i / jnp.float32(iterations)
            masks, nan = pruned(before[0], 1 - (1 - sparsity) ** share)
            return masks, either(nan, before[1])

        if iterations == 1:
            return pruned(masks, sparsity)
        given = (masks, params, grads, sparsity, key)
        none = {p: jnp.zeros((), bool) for p in tree.shapes(params, prunable)}
        before = (masks, none)
        if _is_traced(given):
            # The loop carries one type: what lies on a mesh afterwards does so before.
            after = iteration(1, before)
            before = jax.tree.map(lambda x, y: x | jnp.zeros_like(y), before, after)
            before = jax.lax.fori_loop(1, iterations, iteration, before)
        else:
            # Outside of a compiled function the loop would be compiled at every call.
            for i in range(1, iterations):
                before = iteration(i, before)
        masks, nan = pruned(before[0], sparsity)
        return masks, either(nan, before[1])

    return MaskRule(init, Noting(noted))


def gradual(
    sparsity: Schedule,
    score: Score = scores.magnitude,
    distribution: Distribution | None = None,
    prunable: Prunable = is_kernel,
    selection: Selection = masks.select,
) -> MaskRule:
    """Dense at first; at every refresh the lowest scores go, as a schedule says.

    Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878) is
    `gradual(cubic(0.9, steps))`. A pruned weight never comes back. The final sparsity
    is reached at the first refresh after the schedule's end, so there must be one.

    Args:
      sparsity: step -> fraction of zeros among the prunable weights.
      score: which weights matter; the largest are kept.
      distribution: how the budget is shared between the leaves; if not given, all
        weights compete (`global_`), and by `uniform` where whole groups live and fall.
      prunable: predicate on (path, leaf).
      selection: which patterns may be live.

    Raises:
      ValueError: the sparsity is a number and not a schedule; or, at `init`, the ends
        of a schedule made by `linear`, `cubic` or `constant` are no sparsities that can
        be reached. Outside of compiled functions every refresh looks at its own.

    >>> from d2sparse.schedules import linear
    >>> rule, key = gradual(linear(0.0, 0.5, 2)), jax.random.key(0)
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    >>> masks = rule.update(rule.init(params, key), params, None, 1, key)
    >>> masks["kernel"].tolist()
    [[False, True], [True, True]]
    """
    check_choices(distribution, selection, score=score)
    if callable(sparsity):
        check_function("sparsity", sparsity, "step", "cubic(0.9, steps)")
    else:
        raise ValueError(
            f"expected a schedule, step -> sparsity, got {sparsity!r}; pass "
            f"`cubic({sparsity!r}, steps)`, or use `one_shot({sparsity!r})`"
        )

    def init(params: PyTree, key: jax.Array) -> PyTree:
        del key
        shapes = tree.shapes(params, prunable)  # Complains where there is none.
        for value in _ends(sparsity):
            _budget(distribution, selection, shapes, value)
        return dense_masks(params)

    prune = _pruner(score, distribution, prunable, selection)

    def noted(
        masks: PyTree, params: PyTree, grads: PyTree, step: Step, key: jax.Array
    ) -> tuple[PyTree, Nan]:
        return prune(masks, params, grads, sparsity(step), key)

    return MaskRule(init, Noting(noted))


def movement(
    sparsity: Schedule,
    distribution: Distribution | None = None,
    prunable: Prunable = is_kernel,
    selection: Selection = masks.select,
) -> MaskRule:
    """Gradual pruning of the weights that training moved most towards zero.

    The score is `-g * w`, summed over all steps so far, which costs one number for
    every weight in the optimiser's state (Sanh et al., arXiv 2005.07683). Arguments as
    in `gradual`.

    >>> from d2sparse.schedules import cubic
    >>> rule, key = movement(cubic(0.5, steps=1)), jax.random.key(0)
    >>> params = {"kernel": jnp.array([[1.0, -4.0]])}
    >>> summed = {"kernel": jnp.array([[0.5, -0.5]])}
    >>> masks = rule.update(rule.init(params, key), params, summed, 1, key)
    >>> masks["kernel"].tolist()
    [[True, False]]
    """
    rule = gradual(sparsity, scores.observed, distribution, prunable, selection)
    return rule._replace(observe=scores.movement())


def largest(
    sparsity: Sparsity,
    score: Score = scores.magnitude,
    distribution: Distribution | None = None,
    prunable: Prunable = is_kernel,
    selection: Selection = masks.select,
) -> MaskRule:
    """The largest scores of all weights, live or not, from the start on.

    For weights that keep their value where the mask is False. Under `freeze` it is the
    backward set of Top-KAST (Jayakumar et al., arXiv 2106.03517), whose exploration
    penalty is left out. The forward set, larger in sparsity, is a part of it if both
    are chosen at every step:

        tx = freeze(inner, largest(backward_sparsity), every(1))
        forward = largest(forward_sparsity).update
        loss(straight_through(params, forward(None, params, None, step, key)))

    Args:
      sparsity: fraction of zeros among the prunable weights, in [0, 1); may be traced.
      score: which weights matter; it has no gradients at the start.
      distribution: how the budget is shared between the leaves; if not given, all
        weights compete (`global_`), and by `uniform` where whole groups live and fall.
      prunable: predicate on (path, leaf).
      selection: which patterns may be live.

    >>> rule, key = largest(0.5), jax.random.key(0)
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    >>> masks = rule.init(params, key)
    >>> masks["kernel"].tolist()
    [[False, True], [True, False]]
    >>> params = {"kernel": jnp.array([[5.0, -4.0], [3.0, 2.0]])}
    >>> rule.update(masks, params, None, 1, key)["kernel"].tolist()
    [[True, True], [False, False]]
    """
    distributions.check_sparsity(sparsity)
    prune = _pruner(score, distribution, prunable, selection)

    def init(params: PyTree, key: jax.Array) -> PyTree:
        return noted(None, params, None, 0, key)[0]

    def noted(
        masks: PyTree, params: PyTree, grads: PyTree, step: Step, key: jax.Array
    ) -> tuple[PyTree, Nan]:
        del masks, step
        return prune(dense_masks(params), params, grads, sparsity, key)

    return MaskRule(init, Noting(noted))


def ac_dc(
    sparsity: Sparsity,
    compressed: When,
    score: Score = scores.magnitude,
    distribution: Distribution | None = None,
    prunable: Prunable = is_kernel,
    selection: Selection = masks.select,
) -> MaskRule:
    """AC/DC: phases of sparse training take turns with phases of dense training.

    A compressed phase begins with the largest magnitudes of all weights; in a
    decompressed phase every weight is live, and what was pruned starts from 0 (Peste et
    al., arXiv 2106.12379). Refresh where phases begin:

        rule = ac_dc(0.9, alternating(500, stop=4000))
        tx = sparsify(inner, rule, every(500))

    Args:
      sparsity: fraction of zeros in compressed phases, in [0, 1); may be traced.
      compressed: step -> whether it belongs to a compressed phase.
      score: which weights matter; the largest are kept.
      distribution: how the budget is shared between the leaves; if not given, all
        weights compete (`global_`), and by `uniform` where whole groups live and fall.
      prunable: predicate on (path, leaf).
      selection: which patterns may be live.

    >>> from d2sparse.schedules import alternating
    >>> rule, key = ac_dc(0.5, alternating(10, stop=30)), jax.random.key(0)
    >>> params = {"kernel": jnp.array([[1.0, -4.0]])}
    >>> masks = rule.init(params, key)
    >>> for step in (10, 20):
    ...     masks = rule.update(masks, params, None, step, key)
    ...     print(masks["kernel"].tolist())
    [[False, True]]
    [[True, True]]
    """
    check_function("compressed", compressed, "step", "alternating(500, stop=4000)")
    sparse = largest(sparsity, score, distribution, prunable, selection)
    init = gradual(constant(sparsity), score, distribution, prunable, selection).init

    def noted(
        masks: PyTree, params: PyTree, grads: PyTree, step: Step, key: jax.Array
    ) -> tuple[PyTree, Nan]:
        chosen, nan = refresh(sparse, masks, params, grads, step, key)
        dense = jnp.logical_not(compressed(step))
        return jax.tree.map(lambda mask: mask | dense, chosen), nan

    return MaskRule(init, Noting(noted))


Prune = Callable[[PyTree, PyTree, PyTree, Sparsity, jax.Array], tuple[PyTree, Nan]]


def _pruner(
    score: Score,
    distribution: Distribution | None,
    prunable: Prunable,
    selection: Selection,
) -> Prune:
    """`(masks, params, grads, sparsity, key) -> (masks, nan)`: largest live scores."""
    check_choices(distribution, selection, score=score)

    def prune(
        masks: PyTree,
        params: PyTree,
        grads: PyTree,
        sparsity: Sparsity,
        key: jax.Array,
    ) -> tuple[PyTree, Nan]:
        shapes = tree.shapes(params, prunable)
        live = tree.pick(masks, shapes, "masks")
        counts = _budget(distribution, selection, shapes, sparsity)
        if isinstance(counts, Mapping):
            counts = _at_most_live(counts, live)
            if isinstance(selection, Pattern):
                counts = selection.lift(shapes, counts)
        choose = plainly(selection)
        kept, nan = largest_scores(choose, score, live, params, grads, counts, key)
        return tree.replace(masks, kept), nan

    return prune


def _budget(
    distribution: Distribution | None,
    selection: Selection,
    shapes: Mapping[str, tuple[int, ...]],
    sparsity: Sparsity,
) -> Counts:
    """What the leaves keep, which a pattern can."""
    share = suited(distribution, selection, distributions.global_)
    counts = distributions.share_budget(share, shapes, sparsity)
    return selection.fit(shapes, counts) if isinstance(selection, Pattern) else counts


def _ends(sparsity: Schedule) -> tuple[Sparsity, ...]:
    """What is known of a schedule before its first step."""
    return (sparsity.start, sparsity.end) if isinstance(sparsity, Ramp) else ()


def _is_traced(values: PyTree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


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
