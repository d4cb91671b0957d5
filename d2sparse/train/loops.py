"""Steps strung together: what a backend runs at once, and stretches of a training."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from d2sparse.jaxprs import contains
from d2sparse.train.devices import (
    LayOnce,
    Placement,
    apart,
    check_batch,
    lay,
    make_mesh,
    place,
)
from d2sparse.train.faults import failure, guard, has_failed
from d2sparse.train.runs import RUNS, is_stacked
from d2sparse.train.state import Data, Metrics, TrainState
from d2sparse.train.steps import Step, step_indices

Logs = dict[str, list[Any]]
Report = Callable[[int, TrainState, dict[str, Any]], None]
Save = Callable[[TrainState, Logs], None]
Indices = Callable[[TrainState, int], jax.Array]

_STEPS = 32  # Of a call on CPU.


def _never() -> bool:
    return False


class Runner(Protocol):
    """Several steps, one after the other, of one run or of several stacked ones."""

    def __call__(
        self,
        state: TrainState,
        data: Data,
        indices: jax.Array,
        interrupted: Callable[[], bool] = _never,
    ) -> tuple[TrainState, Metrics]:
        """Takes the steps.

        Args:
          state: where to start; it is used up.
          data: training data, stacked where the state is.
          indices: int32[steps, (runs,) batch].
          interrupted: asked between two calls on CPU whether to stop. A scan, which is
            a single call, always goes to its end.

        Returns:
          The state after the steps, and metrics float[steps taken, (runs)].
        """


def make_runner(step: Step, mesh: Mesh | None = None) -> Runner:
    """Strings steps together, each guarded against updates that are not finite.

    On accelerators the steps are one `lax.scan`. On CPU they are calls of up to 32
    steps, or of one where the network has convolutions, which XLA runs without its
    threads in the body of a loop. The state is donated: the one passed in is used up.

    Args:
      step: `(state, data, indices) -> (state, metrics)` of one run; it is vmapped for
        stacked ones.
      mesh: of several devices, from `make_mesh`; None for one.
    """
    guarded = guard(step)
    many = jax.vmap(guarded, in_axes=(RUNS, 0, 0), out_axes=(RUNS, 0))
    one_run = _on_mesh(guarded, mesh, False)
    many_runs = _on_mesh(many, mesh, True)

    def run(
        state: TrainState,
        data: Data,
        indices: jax.Array,
        interrupted: Callable[[], bool] = _never,
    ) -> tuple[TrainState, Metrics]:
        chosen = many_runs if is_stacked(state) else one_run
        return chosen(state, data, indices, interrupted)

    return run


class Stretch(NamedTuple):
    """A stretch of steps and its callbacks.

    Attributes:
      stop: number of the step to stop before.
      batch_size: examples per step.
      every: steps between two reports; at their multiples metrics leave the device.
        If not given, there is one report at the end.
      report: called with the step, the state and the mean metrics since the last call,
        of each of several runs. It must not keep the state, which the next step uses
        up.
      save: called at multiples of `save_every`, when interrupted, and before an error,
        with the state, which it must not keep, and the metrics of all steps since the
        last report.
      save_every: steps between two calls of `save`.
      logs: metrics of the steps since the last report, where training is resumed.
      interrupted: whether to stop; asked after each call on CPU, on accelerators after
        each stretch between reports and saves.
      indices: `(state, steps) -> int32[steps, (runs,) batch]`, which examples the next
        steps are trained on; if not given, all data in epochs.
    """

    stop: int
    batch_size: int
    every: int | None = None
    report: Report = lambda step, state, logs: None
    save: Save = lambda state, logs: None
    save_every: int | None = None
    logs: Mapping[str, list[Any]] = {}
    interrupted: Callable[[], bool] = _never
    indices: Indices | None = None


def take_steps(
    run: Runner, state: TrainState, data: Data, stretch: Stretch
) -> TrainState:
    """Trains up to the end of a stretch, from wherever the state stands.

    A training that is interrupted resumes to the same bits: give the state and the logs
    that `save` was last called with.

    Args:
      run: a runner from `make_runner`.
      state: where to start; it is used up. Several stacked runs are trained at once.
      data: training data.
      stretch: how far, and its callbacks.

    Returns:
      The state after the last step.

    Raises:
      FloatingPointError: no run is left that an update which is not finite has not
        stopped, or a refresh of the masks has met a NaN.
      KeyboardInterrupt: it was interrupted, after saving.
    """
    last, every = stretch.stop, stretch.every or stretch.stop
    pending = {name: list(values) for name, values in stretch.logs.items()}
    position = int(state.step)
    while position < last:
        intervals = (every, stretch.save_every)
        steps = min(_next_multiple(position, n, last) for n in intervals) - position
        rows = _rows(stretch, state, data, steps)
        state, metrics = run(state, data, rows, stretch.interrupted)
        for name, values in jax.device_get(metrics).items():
            pending.setdefault(name, []).extend(values)
        position = int(state.step)
        failed, stopped = has_failed(state), stretch.interrupted()
        if not failed and position in (last, position - position % every):
            stretch.report(position, state, _means(pending, state))
            pending = {}
        due = stretch.save_every and position % stretch.save_every == 0
        if due or stopped or failed:
            stretch.save(state, pending)
        if failed:
            raise FloatingPointError(failure(state))
        if stopped:
            raise KeyboardInterrupt
    return state


def _next_multiple(position: int, every: int | None, last: int) -> int:
    return last if not every else min(position - position % every + every, last)


def _rows(stretch: Stretch, state: TrainState, data: Data, steps: int) -> jax.Array:
    """Examples of the next steps: int32[steps, (runs,) batch]."""
    if stretch.indices is not None:
        return stretch.indices(state, steps)

    def epochs(state: TrainState, data: Data) -> Any:
        return step_indices(state, data, steps, stretch.batch_size)

    if not is_stacked(state):
        return epochs(state, data)
    return jax.vmap(epochs, (RUNS, 0), 1)(state, data)


def _means(logs: Logs, state: TrainState) -> dict[str, Any]:
    """Means over the steps that were not skipped: floats, or float[runs]."""
    columns = {k: np.asarray(v, np.float32).T for k, v in logs.items()}
    taken = columns.pop("skipped") == 0

    def mean(values: np.ndarray, taken: np.ndarray) -> float:
        return float(np.mean(values[taken])) if taken.any() else math.nan

    # Run by run, so that the order of summation is that of a run alone.
    means: dict[str, Any] = {
        name: np.array([mean(*run) for run in zip(values, taken, strict=True)])
        if values.ndim == 2
        else mean(values, taken)
        for name, values in columns.items()
    }
    count = np.asarray(state.faults.total)
    return means | ({"skipped": count} if count.any() else {})


def _on_mesh(step: Step, mesh: Mesh | None, stacked: bool) -> Runner:
    """The runner of a step whose arguments lie on the mesh."""
    on_cpu = jax.default_backend() == "cpu"
    if mesh is None or mesh.size == 1:
        return _calls(step) if on_cpu else _scan(step)
    string = _loop if on_cpu else _scan
    batch_axis, lay_once = mesh.shape["data"], LayOnce()

    @functools.cache
    def on_mesh_of(runs: int) -> tuple[Placement, Runner]:
        # As many devices along "run" as can share the runs evenly.
        fits = runs % mesh.shape["run"] == 0
        own = mesh if fits else make_mesh(batch_axis, runs)
        where = place(own, stacked)
        each = apart(step, own) if stacked else step
        return where, string(each, out_shardings=(where.state, None))

    def placed(
        state: TrainState,
        data: Data,
        indices: jax.Array,
        interrupted: Callable[[], bool] = _never,
    ) -> tuple[TrainState, Metrics]:
        check_batch(indices.shape[-1], mesh)
        where, run = on_mesh_of(len(state.key) if stacked else 1)
        return run(
            lay(state, where.state),
            lay_once(data, where.data),
            lay(indices, where.indices),
            interrupted,
        )

    return placed


def _calls(step: Step) -> Runner:
    """Calls of many steps, or of one where there are convolutions."""
    once = jax.jit(step)  # Traced once for all that follows.
    loop, together = _loop(once), _several(once)
    chosen: list[Runner] = []

    def choose(state: TrainState, data: Data, indices: jax.Array) -> Runner:
        if not chosen:
            traced = jax.make_jaxpr(once)(state, data, indices[0])
            convolves = contains(traced.jaxpr, ("conv_general_dilated",))
            chosen.append(loop if convolves else together)
        return chosen[0]

    return lambda state, data, indices, interrupted=_never: choose(
        state, data, indices
    )(state, data, indices, interrupted)


def _several(step: Step) -> Runner:
    """Calls of up to 32 steps, all by one compiled program."""

    def take(
        state: TrainState, data: Data, rows: jax.Array, steps: jax.Array
    ) -> tuple[TrainState, Metrics]:
        shapes = jax.eval_shape(step, state, data, rows[0])[1]
        none = jax.tree.map(lambda x: jnp.zeros((_STEPS, *x.shape), x.dtype), shapes)

        def body(
            i: jax.Array, carry: tuple[TrainState, Metrics]
        ) -> tuple[TrainState, Metrics]:
            state, log = step(carry[0], data, rows[i])
            logs = jax.tree.map(lambda x, now: x.at[i].set(now), carry[1], log)
            return state, logs

        return jax.lax.fori_loop(0, steps, body, (state, none))

    compiled = jax.jit(take, donate_argnums=0)

    def run(
        state: TrainState,
        data: Data,
        indices: jax.Array,
        interrupted: Callable[[], bool] = _never,
    ) -> tuple[TrainState, Metrics]:
        def call(state: TrainState, rows: np.ndarray) -> tuple[TrainState, Metrics]:
            filled = np.resize(rows, (_STEPS, *rows.shape[1:]))
            return compiled(state, data, filled, len(rows))

        rows = np.asarray(indices)
        parts = (rows[n : n + _STEPS] for n in range(0, len(rows), _STEPS))
        state, logs = _one_ahead(call, state, parts, interrupted)
        # Only the last call of all takes fewer steps than it has places for.
        return state, jax.tree.map(lambda *x: np.concatenate(x)[: len(rows)], *logs)

    return run


def _loop(step: Step, **options: Any) -> Runner:
    compiled = jax.jit(step, donate_argnums=0, **options)

    def run(
        state: TrainState,
        data: Data,
        indices: jax.Array,
        interrupted: Callable[[], bool] = _never,
    ) -> tuple[TrainState, Metrics]:
        rows = indices if _is_spread(indices) else np.asarray(indices)
        # Not `rows` itself, which has to see all of what other processes hold.
        parts = (rows[number] for number in range(len(rows)))
        state, logs = _one_ahead(
            lambda state, row: compiled(state, data, row), state, parts, interrupted
        )
        return state, jax.tree.map(lambda *values: np.stack(values), *logs)

    return run


def _one_ahead(
    call: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    state: TrainState,
    parts: Iterable[Any],
    interrupted: Callable[[], bool],
) -> tuple[TrainState, list[Metrics]]:
    """A call for each part, until interrupted, and the metrics of each.

    One call is ahead of what has finished and no more: an interrupt waits for what is
    under way.
    """
    logs: list[Metrics] = []
    for part in parts:
        if logs and interrupted():
            break
        state, log = call(state, part)
        jax.block_until_ready(logs[-1:])
        logs.append(log)
    return state, logs


def _scan(step: Step, **options: Any) -> Runner:
    def scan(
        state: TrainState, data: Data, indices: jax.Array
    ) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda s, row: step(s, data, row), state, indices)

    compiled = jax.jit(scan, donate_argnums=0, **options)
    return lambda state, data, indices, interrupted=_never: compiled(
        state, data, indices
    )


def _is_spread(array: Any) -> bool:
    return isinstance(array, jax.Array) and len(array.sharding.device_set) > 1
