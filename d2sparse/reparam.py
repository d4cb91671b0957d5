"""Reparametrisations: effective weights as a function of the weights that are trained.

Used as `loss(reparam(params))`: the loss sees sparse weights, the optimiser dense ones.
Nothing else in a training loop changes, and whoever evaluates or stores the network
takes the effective weights too.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from d2sparse import tree
from d2sparse.checks import check_by_path, check_number, is_number
from d2sparse.masks import apply_masks
from d2sparse.tree import Prunable, PyTree, is_kernel


def straight_through(params: PyTree, masks: PyTree) -> PyTree:
    """Masked weights whose gradient passes to all weights, pruned ones too.

    `w_eff = w * m`, and `dw_eff/dw = 1` everywhere: the straight-through estimator
    (Bengio et al., arXiv 1308.3432). The masks are constants of the gradient, also
    where they are computed from the weights.

    Args:
      params: the dense weights.
      masks: tree of bool like the parameters.

    Raises:
      ValueError: the structures or shapes differ.

    >>> params, masks = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])}
    >>> straight_through(params, masks)["w"].tolist()
    [1.0, 0.0]
    >>> jax.grad(lambda p: straight_through(p, masks)["w"].sum())(params)["w"].tolist()
    [1.0, 1.0]
    """
    return jax.tree.map(_in_place_of, apply_masks(params, masks), params)


def sr_ste(params: PyTree, masks: PyTree, decay: float | jax.Array = 2e-4) -> PyTree:
    """Straight-through masked weights, with a pull of the pruned ones towards 0.

    The gradient is `g + decay * (1 - m) * w`, where `g` is the one that reaches the
    effective weights: SR-STE (Zhou et al., arXiv 2102.04010). A weight that is pruned
    then stays so unless its gradient insists, and masks change less often. The masks
    are meant to be computed from the weights at every step, as in the example, which
    keeps 2 of 4.

    The pull is added once for every call and does not scale with the loss: call this
    once per loss, outside of a `jax.vmap` over examples.

    Args:
      params: the dense weights.
      masks: tree of bool like the parameters.
      decay: strength of the pull, at least 0; may be traced.

    Raises:
      ValueError: the structures or shapes differ.

    >>> from d2sparse.masks import n_of_m
    >>> def loss(params):
    ...     masks = n_of_m(4)({"w": jnp.abs(params["w"])}, {"w": 2})
    ...     return sr_ste(params, masks, decay=0.5)["w"].sum()
    >>> params = {"w": jnp.array([[4.0], [-1.0], [2.0], [-3.0]])}
    >>> value, slope = jax.jit(jax.value_and_grad(loss))(params)
    >>> float(value), slope["w"][:, 0].tolist()
    (1.0, [1.0, 0.5, 2.0, 1.0])
    """
    check_number("decay", decay, 0, math.inf)

    def leaf(live: jax.Array, weight: jax.Array) -> jax.Array:
        # A pruned weight that is 0 itself has nothing to be pulled by.
        pruned = jnp.where(live == weight, 0, weight)
        pull = (decay * pruned).astype(weight.dtype)
        return _add_to_gradient(_in_place_of(live, weight), pull)

    return jax.tree.map(leaf, apply_masks(params, masks), params)


def init_thresholds(
    params: PyTree, value: float, prunable: Prunable = is_kernel
) -> dict[str, jax.Array]:
    """The parameters that `soft_threshold` learns, one for every prunable leaf.

    Args:
      params: the weights.
      value: where they start. The threshold is `sigmoid(value)`, so that far below 0
        nothing is pruned at first: -10 is a threshold of 0.000045.
      prunable: predicate on (path, leaf).

    Returns:
      float32[] by path.

    Raises:
      ValueError: no leaf is prunable.

    >>> init_thresholds({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, -10)
    {'kernel': Array(-10., dtype=float32)}
    """
    check_number("value", value, -math.inf, math.inf)
    paths = tree.prunable_leaves(params, prunable)
    return {path: jnp.full((), value, jnp.float32) for path in paths}


def soft_threshold(params: PyTree, thresholds: Mapping[str, jax.Array]) -> PyTree:
    """Weights shrunk by a learned threshold, and exactly 0 below it: STR.

    `w_eff = sign(w) * relu(|w| - sigmoid(s))`, with one scalar `s` for every prunable
    leaf that is trained along with the weights (Kusupati et al., arXiv 2002.03231).
    The gradient of a weight is 0 while it is below its threshold. Weight decay on `s`
    pulls the threshold towards 1/2, and so sets the sparsity that is reached;
    `nonzero_masks` reads it off.

    Args:
      params: the dense weights.
      thresholds: `s`, float[] by path, as `init_thresholds` returns them; a leaf
        without one passes unchanged.

    Raises:
      ValueError: there is a threshold for a path that is not in the tree, or one that
        is no scalar.

    >>> params, s = {"w": jnp.array([0.75, -0.25])}, {"w": jnp.zeros(())}
    >>> soft_threshold(params, s)["w"].tolist()
    [0.25, 0.0]
    """
    check_by_path("thresholds", thresholds, of="scalars")
    tree.replace(params, thresholds)  # Complains of paths that are not in the tree.
    for path, s in thresholds.items():
        if jnp.shape(s):
            raise ValueError(
                f"expected one threshold for the leaf {path!r}, a scalar, got the "
                f"shape {jnp.shape(s)}; start from `init_thresholds`"
            )
    leaves = tree.flatten(params)
    shrunk = {path: _shrink(leaves[path], s) for path, s in thresholds.items()}
    return tree.replace(params, shrunk)


def nonzero_masks(params: PyTree, prunable: Prunable = is_kernel) -> PyTree:
    """Masks of the weights that are not 0, for what sparsifies without masks.

    Args:
      params: effective weights, such as those of `soft_threshold`.
      prunable: predicate on (path, leaf); all other leaves are live throughout.

    Returns:
      Tree of bool like the parameters. NaN is not 0.

    >>> params = {"kernel": jnp.array([[0.5, 0.0]]), "bias": jnp.zeros(2)}
    >>> {path: m.tolist() for path, m in nonzero_masks(params).items()}
    {'bias': [True, True], 'kernel': [[True, False]]}
    """

    def leaf(path: str, weight: jax.Array) -> jax.Array:
        return weight != 0 if prunable(path, weight) else jnp.ones(weight.shape, bool)

    return tree.map_with_path(leaf, params)


def powerprop(
    params: PyTree, alpha: float | jax.Array, prunable: Prunable = is_kernel
) -> PyTree:
    """Weights as powers of what is trained, so that small ones move slowly.

    `w_eff = theta * |theta|^(alpha - 1)`: Powerpropagation (Schwarz et al., arXiv
    2110.00296). The gradient is scaled by `alpha * |theta|^(alpha - 1)`; weights crowd
    around 0 and more of them can be pruned. For alpha > 1 the gradient vanishes at 0: a
    weight that is exactly 0 stays so, and hardly one changes its sign. With alpha = 1
    this is the identity.

    Args:
      params: `theta`; to start from given weights, take `powerprop_inverse` of them.
      alpha: the power, at least 1; may be traced. No gradient flows to it.
      prunable: predicate on (path, leaf); all other leaves pass unchanged.

    Raises:
      ValueError: alpha is below 1, or no leaf is prunable.

    >>> powerprop({"kernel": jnp.array([[-3.0, 0.5]])}, 2.0)["kernel"].tolist()
    [[-9.0, 0.25]]
    """
    _check_alpha(alpha)
    leaves = tree.prunable_leaves(params, prunable)
    powers = {p: _power(x, jnp.asarray(alpha, x.dtype)) for p, x in leaves.items()}
    return tree.replace(params, powers)


def powerprop_inverse(
    params: PyTree, alpha: float | jax.Array, prunable: Prunable = is_kernel
) -> PyTree:
    """The parameters for which `powerprop` gives these weights, up to rounding.

    `theta = sign(w) * |w|^(1 / alpha)`.

    Args:
      params: weights, such as those of an ordinary initialisation.
      alpha: the power, at least 1; may be traced.
      prunable: predicate on (path, leaf); all other leaves pass unchanged.

    Raises:
      ValueError: alpha is below 1, or no leaf is prunable.

    >>> powerprop_inverse({"kernel": jnp.array([[-9.0, 0.25]])}, 2.0)["kernel"].tolist()
    [[-3.0, 0.5]]
    """
    _check_alpha(alpha)
    leaves = tree.prunable_leaves(params, prunable)
    roots = {p: _root(x, jnp.asarray(alpha, x.dtype)) for p, x in leaves.items()}
    return tree.replace(params, roots)


@jax.custom_jvp
def _in_place_of(value: jax.Array, weight: jax.Array) -> jax.Array:
    """The value, with the derivative of the weight."""
    del weight
    return value


_in_place_of.defjvps(None, lambda tangent, out, value, weight: tangent)


@jax.custom_vjp
def _add_to_gradient(weight: jax.Array, change: jax.Array) -> jax.Array:
    """The weight, whose gradient is larger by `change`."""
    del change
    return weight


_add_to_gradient.defvjp(
    lambda weight, change: (weight, change),
    lambda change, gradient: (gradient + change, None),
)


def _shrink(weight: jax.Array, s: jax.Array) -> jax.Array:
    excess = jnp.abs(weight) - jax.nn.sigmoid(s).astype(weight.dtype)
    # In this order a weight that is NaN stays visible, and a zero has no sign.
    return jnp.where(excess <= 0, 0, jnp.sign(weight) * excess)


@jax.custom_jvp
def _power(theta: jax.Array, alpha: jax.Array) -> jax.Array:
    return theta * jnp.abs(theta) ** (alpha - 1)


# The product rule would give 0 times infinity at 0.
_power.defjvps(
    lambda tangent, out, theta, alpha: alpha * jnp.abs(theta) ** (alpha - 1) * tangent,
    None,
)


def _root(weight: jax.Array, alpha: jax.Array) -> jax.Array:
    return jnp.sign(weight) * jnp.abs(weight) ** (1 / alpha)


def _check_alpha(alpha: float | jax.Array) -> None:
    if isinstance(alpha, jax.core.Tracer):
        return
    if not is_number(alpha) or not float(alpha) >= 1:
        raise ValueError(
            f"expected alpha of at least 1, got {alpha!r}; 1 is the identity, larger "
            "powers favour large weights"
        )
