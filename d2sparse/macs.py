"""Theoretical cost: multiply-accumulates of forward passes and of training.

Masks are simulated on dense kernels, so no number here is a claim about speed.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from d2sparse import tree
from d2sparse.jaxprs import bodies, contains
from d2sparse.masks import count
from d2sparse.tree import PyTree

# Owners of values that are no parameters, beside the paths of the parameter leaves.
_CONSTANT, _DATA = "<constant>", "<data>"
_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")


def forward_macs(
    apply_fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    x: jax.Array | jax.ShapeDtypeStruct,
) -> dict[str, int]:
    """Multiply-accumulates of one example's forward pass, by parameter leaf.

    The function is traced, not run, and every matrix product and convolution of the
    data with a parameter is charged to that parameter's leaf, wherever it stands: under
    `jit`, `vmap`, `checkpoint`, custom derivatives, a `scan` (times its length), or a
    `cond` whose branches cost the same. A kernel computed from several leaves (a mask,
    a scale, a low-rank term) is charged to the largest of them.

    What counts as a product of two numbers:

    - Padding at the border counts as if the data went on there, so that all outputs
      cost the same. Zeros between the elements do not count: those that `lhs_dilation`
      inserts into the data, as in a transposed convolution, and those that
      `rhs_dilation` inserts into a kernel. With a stride of s along every axis a
      transposed convolution of n inputs to s n outputs thus costs its kernel n times.
    - Of grouped products only those within a group count, and in a ragged product each
      row meets one of the matrices.
    - Zeros that the program writes by itself are data, as nothing is known of values.

    Products of two activations (attention scores; a kernel that is computed from the
    data, or gathered by it), products of parameters alone, elementwise work, Fourier
    transforms and solves are not counted. Counts are Python integers, which are exact.

    Args:
      apply_fn: `apply_fn(params, x)`, closed over everything else.
      params: arrays or `jax.ShapeDtypeStruct`s.
      x: a batch, `[batch, ...]`, or its `jax.ShapeDtypeStruct`.

    Returns:
      MACs per example for every leaf of `params` by path, 0 where there are none; their
      sum is the dense forward cost of the network.

    Raises:
      ValueError: a product of data and parameters stands where its count is not known:
        in one of several branches, in a loop of unknown length, in a custom kernel; it
        is shared by the examples, so that it has no cost per example; or there is no
        example in `x`.

    >>> x = jax.ShapeDtypeStruct((32, 784), "float32")
    >>> params = {"w": jax.ShapeDtypeStruct((784, 10), "float32"), "b": jnp.zeros(())}
    >>> forward_macs(lambda params, x: x @ params["w"] + params["b"], params, x)
    {'b': 0, 'w': 7840}
    """
    if not jnp.shape(x) or not jnp.shape(x)[0]:
        raise ValueError(
            f"expected a batch of at least one example, got shape {jnp.shape(x)}; add "
            "an axis of length 1 in front"
        )
    paths = list(tree.flatten(params))
    jaxpr = jax.make_jaxpr(apply_fn)(params, x).jaxpr
    sizes = [math.prod(_shape(var)) for var in jaxpr.invars[: len(paths)]]
    rank = {_CONSTANT: -1.0, _DATA: math.inf, **dict(zip(paths, sizes, strict=True))}
    data = [_DATA] * (len(jaxpr.invars) - len(paths))
    _, macs = _walk(jaxpr, paths + data, rank)
    batch = x.shape[0]
    if shared := [path for path in paths if macs[path] % batch]:
        raise ValueError(
            f"expected products for every one of {batch} examples, got "
            f"{macs[shared[0]]} multiply-accumulates at {shared[0]!r}, which they "
            "share; give a batch of one example"
        )
    return {path: macs[path] // batch for path in paths}


def masked_macs(macs: Mapping[str, int], masks: PyTree) -> jax.Array:
    """Forward multiply-accumulates per example that remain under the masks.

    `f = sum_l c_l k_l / n_l`: the dense cost `c_l` of a leaf times its density. Leaves
    with few weights and large outputs are expensive, so this is not the dense cost
    times the total density. Live weights are counted exactly; the result is float32,
    right to about 1e-7 of itself.

    Args:
      macs: dense cost by path, from `forward_macs`.
      masks: mask tree of the same parameters.

    Raises:
      ValueError: a path of `macs` has no mask.

    >>> print(masked_macs({"w": 100}, {"w": jnp.eye(4, dtype=bool)}))
    25.0
    """
    sizes = {path: mask.size for path, mask in tree.flatten(masks).items()}
    missing = sorted(set(macs) - set(sizes))
    if missing:
        raise ValueError(
            f"expected a mask for every path of macs, got none for {missing}; take "
            "both from the same parameters"
        )
    live = count(masks, prunable=lambda path, leaf: True)
    shares = [
        live[path] / jnp.float32(sizes[path]) * float(c) for path, c in macs.items()
    ]
    return jnp.sum(jnp.stack(shares))


def training_macs(
    sparse: float | jax.Array,
    dense: float,
    *,
    interval: float | None = None,
    growth_samples: int | None = None,
    batch_size: int | None = None,
) -> float | jax.Array:
    """Multiply-accumulates of training, per example of a step.

    The backward pass costs twice the forward pass, so with `f` the cost of the sparse
    and `f_D` that of the dense forward pass (accounting of RigL, Evci et al.,
    arXiv 1911.11134):

    - fixed masks: `3 f`; a dense network has `f = f_D`;
    - masks grown by gradient every `interval` steps, where the update takes the place
      of a step and needs the dense weight gradient of its batch:
      `(3 f interval + 2 f + f_D) / (interval + 1)`;
    - the growth gradient is taken on `growth_samples` examples of its own, beside the
      steps: `3 f + (2 f + f_D) growth_samples / (batch_size interval)`.

    Multiply by batch size and steps for a whole run; add the networks of a pair.

    Args:
      sparse: forward cost under the masks, from `masked_macs`.
      dense: forward cost without masks, the sum of `forward_macs`.
      interval: steps between two mask updates, or their mean over a run; None for
        fixed masks.
      growth_samples: examples of a separate growth gradient.
      batch_size: examples of a training step; needed with `growth_samples`.

    Raises:
      ValueError: `growth_samples` without `interval` and `batch_size`.

    >>> training_macs(20.0, 100.0), training_macs(20.0, 100.0, interval=99)
    (60.0, 60.8)
    """
    if growth_samples is not None:
        if interval is None or batch_size is None:
            raise ValueError(
                "expected interval and batch_size beside growth_samples, got "
                f"interval={interval}, batch_size={batch_size}"
            )
        updates = growth_samples / (batch_size * interval)
        return 3 * sparse + (2 * sparse + dense) * updates
    if interval is None:
        return 3 * sparse
    return (3 * sparse * interval + 2 * sparse + dense) / (interval + 1)


def _walk(
    jaxpr: Any, owners: Sequence[str], rank: Mapping[str, float]
) -> tuple[list[str], Counter[str]]:
    """Owners of a program's outputs and MACs by owner, given its inputs' owners."""
    owner_of = dict(zip(jaxpr.invars, owners, strict=True))

    def read(atom: Any) -> str:
        is_literal = hasattr(atom, "val")
        return _CONSTANT if is_literal else owner_of.get(atom, _CONSTANT)

    total: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        outputs, macs = _equation(eqn, [read(atom) for atom in eqn.invars], rank)
        owner_of.update(zip(eqn.outvars, outputs, strict=True))
        total.update(macs)
    return [read(atom) for atom in jaxpr.outvars], total


def _equation(
    eqn: Any, owners: list[str], rank: Mapping[str, float]
) -> tuple[list[str], Counter[str]]:
    name, inside = eqn.primitive.name, list(bodies(eqn))
    if name == "scan":
        return _scan(eqn, inside[0], owners, rank)
    if name == "optimization_barrier":
        return owners, Counter()
    # The program inside a shard_map knows only the shapes of one shard.
    is_call = len(inside) == 1 and name != "shard_map"
    if is_call and len(inside[0].invars) == len(owners):
        return _walk(inside[0], owners, rank)
    if name == "cond":
        found = [_walk(body, owners[1:], rank) for body in inside]
        _check_countable(name, any(macs != found[0][1] for _, macs in found))
        together = zip(*(outputs for outputs, _ in found), strict=True)
        return [max(own, key=rank.__getitem__) for own in together], found[0][1]
    macs: Counter[str] = Counter()
    if _DATA in owners and (set(owners) - {_DATA, _CONSTANT}):
        _check_countable(name, any(contains(body, _PRODUCTS) for body in inside))
    if name in _PRODUCTS:
        leaves = set(owners[:2]) - {_DATA, _CONSTANT}
        if _DATA in owners[:2] and leaves:
            macs[leaves.pop()] = _product_macs(eqn)
    owner = max(owners, key=rank.__getitem__, default=_CONSTANT)
    return [owner] * len(eqn.outvars), macs


def _check_countable(name: str, is_unknown: bool) -> None:
    if is_unknown:
        raise ValueError(
            f"expected products under jit, scan or checkpoint, got one inside "
            f"`{name}`, where its count is not known; give an apply_fn for one "
            "device with static control flow"
        )


def _scan(
    eqn: Any, body: Any, owners: list[str], rank: Mapping[str, float]
) -> tuple[list[str], Counter[str]]:
    # Inputs are constants, carry, slices; outputs are carry, slices. A slice has one
    # axis less inside the body, which tells them apart in every version of jax.
    stop = len(owners) - _sliced(eqn.invars, body.invars)
    carries = len(eqn.outvars) - _sliced(eqn.outvars, body.outvars)
    start = stop - carries
    while True:
        outputs, macs = _walk(body, owners, rank)
        before = owners[start:stop]
        pairs = zip(before, outputs[:carries], strict=True)
        # A carry that starts as a constant may become data in a later iteration.
        after = [max(pair, key=rank.__getitem__) for pair in pairs]
        if after == before:
            length = eqn.params["length"]
            return outputs, Counter({path: n * length for path, n in macs.items()})
        owners = owners[:start] + after + owners[stop:]


def _sliced(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(len(_shape(outer)) > len(_shape(inner)) for outer, inner in pairs)


def _product_macs(eqn: Any) -> int:
    left, right = (_shape(atom) for atom in eqn.invars[:2])
    out, name = math.prod(_shape(eqn.outvars[0])), eqn.primitive.name
    if name == "conv_general_dilated":
        return _convolution_macs(right, _shape(eqn.outvars[0]), eqn.params)
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return out * math.prod(left[axis] for axis in contracted)
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    if set(numbers.lhs_ragged_dimensions) & set(contracted):
        # The groups share out the terms of the sums, each with outputs of its own.
        out //= _shape(eqn.invars[2])[-1]
    return out * math.prod(left[axis] for axis in contracted)


def _convolution_macs(
    kernel: tuple[int, ...], out: tuple[int, ...], params: Mapping[str, Any]
) -> int:
    """Every axis of the image has its pairs of an output and a tap on an element."""
    numbers = params["dimension_numbers"]
    batch, features, *image = numbers.out_spec
    _, inputs, *taps = numbers.rhs_spec
    pairs = map(
        _pairs,
        (out[axis] for axis in image),
        (kernel[axis] for axis in taps),
        params["window_strides"],
        (before for before, _ in params["padding"]),
        params["lhs_dilation"],
        params["rhs_dilation"],
    )
    # A kernel has the inputs of one group along this axis.
    return out[batch] * out[features] * kernel[inputs] * math.prod(pairs)


def _pairs(
    outputs: int, taps: int, stride: int, padding: int, spread: int, dilation: int
) -> int:
    """Pairs of an output and a tap that meet an element, or where one would go on.

    Elements of the data lie `spread` apart, with zeros between them.
    """
    starts = Counter((o * stride - padding) % spread for o in range(outputs))
    return sum(starts[-tap * dilation % spread] for tap in range(taps))


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape
