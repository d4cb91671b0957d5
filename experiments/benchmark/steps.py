"""Cost of an optimiser step under `sparsify`, and of compiling it."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax
from jax.experimental.compilation_cache import compilation_cache

from d2sparse import rules
from d2sparse.masks import apply_masks
from d2sparse.schedules import every
from d2sparse.transforms import sparsify
from d2sparse.tree import PyTree
from experiments.benchmark.measure import (
    Candidate,
    num_bytes,
    stateful,
    temporary_bytes,
    time_call,
    time_in_turns,
)
from experiments.benchmark.tables import Table
from experiments.benchmark.workload import (
    Sizes,
    make_params,
    param_shapes,
    random_masks,
)

SGD = "sgd+momentum"
OPTIMIZERS: Mapping[str, Callable[[], optax.GradientTransformation]] = {
    SGD: functools.partial(optax.sgd, 0.1, momentum=0.9),
    "adamw": functools.partial(optax.adamw, 1e-3),
}
SPARSIFIED = "sparsify({}, rigl)"


def step_table(sizes: Sizes) -> Table:
    """Optimiser steps between two refreshes against those of the plain optimiser."""
    rows = [row for model in sizes.models for row in _step_rows(model, sizes)]
    return Table(
        "One optimiser step without a refresh",
        "Parameters and state are donated. Relative: to the step of the plain "
        "optimiser. Temporary: bytes the compiled program needs beside its arguments "
        "and results (a refresh included), and state: those of the optimiser's state "
        "(moments and masks), both over the bytes of the parameters."
        + (f" A program takes {sizes.repeats} steps." if sizes.repeats > 1 else ""),
        rows,
    )


def _step_rows(model: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    params = make_params(model, sizes.image)
    grads = jax.tree.map(lambda w: 1e-3 * w[..., ::-1], params)
    starts = dict(_starts(params, sizes.sparsity))
    programs = {
        name: trace_step(tx, carry, grads, sizes.repeats).lower().compile()
        for name, (tx, carry) in starts.items()
    }
    candidates = {
        name: Candidate(_several(program, starts[name][1], grads, sizes.steps))
        for name, program in programs.items()
    }
    timings = time_in_turns(candidates, sizes.rounds, sizes.slow_rounds)
    for name, timing in timings.items():
        _, (_, opt_state) = starts[name]
        plain = next(inner for inner in OPTIMIZERS if inner in name)
        yield {
            "optimiser": name,
            "model": model,
            **timing.over(sizes.steps * sizes.repeats).cells(),
            "relative": timing.wall / timings[plain].wall,
            "temporary": temporary_bytes(programs[name]) / num_bytes(params),
            "state": num_bytes(opt_state) / num_bytes(params),
        }


def _starts(params: PyTree, sparsity: float) -> Iterator[tuple[str, Any]]:
    """Optimisers by name, each with (parameters, state) of its first step."""
    for name, make in OPTIMIZERS.items():
        inner = make()
        yield name, (inner, (params, jax.jit(inner.init)(params)))
        start = sparse_start(inner, params, sparsity)
        yield SPARSIFIED.format(name), (under_rigl(inner, sparsity), start)


def under_rigl(
    inner: optax.GradientTransformation, sparsity: float
) -> optax.GradientTransformation:
    """RigL around an optimiser, its refresh part of the program but never due."""
    return sparsify(inner, rules.rigl(sparsity), every(2**31 - 1))


def sparse_start(
    inner: optax.GradientTransformation, params: PyTree, sparsity: float
) -> tuple[PyTree, PyTree]:
    """Parameters and state under a random pattern, which needs no search to compile."""
    masks = random_masks(params, sparsity)

    @jax.jit
    def init(params: PyTree, masks: PyTree) -> PyTree:
        return sparsify(inner, rules.fixed(masks)).init(params)

    return apply_masks(params, masks), init(params, masks)


def _several(
    program: jax.stages.Compiled, carry: Any, grads: PyTree, calls: int
) -> Callable[[], None]:
    step = stateful(program, carry, grads)

    def call() -> None:
        for _ in range(calls):
            step()

    return call


def trace_step(
    tx: optax.GradientTransformation, carry: Any, grads: PyTree, repeats: int = 1
) -> jax.stages.Traced:
    """The traced `((params, state), grads) -> ((params, state), None)`, donated.

    Args:
      tx: the optimiser.
      carry: parameters and state, or `jax.ShapeDtypeStruct`s of them.
      grads: gradients, likewise.
      repeats: steps in the program, a scan of them if more than one.
    """

    def step(carry: Any, grads: PyTree) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def scan(carry: Any, grads: PyTree) -> Any:
        return jax.lax.scan(lambda c, _: step(c, grads), carry, length=repeats)

    run = step if repeats == 1 else scan
    return jax.jit(run, donate_argnums=0).trace(carry, grads)


def compile_table(sizes: Sizes) -> Table:
    """Seconds to compile the optimiser step of a model, plain and under RigL."""
    inner = OPTIMIZERS[SGD]()
    optimizers = {SGD: inner, SPARSIFIED.format(SGD): under_rigl(inner, sizes.sparsity)}
    rows = []
    for model in sizes.models:
        shapes = param_shapes(model, sizes.image)
        for name, tx in optimizers.items():
            carry = (shapes, jax.eval_shape(tx.init, shapes))
            with empty_caches():
                costs = _compile_costs(tx, carry)
            rows.append({"optimiser": name, "model": model} | costs)
    return Table(
        "Compiling an optimiser step",
        "Tracing, lowering and compiling together, with the caches of jax empty and "
        "the one on disk off; of it tracing: what the library's Python takes.",
        rows,
    )


def _compile_costs(tx: optax.GradientTransformation, carry: Any) -> dict[str, float]:
    traced = []
    trace = time_call(lambda: traced.append(trace_step(tx, carry, carry[0])))
    rest = time_call(lambda: traced[0].lower().compile())
    return {
        "s": trace.wall + rest.wall,
        "CPU s": trace.cpu + rest.cpu,
        "of it tracing": trace.cpu,
    }


@contextlib.contextmanager
def empty_caches() -> Iterator[None]:
    """Empties the caches of JAX, and turns the one on disk off for a while."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.clear_caches()
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX asks once whether there is a cache on disk and remembers the answer.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
