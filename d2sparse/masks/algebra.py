"""Mask algebra: apply, copy, count."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2sparse import tree
from d2sparse.masks.layout import count_true
from d2sparse.tree import Prunable, PyTree, is_kernel


def dense_masks(params: PyTree) -> PyTree:
    """The mask tree under which every weight is live.

    >>> dense_masks({"bias": jnp.zeros(2)})["bias"].tolist()
    [True, True]
    """
    return jax.tree.map(lambda leaf: jnp.ones_like(leaf, bool), params)


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Parameters with every pruned weight set to exactly 0.

    Args:
      params: tree of parameters, or anything of their structure (gradients, moments).
      masks: tree of bool with the same structure. Where it holds `optax.MaskedNode`, as
        the masks of one branch of `optax.partition` do, the parameters are kept.

    Raises:
      ValueError: the structures or shapes differ.

    >>> apply_masks({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})
    {'w': Array([1., 0.], dtype=float32)}
    """

    def leaf(path: Any, mask: Any, param: Any) -> Any:
        if is_gap(mask):
            return param
        if mask.shape != param.shape:
            raise ValueError(
                f"expected a mask of shape {param.shape} at "
                f"{tree.path_name(path)!r}, got "
                f"{mask.shape}; take the masks from the state of these parameters"
            )
        return jnp.where(mask, param, jnp.zeros_like(param))

    refuse_other_paths(masks, params)
    return jax.tree_util.tree_map_with_path(leaf, masks, params, is_leaf=is_gap)


def copy_masks(masks: PyTree, like: PyTree) -> PyTree:
    """Copies of masks for a tree of parameters, which may be a part of theirs.

    They are copies, so that a state with them may be donated.

    Args:
      masks: tree of bool with the structure of all parameters.
      like: parameters or masks. Where it holds `optax.MaskedNode`, as what one branch
        of `optax.partition` sees does, so does the copy.

    Raises:
      ValueError: the structures or shapes differ.

    >>> given = {"w": jnp.array([True, False]), "b": jnp.array([True])}
    >>> copy_masks(given, {"w": jnp.zeros(2), "b": optax.MaskedNode()})
    {'b': MaskedNode(), 'w': Array([ True, False], dtype=bool)}
    """

    def copied(node: Any, mask: Any) -> Any:
        return node if is_gap(node) else jnp.array(mask, bool)

    refuse_other_paths(masks, like)
    copies = jax.tree.map(copied, like, masks, is_leaf=is_gap)
    apply_masks(like, copies)  # Complains where the shapes differ.
    return copies


def refuse_other_paths(masks: PyTree, like: PyTree) -> None:
    """Raises where masks have other leaves than the tree they are for.

    Where either of them has a gap, anything may be in the other.

    Raises:
      ValueError: naming the paths that are missing and those that are unknown.

    >>> refuse_other_paths({"w": True}, {"w": 1.0})
    """
    if _structure(masks) == _structure(like):
        return
    found, gaps = _paths_and_gaps(masks)
    expected, others = _paths_and_gaps(like)
    hidden = tuple(f"{path}/" for path in gaps | others)
    missing = [p for p in expected - found if not f"{p}/".startswith(hidden)]
    unknown = [p for p in found - expected if not f"{p}/".startswith(hidden)]
    if missing or unknown:
        raise ValueError(
            "expected masks of the structure of the parameters, got none for "
            f"{sorted(missing)} and unknown ones for {sorted(unknown)}; take the masks "
            "from the state of these parameters"
        )
    if not gaps | others:
        raise ValueError(
            "expected masks of the structure of the parameters, got the same paths in "
            f"other nodes: {type(masks).__name__} and {type(like).__name__}, or nodes "
            "inside of them; make them alike, states of Flax NNX by "
            "`nnx.to_pure_dict` of both"
        )


def is_gap(node: Any) -> bool:
    """Whether a node stands where a wrapper such as `optax.partition` hid a leaf.

    >>> is_gap(optax.MaskedNode())
    True
    """
    return isinstance(node, optax.MaskedNode)


def count(masks: PyTree, prunable: Prunable = is_kernel) -> dict[str, jax.Array]:
    """Number of live weights in every prunable leaf, by path.

    >>> {p: int(n) for p, n in count({"kernel": jnp.eye(3, dtype=bool)}).items()}
    {'kernel': 3}
    """
    leaves = tree.flatten(masks)
    return {path: count_live(leaves[path]) for path in _paths(masks, prunable)}


def count_all(masks: PyTree, prunable: Prunable = is_kernel) -> jax.Array:
    """Number of live weights in all prunable leaves together.

    It is int32 and exact; of trees with 2^31 weights and more it is float32, right to
    about 1e-7 of itself, as is every number that is divided by it. A single leaf is
    counted in int32 and has to be smaller.

    >>> print(count_all({"kernel": jnp.eye(3, dtype=bool)}))
    3
    """
    leaves = tree.flatten(masks)
    size = sum(leaves[path].size for path in _paths(masks, prunable))
    dtype = jnp.int32 if size < 1 << 31 else jnp.float32
    live = count(masks, prunable).values()
    return sum((number.astype(dtype) for number in live), jnp.zeros((), dtype))


@jax.jit
def count_live(mask: jax.Array) -> jax.Array:
    """Number of live entries of one mask, int32[].

    >>> int(count_live(jnp.eye(3, dtype=bool)))
    3
    """
    return count_true([mask, ~mask])[0]


def density(masks: PyTree, prunable: Prunable = is_kernel) -> jax.Array:
    """Fraction of the prunable weights that is live.

    Masks do not know the types of their weights: where matrices of integers are among
    the parameters, which no rule prunes, give a predicate that leaves their paths out.

    >>> print(density({"kernel": jnp.eye(4, dtype=bool), "bias": jnp.ones(4, bool)}))
    0.25
    """
    leaves = tree.flatten(masks)
    total = sum(leaves[path].size for path in _paths(masks, prunable))
    return count_all(masks, prunable) / jnp.float32(total)


def sparsity(masks: PyTree, prunable: Prunable = is_kernel) -> jax.Array:
    """Fraction of the prunable weights that is zero: one minus the density.

    >>> print(sparsity({"kernel": jnp.eye(4, dtype=bool), "bias": jnp.ones(4, bool)}))
    0.75
    """
    return 1 - density(masks, prunable)


def _structure(tree: PyTree) -> Any:
    return jax.tree.structure(tree, is_leaf=is_gap)


def _paths_and_gaps(masks: PyTree) -> tuple[set[str], set[str]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(masks, is_leaf=is_gap)
    gaps = {tree.path_name(path) for path, leaf in leaves if is_gap(leaf)}
    return {tree.path_name(path) for path, _ in leaves} - gaps, gaps


def _paths(masks: PyTree, prunable: Prunable) -> list[str]:
    for path, mask in tree.flatten(masks).items():
        kind = getattr(mask, "dtype", mask)
        if not isinstance(kind, np.dtype) or kind.kind != "b":
            raise ValueError(
                f"expected masks of bool, got {kind} at {path!r}; numbers that are 0 "
                "where a weight is pruned become masks by `!= 0`"
            )
    # The predicate asks for parameters: show it the shapes with a floating dtype.
    as_params = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, "float32"), masks)
    return list(tree.prunable_leaves(as_params, prunable))
