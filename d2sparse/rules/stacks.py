"""Rules for parameters that are stacked over the layers of a network."""

import fnmatch
from typing import Any

import jax
import jax.numpy as jnp

from d2sparse import tree
from d2sparse.rules.base import MaskRule, Nan, Noting, refresh
from d2sparse.schedules import Step
from d2sparse.tree import PyTree


def per_layer(rule: MaskRule, stacked: str) -> MaskRule:
    """A rule that treats every layer of stacked parameters as a leaf of its own.

    The leaves of `nn.scan`, and of any `jax.lax.scan` over layers, have a first axis
    that counts the layers. Their biases look like matrices, `erk` counts the layers as
    inputs, and one budget is shared by all layers. Under this rule every layer has the
    leaf, the budget and the name that it has in the network that is not stacked: layer
    3 of `"blocks/kernel"` is `"blocks/kernel/3"`. The masks are stacked as the
    parameters are.

    To measure such masks give `masks.density` and its like
    `prunable=tree.of_layers(stacked)`.

    Args:
      rule: any rule.
      stacked: pattern of the paths of stacked leaves, as in `fnmatch` (`*` matches
        slashes too).

    Returns:
      A rule.

    Raises:
      ValueError: at `init`, where the pattern matches no leaf, or a leaf without axes.

    >>> from d2sparse.rules import static
    >>> rule = per_layer(static(0.75), "blocks/*")
    >>> params = {"blocks": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))}}
    >>> masks = rule.init(params, jax.random.key(0))
    >>> masks["blocks"]["kernel"].sum(axis=(1, 2)).tolist()
    [4, 4, 4]
    >>> bool(masks["blocks"]["bias"].all())
    True
    """

    def split(parts: PyTree) -> PyTree:
        return tree.map_with_path(
            lambda path, leaf: _layers(path, leaf, stacked), parts
        )

    def init(params: PyTree, key: jax.Array) -> PyTree:
        tree.check_arrays(params)
        paths = list(tree.flatten(params))
        if not fnmatch.filter(paths, stacked):
            raise ValueError(
                f"expected stacked leaves at {stacked!r}, got none; the parameters "
                f"have {sorted(paths)}"
            )
        return _stack(rule.init(split(params), key), params)

    def noted(
        masks: PyTree, params: PyTree, grads: PyTree, step: Step, key: jax.Array
    ) -> tuple[PyTree, Nan]:
        masks, layers, grads = (
            x if x is None else split(x) for x in (masks, params, grads)
        )
        chosen, nan = refresh(rule, masks, layers, grads, step, key)
        return _stack(chosen, params), _of_stacks(nan, params, stacked)

    return MaskRule(init, Noting(noted), rule.observe)


def _layers(path: str, leaf: Any, stacked: str) -> Any:
    """A list of the layers, or the leaf itself where it is not stacked."""
    if not fnmatch.fnmatchcase(path, stacked):
        return leaf
    if not leaf.ndim:
        raise ValueError(
            f"expected leaves with an axis of layers at {stacked!r}, got a number at "
            f"{path!r}; narrow the pattern"
        )
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)] * leaf.shape[0]
    return [leaf[i] for i in range(leaf.shape[0])]


def _stack(masks: PyTree, like: PyTree) -> PyTree:
    def joined(_: Any, mask: Any) -> jax.Array:
        return jnp.stack(mask) if isinstance(mask, list) else mask

    return jax.tree.map(joined, like, masks)


def _of_stacks(nan: Nan, params: PyTree, stacked: str) -> Nan:
    """Of a stack, whether a layer of it is noted."""
    noted = {}
    for path, leaf in tree.flatten(params).items():
        layers = [path]
        if fnmatch.fnmatchcase(path, stacked):
            layers = [f"{path}/{i}" for i in range(leaf.shape[0])]
        found = [nan[layer] for layer in layers if layer in nan]
        if found:
            noted[path] = jnp.any(jnp.stack(found))
    return noted
