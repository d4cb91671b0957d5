"""Rules that move the live weights: some fall and as many grow."""

import jax
import jax.numpy as jnp
import optax

from d2sparse import masks, scores, tree
from d2sparse.checks import check_function, check_key, check_number
from d2sparse.distributions import Distribution, Sparsity
from d2sparse.masks import Pattern, Selection, count_live, select
from d2sparse.rules.base import (
    MaskRule,
    Nan,
    Noting,
    check_choices,
    either,
    largest_scores,
    plainly,
    refresh,
)
from d2sparse.rules.keeping import static
from d2sparse.rules.pruning import gradual
from d2sparse.schedules import Schedule, Step
from d2sparse.scores import Score
from d2sparse.tree import Prunable, PyTree, is_kernel


def prune_and_grow(
    sparsity: Sparsity,
    growth: Score,
    drop_fraction: Schedule | float = 0.3,
    distribution: Distribution | None = None,
    prunable: Prunable = is_kernel,
    selection: Selection = masks.select,
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
        keeps the number of every leaf. If not given, by `erk`, and by `uniform` where
        whole groups live and fall.
      prunable: predicate on (path, leaf).
      selection: which patterns may be live. Whole blocks and channels fall and grow;
        of n:m the number that falls in a group is rounded, so that below a fraction of
        `1 / (2 n)` none does, and one stays in any case.

    Raises:
      ValueError: a number is out of its range, or a word stands for a function.

    >>> rule, key = prune_and_grow(0.5, scores.gradient, 0.5), jax.random.key(0)
    >>> params = {"kernel": jnp.array([[1.0, 4.0], [0.0, 0.0]])}
    >>> masks = {"kernel": jnp.array([[True, True], [False, False]])}
    >>> grads = {"kernel": jnp.array([[0.0, 0.0], [0.1, 0.2]])}
    >>> rule.update(masks, params, grads, 0, key)["kernel"].tolist()
    [[False, True], [False, True]]
    """
    begin = static(sparsity, distribution, prunable, selection)
    check_choices(distribution, selection, growth=growth)
    _check_fraction(drop_fraction)
    choose = plainly(selection)

    def noted(
        masks: PyTree, params: PyTree, grads: PyTree, step: Step, key: jax.Array
    ) -> tuple[PyTree, Nan]:
        check_key(key)
        shapes = tree.shapes(params, prunable)
        live = tree.pick(masks, shapes, "masks")
        fraction = drop_fraction(step) if callable(drop_fraction) else drop_fraction
        counts = {path: count_live(mask) for path, mask in live.items()}
        stays = {path: n - _share(fraction, n) for path, n in counts.items()}
        if isinstance(selection, Pattern):
            stays = selection.lift(shapes, stays)
        kept, nan = largest_scores(choose, scores.magnitude, live, params, grads, stays)
        if selection is not select:
            # Of patterns whole groups stay, not always as many as were asked for.
            stays = {path: count_live(mask) for path, mask in kept.items()}

        growth_key, tie_key = jax.random.split(key)
        falls = {path: counts[path] - stays[path] for path in live}
        others = {path: ~mask for path, mask in kept.items()}
        grown, nan_outside = largest_scores(
            choose, growth, others, params, grads, falls, growth_key, tie_key
        )
        moved = {path: kept[path] | grown[path] for path in live}
        return tree.replace(masks, moved), either(nan, nan_outside)

    return MaskRule(begin.init, Noting(noted))


def set_(
    sparsity: Sparsity,
    drop_fraction: Schedule | float = 0.3,
    distribution: Distribution | None = None,
    prunable: Prunable = is_kernel,
    selection: Selection = masks.select,
) -> MaskRule:
    """Sparse evolutionary training: small weights fall, random ones grow.

    Mocanu et al., arXiv 1707.04780, with the smallest magnitudes falling, whatever
    their sign, and new weights at 0. All growth scores are alike, so that ties, which
    go to random weights, decide. Arguments as in `prune_and_grow`.

    >>> params = {"kernel": jnp.ones((10, 10))}
    >>> int(set_(0.9).init(params, jax.random.key(0))["kernel"].sum())
    10
    """
    return prune_and_grow(
        sparsity, scores.constant, drop_fraction, distribution, prunable, selection
    )


def rigl(
    sparsity: Sparsity,
    drop_fraction: Schedule | float = 0.3,
    distribution: Distribution | None = None,
    prunable: Prunable = is_kernel,
    selection: Selection = masks.select,
) -> MaskRule:
    """RigL: small weights fall, those with the largest gradients grow.

    Evci et al., arXiv 1911.11134. The paper lets the drop fraction fall along
    `cosine(0.3, steps)` and stops refreshing at three quarters of the run, which is
    `every(100, stop=steps)`. There a refresh takes the place of a gradient step; under
    `sparsify` the step is taken too, under the new masks. Arguments as in
    `prune_and_grow`.

    >>> params = {"kernel": jnp.ones((10, 10))}
    >>> int(rigl(0.9).init(params, jax.random.key(0))["kernel"].sum())
    10
    """
    return prune_and_grow(
        sparsity, scores.gradient, drop_fraction, distribution, prunable, selection
    )


def sparse_momentum(
    sparsity: Sparsity,
    drop_fraction: Schedule | float = 0.3,
    distribution: Distribution | None = None,
    prunable: Prunable = is_kernel,
    selection: Selection = masks.select,
    decay: float = 0.9,
) -> MaskRule:
    """Small weights fall, those with the largest momentum of the gradient grow.

    The growth criterion of Dettmers and Zettlemoyer (arXiv 1907.04840), whose
    redistribution of the budget between layers is left out. The momentum is that of
    the dense gradient, `m = decay * m + (1 - decay) * g` at every step, which costs one
    number for every weight in the optimiser's state. Arguments as in `prune_and_grow`.

    >>> params = {"kernel": jnp.ones((10, 10))}
    >>> int(sparse_momentum(0.9).init(params, jax.random.key(0))["kernel"].sum())
    10
    """
    check_number("decay", decay, 0, 1)
    rule = rigl(sparsity, drop_fraction, distribution, prunable, selection)
    return rule._replace(observe=optax.ema(decay, debias=False))


def granet(
    sparsity: Schedule,
    drop_fraction: Schedule | float = 0.5,
    distribution: Distribution | None = None,
    prunable: Prunable = is_kernel,
    selection: Selection = masks.select,
) -> MaskRule:
    """GraNet: gradual pruning, and at every refresh a part of what is left moves.

    A refresh prunes the smallest live magnitudes to the sparsity of the schedule, as
    `gradual` does, then moves a fraction of every leaf as `rigl` does (Liu et al.,
    arXiv 2106.10404). The schedule begins at the sparsity of the random pattern that
    training starts from, shared by `erk`: `cubic(0.9, steps, start=0.5)` is sparse from
    the start, and `start=0.0` begins dense.

    Args:
      sparsity: step -> fraction of zeros among the prunable weights.
      drop_fraction: step -> fraction of the live weights that falls, or a number.
      distribution: over which leaves pruning shares the budget; if not given, over all
        of them together, or by `uniform`, also at the start, where whole groups live
        and fall.
      prunable: predicate on (path, leaf).
      selection: which patterns may be live.

    Raises:
      ValueError: as `gradual`.

    >>> from d2sparse.schedules import linear
    >>> rule, key = granet(linear(0.0, 0.5, 2), 0.5), jax.random.key(0)
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    >>> grads = {"kernel": jnp.array([[9.0, 0.0], [0.0, 0.0]])}
    >>> masks = jax.jit(rule.init)(params, key)
    >>> jax.jit(rule.update)(masks, params, grads, 2, key)["kernel"].tolist()
    [[True, True], [False, False]]
    """
    prune = gradual(sparsity, scores.magnitude, distribution, prunable, selection)
    move = prune_and_grow(
        0.0, scores.gradient, drop_fraction, None, prunable, selection
    )

    def init(params: PyTree, key: jax.Array) -> PyTree:
        prune.init(params, key)  # Complains of a schedule that cannot be followed.
        begin = static(sparsity(0), None, prunable, selection)
        return begin.init(params, key)

    def noted(
        masks: PyTree, params: PyTree, grads: PyTree, step: Step, key: jax.Array
    ) -> tuple[PyTree, Nan]:
        masks, nan = refresh(prune, masks, params, grads, step, key)
        masks, nan_moving = refresh(move, masks, params, grads, step, key)
        return masks, either(nan, nan_moving)

    return MaskRule(init, Noting(noted))


def _check_fraction(fraction: Schedule | float) -> None:
    if callable(fraction):
        check_function("drop_fraction", fraction, "step", "cosine(0.3, steps)")
    else:
        check_number("drop_fraction", fraction, 0, 1)


def _share(fraction: jax.Array | float, count: jax.Array) -> jax.Array:
    share = jnp.floor(jnp.float32(fraction) * count).astype(jnp.int32)
    return jnp.clip(share, 0, count)  # A schedule may leave [0, 1]; the density holds.
