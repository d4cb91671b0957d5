"""Quantised weights of trees: bits by leaf, rounded weights, codes, sizes."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from d2sparse import tree
from d2sparse.quantisation import uniform
from d2sparse.quantisation.scales import Per, ScaleName, make_scale
from d2sparse.quantisation.uniform import check_bits, fake_quantise
from d2sparse.tree import Prunable, PyTree, is_kernel

Bits = int | Mapping[str, int]


class Codes(NamedTuple):
    """A quantised leaf: what is stored of it.

    Attributes:
      codes: int8[...], whole numbers.
      scale: float[1, ..., 1, channels], or float[] of a tensor: what a code stands for.
      bits: int32[], that a code needs.
    """

    codes: jax.Array
    scale: jax.Array
    bits: jax.Array


def share_bits(bits: Bits, paths: Iterable[str]) -> dict[str, int]:
    """Bits of every path: one number for all, or a table of patterns.

    Args:
      bits: 2 to 8, or those numbers by a pattern of paths, as in `fnmatch` (`*` matches
        slashes too). The first pattern that matches a path counts, and a path that none
        matches has no bits: it keeps its precision.
      paths: of leaves.

    Raises:
      ValueError: fewer or more bits, or a pattern that matches no path.

    >>> share_bits({"stem/*": 8, "*": 4}, ["stem/kernel", "conv/kernel"])
    {'stem/kernel': 8, 'conv/kernel': 4}
    """
    table, paths = bits if isinstance(bits, Mapping) else {"*": bits}, list(paths)
    for pattern, number in table.items():
        check_bits(number)
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            raise ValueError(
                f"expected patterns that match a leaf, got {pattern!r}; the leaves are "
                f"{sorted(paths)}"
            )
    return {
        path: int(number)
        for path in paths
        for number in [_first(table, path)]
        if number is not None
    }


def edge_bits(paths: Iterable[str], bits: int, edges: int = 8) -> dict[str, int]:
    """A table of bits by which the first and the last layer have others.

    They have few of the weights and cost most of the accuracy: networks of few bits are
    published with 8 bits there.

    Args:
      paths: of kernels, in the order in which the network applies them, as
        `models.quantised.in_order` finds it: trees are sorted by name.
      bits: of all other kernels.
      edges: bits of the first and of the last kernel.

    Returns:
      For `quantise_weights`, bits by pattern.

    Raises:
      ValueError: no path.

    >>> edge_bits(["stem/kernel", "conv/kernel", "head/kernel"], bits=4)
    {'stem/kernel': 8, 'head/kernel': 8, '*': 4}
    """
    kernels = list(paths)
    if not kernels:
        raise ValueError("expected paths of kernels, got none")
    ends = {kernels[0]: edges, kernels[-1]: edges}
    return ends | ({"*": bits} if set(kernels) - set(ends) else {})


def quantise_weights(
    params: PyTree,
    bits: Bits,
    per: Per = "channel",
    scale: ScaleName = "absmax",
    prunable: Prunable = is_kernel,
) -> PyTree:
    """Kernels rounded to few bits, with a gradient as if they were not.

    Scales are constants of the gradient, which is 1 unless a weight is clipped; under
    "absmax" none is. Pruned weights are those that are 0: they stay 0, scales do not
    look at them, and their gradient is that of the network if they were rounded, which
    growth goes by. Prune first and quantise then.

    Args:
      params: the weights.
      bits: 2 to 8, of all kernels or by a pattern of paths, see `share_bits`.
      per: one scale an output "channel", the last axis, or one a "tensor".
      scale: "absmax" clips nothing, "mse" has the least squared error, better from 4
        bits downward.
      prunable: predicate on (path, leaf); all other leaves pass unchanged.

    Raises:
      ValueError: fewer or more bits, no such leaf, or a pattern that matches none.

    >>> params = {"kernel": jnp.array([[1.0, 0.0], [-0.4, 8.0]]), "bias": jnp.ones(2)}
    >>> quantise_weights(params, bits=2)["kernel"].tolist()
    [[1.0, 0.0], [-0.0, 8.0]]
    """

    def leaf(weight: jax.Array, number: int) -> jax.Array:
        found = make_scale(scale)(jax.lax.stop_gradient(weight), number, per)
        return fake_quantise(weight, found, number)

    leaves = tree.prunable_leaves(params, prunable)
    own = share_bits(bits, leaves)
    return tree.replace(params, {p: leaf(leaves[p], n) for p, n in own.items()})


def weight_codes(
    params: PyTree,
    bits: Bits,
    per: Per = "channel",
    scale: ScaleName = "absmax",
    prunable: Prunable = is_kernel,
) -> dict[str, Codes]:
    """Codes and scales of the quantised leaves by path, which are what is stored.

    Args:
      params: the weights.
      bits: 2 to 8, of all kernels or by a pattern of paths, see `share_bits`.
      per: one scale an output "channel" or one a "tensor".
      scale: "absmax", "mse" or "lsq".
      prunable: predicate on (path, leaf).

    Raises:
      ValueError: fewer or more bits, no such leaf, or a pattern that matches none.

    >>> params = {"kernel": jnp.array([[1.0, 0.0], [-0.6, 3.0]])}
    >>> found = weight_codes(params, bits=3)["kernel"]
    >>> found.codes.tolist(), found.scale.tolist()
    ([[3, 0], [-2, 3]], [[0.3333333432674408, 1.0]])
    """

    def leaf(weight: jax.Array, number: int) -> Codes:
        found = make_scale(scale)(weight, number, per)
        return Codes(uniform.codes(weight, found, number), found, jnp.int32(number))

    leaves = tree.prunable_leaves(params, prunable)
    return {p: leaf(leaves[p], n) for p, n in share_bits(bits, leaves).items()}


def restore_weights(params: PyTree, stored: Mapping[str, Codes]) -> PyTree:
    """The weights with those leaves that are stored as codes: `quantise_weights`.

    Args:
      params: the weights, whose other leaves and types are kept.
      stored: from `weight_codes`.

    Raises:
      ValueError: a path is not in the tree.

    >>> params = {"kernel": jnp.array([[1.0, 0.0], [-0.4, 8.0]]), "bias": jnp.ones(2)}
    >>> restore_weights(params, weight_codes(params, bits=2))["kernel"].tolist()
    [[1.0, 0.0], [0.0, 8.0]]
    """
    leaves = tree.pick(params, stored, "weights")
    return tree.replace(
        params,
        {
            path: uniform.dequantise(own.codes, own.scale, leaves[path].dtype)
            for path, own in stored.items()
        },
    )


def effective_size(
    params: PyTree,
    bits: Bits,
    masks: PyTree | None = None,
    prunable: Prunable = is_kernel,
) -> float:
    """Bits that the surviving kernels need: their number times the bits of each.

    Scales, biases and the places of the survivors are not counted. Kernels that keep
    their precision count with that.

    Args:
      params: the weights before they are quantised: rounding makes more zeros.
      bits: 2 to 8, of all kernels or by a pattern of paths, see `share_bits`.
      masks: tree of bool like the parameters; if not given, survivors are not 0.
      prunable: predicate on (path, leaf).

    Raises:
      ValueError: fewer or more bits, no such leaf, or a pattern that matches none.

    >>> params = {"kernel": jnp.array([[1.0, 0.0], [-0.4, 8.0]]), "bias": jnp.ones(2)}
    >>> effective_size(params, bits=4)
    12.0
    """
    leaves = tree.prunable_leaves(params, prunable)
    own = share_bits(bits, leaves)
    live = {p: x != 0 for p, x in leaves.items()}
    if masks is not None:
        live = tree.pick(masks, leaves, "masks")
    whole = {path: 8 * leaf.dtype.itemsize for path, leaf in leaves.items()}
    return float(sum((whole | own)[path] * int(m.sum()) for path, m in live.items()))


def _first(table: Mapping[str, int], path: str) -> Any:
    return next((n for p, n in table.items() if fnmatch.fnmatchcase(path, p)), None)
