"""Penalties on groups of weights that live or fall together: neurons and channels.

Groups are named by sets: `{name: {path of a leaf: axis}}`. Index j along the axes of
all leaves of a set is its group j. A neuron is an output of a kernel, with its bias or
not; a channel is also what the next layers make of it:

    {"conv1": {"conv1/kernel": -1, "conv1/bias": 0, "conv2/kernel": -2}}

The first leaf of a set says how many groups there are. An axis may hold several rounds
of them: between a convolution of n channels and a dense layer, `(height, width, n)` is
flattened, and input i belongs to channel `i mod n`.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from d2sparse import tree
from d2sparse.checks import check_by_path
from d2sparse.regularizers.weights import ratio_of_norms, root
from d2sparse.scores.local import widen
from d2sparse.tree import Prunable, PyTree

Groups = Mapping[str, Mapping[str, int]]


def neurons(
    params: PyTree, prunable: Prunable = tree.is_kernel, bias: bool = False
) -> Groups:
    """The neurons of every kernel: its outputs, the last axis.

    Args:
      params: weights, or shapes of them.
      prunable: predicate on (path, leaf), which kernels. Leave out the output layer
        where neurons are to be removed: its neurons are the classes.
      bias: whether a neuron's bias belongs to it, the leaf called `bias` beside its
        kernel.

    Returns:
      A set of groups by the path of every kernel.

    >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    >>> neurons(params, bias=True)
    {'dense/kernel': {'dense/kernel': -1, 'dense/bias': -1}}
    """
    leaves = tree.flatten(params)

    def members(path: str, kernel: jax.Array) -> dict[str, int]:
        beside = "/".join([*path.split("/")[:-1], "bias"])
        fits = beside in leaves and leaves[beside].shape == kernel.shape[-1:]
        return {path: -1, **({beside: -1} if bias and fits else {})}

    chosen = tree.prunable_leaves(params, prunable)
    return {path: members(path, kernel) for path, kernel in chosen.items()}


def group_sizes(params: PyTree, groups: Groups) -> dict[str, int]:
    """How many weights a group of each set has.

    Raises:
      ValueError: the groups do not fit the parameters.

    >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    >>> group_sizes(params, neurons(params, bias=True))
    {'dense/kernel': 4}
    """
    counts = _counts(params, groups)
    leaves = tree.flatten(params)
    return {
        name: sum(math.prod(leaves[path].shape) for path in members) // counts[name]
        for name, members in groups.items()
    }


def group_norms(params: PyTree, groups: Groups) -> dict[str, jax.Array]:
    """The Euclidean norm of every group, float[groups] by set.

    Derivatives of the norm of a group of zeros are 0.

    Raises:
      ValueError: the groups do not fit the parameters.

    >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]])}
    >>> group_norms(params, neurons(params))["kernel"].tolist()
    [5.0, 0.0]
    """
    counts, leaves = _counts(params, groups), tree.flatten(params)

    def squares(path: str, axis: int, count: int) -> jax.Array:
        rows = jnp.moveaxis(widen(leaves[path]), axis, -1).reshape(-1, count)
        return jnp.sum(jnp.square(rows), axis=0)

    def norms(name: str) -> jax.Array:
        each = (squares(p, a, counts[name]) for p, a in groups[name].items())
        return root(sum(each, start=jnp.zeros(counts[name], jnp.float32)))

    return {name: norms(name) for name in groups}


def group_lasso(
    params: PyTree, prunable: Prunable = tree.is_kernel, groups: Groups | None = None
) -> jax.Array:
    """Norms of all groups, `sum_g sqrt(size_g) |w_g|`.

    Weighted by size, groups of large and of small layers compete fairly (Yuan and Lin,
    2006). Structured sparsity of networks: Wen et al., arXiv 1608.03665.

    Args:
      params: weights.
      prunable: predicate on (path, leaf), whose neurons are the groups.
      groups: other groups, in place of these; they may share weights.

    Returns:
      float[].

    Raises:
      ValueError: the groups do not fit the parameters.

    >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0], [0.0, 0.0], [0.0, 0.0]])}
    >>> float(group_lasso(params))
    10.0
    """
    groups = neurons(params, prunable) if groups is None else groups
    sizes, norms = group_sizes(params, groups), group_norms(params, groups)
    each = (math.sqrt(sizes[name]) * jnp.sum(norms[name]) for name in groups)
    return sum(each, start=jnp.zeros((), jnp.float32))


def group_hoyer_square(
    params: PyTree, prunable: Prunable = tree.is_kernel, groups: Groups | None = None
) -> jax.Array:
    """DeepHoyer of groups, `(sum_g |w_g|)^2 / sum_g |w_g|^2` in every set, summed up.

    Of a set with k groups of one norm and others of zeros it is k, at any scale
    (Yang et al., arXiv 1908.09979).

    Args:
      params: weights.
      prunable: predicate on (path, leaf), whose neurons are the groups.
      groups: other groups, in place of these.

    Returns:
      float[].

    Raises:
      ValueError: the groups do not fit the parameters.

    >>> params = {"kernel": jnp.array([[3.0, 5.0, 0.0], [4.0, 0.0, 0.0]])}
    >>> float(group_hoyer_square(params))
    2.0
    """
    groups = neurons(params, prunable) if groups is None else groups
    each = (ratio_of_norms(norms) for norms in group_norms(params, groups).values())
    return sum(each, start=jnp.zeros((), jnp.float32))


def group_soft_threshold(
    params: PyTree,
    strength: float | jax.Array,
    prunable: Prunable = tree.is_kernel,
    groups: Groups | None = None,
) -> PyTree:
    """Proximal operator of `group_lasso`.

    `w_g max(0, 1 - strength sqrt(size_g) / |w_g|)`: groups whose root mean square is no
    more than the strength become exactly 0.

    Args:
      params: weights.
      strength: at least 0.
      prunable: predicate on (path, leaf), whose neurons are the groups.
      groups: other groups, in place of these. None may share weights with another: the
        operator has no closed form there.

    Returns:
      A tree like the parameters; what is in no group stays.

    Raises:
      ValueError: the groups do not fit the parameters, or share weights.

    >>> params = {"kernel": jnp.array([[3.0, 1.0], [4.0, 0.0]])}
    >>> group_soft_threshold(params, 2.5 / 2**0.5)["kernel"].tolist()
    [[1.5, 0.0], [2.0, 0.0]]
    """
    groups = neurons(params, prunable) if groups is None else groups
    sizes, norms = group_sizes(params, groups), group_norms(params, groups)
    factors = {
        name: soft_factors(norms[name] / math.sqrt(sizes[name]), strength)
        for name in groups
    }
    return scale_groups(params, groups, factors)


def soft_factors(sizes: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """`max(0, 1 - threshold / size)`: 0 where the size is no more than the threshold.

    Of NaN it is NaN.

    >>> soft_factors(jnp.array([0.0, 1.0, 4.0]), 1.0).tolist()
    [0.0, 0.0, 0.75]
    """
    falls = sizes <= threshold
    return jnp.where(falls, 0, 1 - threshold / jnp.where(falls, 1, sizes))


def scale_groups(
    params: PyTree, groups: Groups, factors: Mapping[str, jax.Array]
) -> PyTree:
    """The parameters with every group multiplied by a number of its own.

    Args:
      params: weights.
      groups: none of which shares weights with another.
      factors: float[groups] by set.

    Returns:
      A tree like the parameters.

    Raises:
      ValueError: the groups do not fit the parameters, or share weights.

    >>> params = {"kernel": jnp.ones((1, 2))}
    >>> scale_groups(params, neurons(params), {"kernel": jnp.array([0.0, 2.0])})
    {'kernel': Array([[0., 2.]], dtype=float32)}
    """
    _counts(params, groups)
    _refuse_shared(groups)
    leaves, scaled = tree.flatten(params), {}
    for name, members in groups.items():
        for path, axis in members.items():
            leaf, each = leaves[path], factors[name]
            shape = [1] * leaf.ndim
            shape[axis] = leaf.shape[axis]
            each = jnp.tile(each, leaf.shape[axis] // each.size).reshape(shape)
            scaled[path] = (leaf * each).astype(leaf.dtype)
    return tree.replace(params, scaled)


def _counts(params: PyTree, groups: Groups) -> dict[str, int]:
    """How many groups each set has.

    Raises:
      ValueError: a set is no mapping of paths to axes, or does not fit.
    """
    check_by_path("groups", groups, of="sets of axes")
    counts: dict[str, int] = {}
    for name, members in groups.items():
        check_by_path(f"groups[{name!r}]", members, of="axes")
        leaves = tree.pick(params, members, "the parameters")
        for path, axis in members.items():
            shape = leaves[path].shape
            length = shape[axis] if -len(shape) <= axis < len(shape) else 0
            count = counts.setdefault(name, length)
            if not length or length % count:
                raise ValueError(
                    f"expected a multiple of {count or 'some'} entries along axis "
                    f"{axis} of {path!r}, one of every group of {name!r}, got shape "
                    f"{shape}; name the leaf first whose axis has one entry per group"
                )
    return counts


def _refuse_shared(groups: Groups) -> None:
    paths = [path for members in groups.values() for path in members]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise ValueError(
            f"expected groups that share no weights, got {twice} in several sets; name "
            "every leaf in one of them, or add the penalty to the loss instead"
        )
