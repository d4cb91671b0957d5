"""Several devices: runs side by side, and batches cut up between them.

A mesh has the axes "run" and "data". Stacked runs are laid along the first, so that
devices work on runs of their own and never speak to each other; the examples of every
batch are laid along the second, parameters being the same on all its devices. XLA adds
up gradients and batch statistics over the "data" axis: BatchNorm sees the whole batch.
"""

import operator
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from d2sparse.train.state import TrainState
from d2sparse.tree import PyTree


def make_mesh(data_parallel: int = 1, runs: int = 1) -> Mesh:
    """The devices that a batch is cut up between, times those that share out the runs.

    Args:
      data_parallel: devices along the axis "data".
      runs: number of stacked runs; the axis "run" is the longest that divides them and
        for which there are devices.

    Raises:
      ValueError: there are not as many devices.

    >>> dict(make_mesh().shape)
    {'run': 1, 'data': 1}
    """
    devices = jax.device_count()
    if not 1 <= data_parallel <= devices:
        raise ValueError(
            f"expected data_parallel from 1 to {devices}, the number of devices, got "
            f"{data_parallel}"
        )
    width = max(n for n in range(1, devices // data_parallel + 1) if runs % n == 0)
    return jax.make_mesh(
        (width, data_parallel),
        ("run", "data"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[: width * data_parallel],
    )


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Refuses a batch that its devices cannot share evenly.

    Raises:
      ValueError: naming batch sizes that fit.
    """
    parts = mesh.shape["data"]
    if batch_size % parts:
        below, above = batch_size - batch_size % parts, -(-batch_size // parts) * parts
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"expected a batch that {parts} devices can share evenly, got one of "
            f"{batch_size}; choose --batch_size={near}, or another --data_parallel"
        )


class Placement(NamedTuple):
    """Where the arguments of a runner lie on a mesh.

    Attributes:
      state: of the state, a prefix of its tree.
      data: of the data set: whole on every device of a run.
      indices: of int32[steps, (runs,) batch].
    """

    state: Any
    data: NamedSharding
    indices: NamedSharding


def place(mesh: Mesh, stacked: bool) -> Placement:
    """Where things lie on a mesh.

    Args:
      mesh: from `make_mesh`.
      stacked: whether there are several runs in a state.
    """

    def on(*axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    own = on("run") if stacked else on()
    fields: dict[str, Any] = {"step": on()}
    state = TrainState(**dict.fromkeys(TrainState._fields, own) | fields)
    indices = on(None, "run", "data") if stacked else on(None, "data")
    return Placement(state, own, indices)


def apart(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A step of stacked runs, each on devices that ask nothing of those of the others.

    Without, XLA's partitioner gathers what it cannot cut along the runs, and loops last
    as long as in the slowest run.

    Args:
      step: `(state, data, indices) -> (state, metrics)` of stacked runs.
      mesh: from `make_mesh`; its axis "data", where it is longer than 1, is left to the
        partitioner.
    """
    own, shared = PartitionSpec("run"), PartitionSpec()
    fields: dict[str, Any] = {"step": shared}
    state = TrainState(**dict.fromkeys(TrainState._fields, own) | fields)
    return jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(state, own, own),
        out_specs=(state, own),
        axis_names={"run"} if mesh.shape["data"] > 1 else {"run", "data"},
        check_vma=False,
    )


def lay(values: PyTree, where: Any) -> PyTree:
    """Arrays as `jax.device_put` lays them, also on the devices of other processes.

    Args:
      values: tree of arrays and random keys that all processes have as a whole.
      where: their shardings, a prefix of the tree.
    """
    if jax.process_count() == 1:
        return jax.device_put(values, where)
    return jax.tree.map(
        lambda sharding, part: jax.tree.map(lambda x: _lay(x, sharding), part),
        where,
        values,
    )


class LayOnce:
    """`lay` that copies a data set once, when the same is given again and again.

    The copy is kept for as long as the arrays that it was made of.

    >>> lay_once, where = LayOnce(), place(make_mesh(), stacked=False)
    >>> data = jnp.arange(4)
    >>> lay_once(data, where.data) is lay_once(data, where.data)
    True
    """

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._made_of: list[weakref.ref[Any]] = []
        self._laid: PyTree = None
        self._where: Any = None

    def __call__(self, values: PyTree, where: Any) -> PyTree:
        """As `lay`."""
        leaves = jax.tree.leaves(values)
        kept = [reference() for reference in self._made_of]
        same = len(kept) == len(leaves) and all(map(operator.is_, kept, leaves))
        if not (same and where == self._where):
            self._laid, self._where = lay(values, where), where
            self._made_of = [weakref.ref(leaf, self._forget) for leaf in leaves]
        return self._laid

    def _forget(self, gone: object) -> None:
        self._made_of, self._laid = [], None


def bring(values: PyTree) -> PyTree:
    """Arrays that this process can use alone, where they lie on devices of others too.

    Args:
      values: tree of arrays and random keys, replicated over the processes.
    """
    if jax.process_count() == 1:
        return values
    return jax.tree.map(_bring, values)


def settle(values: PyTree) -> PyTree:
    """Arrays of several devices on the default one, uncommitted; others as they are.

    What a run keeps from one phase to the next goes with whatever lies elsewhere, such
    as what it has kept since there were more runs beside it.

    Args:
      values: tree of arrays and random keys that this process can read as a whole.
    """
    return jax.tree.map(lambda x: _bring(x) if len(x.devices()) > 1 else x, values)


def _lay(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    if isinstance(array, jax.core.Tracer):
        return jax.device_put(array, sharding)
    if array.sharding == sharding:
        return array
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _lay(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    whole = np.asarray(array)
    return jax.make_array_from_callback(
        whole.shape, sharding, lambda index: whole[index]
    )


def _bring(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _bring(jax.random.key_data(array))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    return jnp.asarray(np.asarray(array))
