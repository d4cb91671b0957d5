"""The masks in an optimiser's state: what holds them, finding and replacing them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2sparse import tree
from d2sparse.masks import apply_masks, copy_masks, is_gap
from d2sparse.tree import PyTree


class SparsifyState(NamedTuple):
    """State of `sparsify`.

    Attributes:
      step: int32[], the number of updates so far.
      key: uint32[words], data of the random key the rule draws from, never changed.
      masks: tree of bool like the parameters.
      inner: state of the inner optimiser.
      observed: state of what the rule observes, empty where that is the gradient.
      nan: bool[leaves], which leaves had a NaN in their weights, gradients or scores at
        a refresh; `check_refreshes` reports them.
      revived: bool[leaves], which leaves had pruned weights that were not 0 at the
        second update or at a later refresh; `check_refreshes` reports them too.
    """

    step: jax.Array
    key: jax.Array
    masks: PyTree
    inner: optax.OptState
    observed: optax.OptState
    nan: jax.Array
    revived: jax.Array


class FreezeState(NamedTuple):
    """State of `freeze`: the fields of `SparsifyState`, of which none is revived."""

    step: jax.Array
    key: jax.Array
    masks: PyTree
    inner: optax.OptState
    observed: optax.OptState
    nan: jax.Array
    revived: jax.Array


def get_masks(opt_state: optax.OptState) -> PyTree:
    """The masks in an optimiser's state, however deep `sparsify` is nested in it.

    Where several branches of `optax.partition` are sparse, their masks are merged; a
    leaf that no branch masks holds `optax.MaskedNode`, which `apply_masks` passes over.
    In the state of a Flax `nnx.Optimizer` masks are variables of another type than
    parameters: `nnx.to_pure_dict` of both makes their trees alike.

    Args:
      opt_state: state of an optimiser that holds one `sparsify` or `freeze`, or one per
        branch.

    Returns:
      Tree of bool like the parameters.

    Raises:
      ValueError: there is no `sparsify` in the state, or two mask the same leaf.

    >>> from d2sparse.rules import static
    >>> from d2sparse.transforms import sparsify
    >>> tx = optax.chain(optax.clip(1.0), sparsify(optax.sgd(0.1), static(0.5)))
    >>> get_masks(tx.init({"kernel": jnp.ones((2, 2))}))["kernel"].shape
    (2, 2)
    """
    found = [state.masks for state in mask_states(opt_state)]
    if not found:
        raise ValueError(
            "expected the state of an optimiser made by `sparsify`, got a state "
            "without masks; was it made by the wrapped optimiser's `init`?"
        )
    masks, *others = found
    for other in others:
        masks = _merged(masks, other)
    return masks


def set_masks(opt_state: optax.OptState, masks: PyTree) -> optax.OptState:
    """The state with other masks: to start from a ticket or a pattern of your own.

    Args:
      opt_state: state of an optimiser that holds one `sparsify`.
      masks: tree of bool like the parameters.

    Raises:
      ValueError: there is no `sparsify` in the state, or the masks do not fit.

    >>> from d2sparse.rules import static
    >>> from d2sparse.transforms import sparsify
    >>> tx = sparsify(optax.sgd(0.1), static(0.5))
    >>> state = tx.init({"kernel": jnp.ones((2, 2))})
    >>> state = set_masks(state, {"kernel": jnp.eye(2, dtype=bool)})
    >>> get_masks(state)["kernel"].tolist()
    [[True, False], [False, True]]
    """
    get_masks(opt_state)  # Complains where there are none.

    def replaced(node: Any) -> Any:
        if not _has_masks(node):
            return node
        return node._replace(masks=copy_masks(masks, node.masks))

    return jax.tree.map(replaced, opt_state, is_leaf=_has_masks)


def sparse_states(opt_state: optax.OptState) -> list[SparsifyState]:
    """The states of every `sparsify` in an optimiser's state; none if it is dense.

    >>> sparse_states(optax.sgd(0.1).init({"kernel": jnp.ones((2, 2))}))
    []
    """
    return [s for s in mask_states(opt_state) if isinstance(s, SparsifyState)]


def zero_pruned(params: PyTree, opt_state: optax.OptState) -> PyTree:
    """The parameters with what every `sparsify` in the state prunes set to exactly 0.

    Weights that a `freeze` in the same state holds are kept as they are.

    >>> from d2sparse.rules import fixed
    >>> from d2sparse.transforms import freeze, sparsify
    >>> params = {"kernel": jnp.ones((1, 2))}
    >>> rule = fixed({"kernel": jnp.array([[True, False]])})
    >>> for wrap in (sparsify, freeze):
    ...     state = wrap(optax.sgd(0.1), rule).init(params)
    ...     print(zero_pruned(params, state)["kernel"].tolist())
    [[1.0, 0.0]]
    [[1.0, 1.0]]
    """
    sparse = sparse_states(opt_state)
    return apply_masks(params, get_masks(sparse)) if sparse else params


def mask_states(opt_state: optax.OptState) -> list[Any]:
    """The states of every `sparsify` and `freeze`, in the order of the tree.

    >>> mask_states(optax.sgd(0.1).init(jnp.ones(2)))
    []
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=_has_masks)
    return [node for node in nodes if _has_masks(node)]


