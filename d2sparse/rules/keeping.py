"""Rules that keep the masks they begin with."""

import jax

from d2sparse import distributions, masks, scores, tree
from d2sparse.checks import check_key
from d2sparse.distributions import Distribution, Sparsity
from d2sparse.masks import Selection, copy_masks, dense_masks
from d2sparse.rules.base import MaskRule, check_choices, chosen, suited
from d2sparse.schedules import Step
from d2sparse.tree import Prunable, PyTree, is_kernel


def fixed(masks: PyTree) -> MaskRule:
    """The given masks for the whole run: a ticket, a pattern, all of them dense.

    Args:
      masks: tree of bool with the structure of the parameters.

    Raises:
      ValueError: at `init`, where the masks do not fit the parameters.

    >>> import jax.numpy as jnp
    >>> rule = fixed({"w": jnp.array([True, False])})
    >>> rule.init({"w": jnp.zeros(2)}, jax.random.key(0))["w"].tolist()
    [True, False]
    """

    def init(params: PyTree, key: jax.Array) -> PyTree:
        del key
        return copy_masks(masks, params)

    return MaskRule(init, _keep)


def nonzero(prunable: Prunable = is_kernel) -> MaskRule:
    """The weights that are not 0 at the start, for the whole run.

    What fine-tunes a network that came with zeros keeps them with it.

    Args:
      prunable: predicate on (path, leaf) of the weights whose zeros stay.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.array([[0.0, 2.0]]), "bias": jnp.zeros(2)}
    >>> masks = nonzero().init(params, jax.random.key(0))
    >>> masks["kernel"].tolist(), masks["bias"].tolist()
    ([[False, True]], [True, True])
    """

    def init(params: PyTree, key: jax.Array) -> PyTree:
        del key
        kernels = tree.prunable_leaves(params, prunable)
        live = {path: leaf != 0 for path, leaf in kernels.items()}
        return tree.replace(dense_masks(params), live)

    return MaskRule(init, _keep)


def static(
    sparsity: Sparsity,
    distribution: Distribution | None = None,
    prunable: Prunable = is_kernel,
    selection: Selection = masks.select,
) -> MaskRule:
    """A random pattern drawn at the start and kept: static sparse training.

    Args:
      sparsity: fraction of zeros among the prunable weights, in [0, 1); may be traced.
      distribution: how the budget is shared between the leaves; if not given, by `erk`,
        and by `uniform` where whole groups live and fall.
      prunable: predicate on (path, leaf).
      selection: which patterns may be live: `masks.select`, `masks.n_of_m(4)`, ...

    Raises:
      ValueError: the sparsity is out of its range; or, at `init`, out of the reach of
        the distribution, or so high that no weight would be live, or none of a leaf
        that is cut into groups.

    >>> import jax.numpy as jnp
    >>> rule = static(0.75)
    >>> masks = rule.init({"kernel": jnp.ones((4, 4))}, jax.random.key(0))
    >>> int(masks["kernel"].sum())
    4
    """
    distributions.check_sparsity(sparsity)
    check_choices(distribution, selection)
    share = suited(distribution, selection, distributions.erk)

    def init(params: PyTree, key: jax.Array) -> PyTree:
        check_key(key)
        shapes = tree.shapes(params, prunable)
        counts = distributions.share_budget(share, shapes, sparsity)
        ranks = scores.random(tree.prunable_leaves(params, prunable), None, key)
        kept = chosen(selection, ranks, counts, None)
        return tree.replace(dense_masks(params), kept)

    return MaskRule(init, _keep)


def _keep(
    masks: PyTree, params: PyTree, grads: PyTree, step: Step, key: jax.Array
) -> PyTree:
    del params, grads, step, key
    return masks
