"""Several devices: runs side by side, and batches cut up between them.

A mesh has the axes "run" and "data". Stacked runs are laid along the first, so that
devices work on runs of their own and never speak to each other; the examples of every
batch are laid along the second, parameters being the same on all its devices. XLA adds
up gradients and batch statistics over the "data" axis: BatchNorm sees the whole batch.
"""

from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from d2sparse.train.state import TrainState


def make_mesh(data_parallel: int = 1, runs: int = 1) -> Mesh:
    """The devices that a batch is cut up between, times those that share out the runs.

    Args:
      data_parallel: devices along the axis "data".
      runs: number of stacked runs; the axis "run" is the longest that divides them and
        for which there are devices.

    Raises:
      ValueError: there are not as many devices.

    >>> make_mesh().shape
    OrderedDict({'run': 1, 'data': 1})
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