def check_refreshes(opt_state: optax.OptState) -> None:
    """Raises if a refresh of the masks met a NaN, or if pruned weights came back.

    A compiled function cannot raise. There a score that is NaN counts as the lowest,
    the leaf is noted in the state, and this function reports it; NaN in weights and
    gradients is noted too. Scores of a rule of your own are noted if the rule's
    `update` is a `d2sparse.rules.Noting`. `d2sparse.train` leaves such updates out by
    itself.

    At its second update and at every later refresh `sparsify` also notes leaves whose
    pruned weights are not 0: what comes after it in a chain or around it has changed
    its updates. `check_sparse` looks at the parameters themselves.

    Args:
      opt_state: state of an optimiser, outside of compiled functions.

    Raises:
      ValueError: naming the leaves.

    >>> from d2sparse.rules import static
    >>> from d2sparse.transforms import sparsify
    >>> check_refreshes(sparsify(optax.sgd(0.1), static(0.5)).init(jnp.ones((2, 2))))
    """
    for state in mask_states(opt_state):
        if paths := _noted_paths(state.nan, state.masks):
            raise ValueError(
                "expected weights, gradients and scores without NaN at a refresh of "
                f"the masks, got NaN in {paths}; lower the learning rate, clip the "
                "gradient, or look for a division by zero in the loss or the score"
            )
        if paths := _noted_paths(state.revived, state.masks):
            raise ValueError(
                "expected pruned weights to be 0 after an update, got others in "
                f"{paths}; {_KEEP_SPARSE}"
            )


def check_sparse(params: PyTree, opt_state: optax.OptState) -> None:
    """Raises if weights that `sparsify` has pruned are not exactly 0.

    What comes after `sparsify` in an `optax.chain`, or wraps it, may scale, average or
    replace its updates; then the masks say sparse and the parameters are dense. This
    holds for evaluation parameters too, such as those of `schedule_free_eval_params`.

    Args:
      params: tree of parameters, outside of compiled functions.
      opt_state: state of an optimiser that holds one `sparsify`, or one per branch.

    Raises:
      ValueError: naming the leaves; or there is no `sparsify` in the state.

    >>> from d2sparse.masks import apply_masks
    >>> from d2sparse.rules import static
    >>> from d2sparse.transforms import sparsify
    >>> params = {"kernel": jnp.ones((2, 2))}
    >>> state = sparsify(optax.sgd(0.1), static(0.5)).init(params)
    >>> check_sparse(apply_masks(params, get_masks(state)), state)
    """
    masks = tree.flatten(get_masks(sparse_states(opt_state)))
    leaves = tree.flatten(params)
    if missing := sorted(set(masks) - set(leaves)):
        raise ValueError(
            f"expected the parameters that the masks are for, got none at {missing}; "
            "pass the tree that the optimiser's `init` was given"
        )
    dense = [path for path, mask in masks.items() if _is_revived(mask, leaves[path])]
    if dense:
        raise ValueError(
            f"expected pruned weights to be 0, got others in {dense}; {_KEEP_SPARSE}"
        )


def refreshes_are_sound(opt_state: optax.OptState) -> jax.Array:
    """Whether no refresh of the masks has met a NaN: bool[], in compiled functions too.

    >>> bool(refreshes_are_sound(optax.sgd(0.1).init(jnp.ones(2))))
    True
    """
    found = [jnp.any(state.nan) for state in mask_states(opt_state)]
    return ~jnp.any(jnp.stack(found)) if found else jnp.ones((), bool)


_KEEP_SPARSE = (
    "put `sparsify` last in the chain and outside of wrappers that change its updates, "
    "and set weights that you have replaced to 0 by `apply_masks(params, "
    "get_masks(state))`"
)


def _is_revived(mask: Any, param: Any) -> bool:
    return bool(np.any((np.asarray(mask) == 0) & (np.asarray(param) != 0)))


def _noted_paths(noted: jax.Array, masks: PyTree) -> list[str]:
    # Runs that are vmapped have one row each.
    any_run = np.asarray(noted).reshape(-1, noted.shape[-1]).any(axis=0)
    paths: list[str] = np.array(list(tree.flatten(masks)))[any_run].tolist()
    return paths


def _has_masks(node: Any) -> bool:
    return isinstance(node, SparsifyState | FreezeState)


def _merged(masks: Any, other: Any) -> Any:
    """Masks of two branches, of which each has a gap where the other one masks."""
    if is_gap(masks) or is_gap(other):
        return other if is_gap(masks) else masks
    # A gap may stand for a whole subtree: one level at a time.
    structure: Any
    parts, structure = jax.tree.flatten(masks, is_leaf=lambda node: node is not masks)
    if jax.tree_util.all_leaves([masks]):
        raise ValueError(
            "expected at most one `sparsify` for every leaf, got two; take the masks "
            "of each network or optimiser from its own state"
        )
    others = structure.flatten_up_to(other)
    merged = [_merged(a, b) for a, b in zip(parts, others, strict=True)]
    return jax.tree.unflatten(structure, merged)
