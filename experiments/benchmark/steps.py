"""What `sparsify` adds to an optimiser's step, and what it takes to compile it."""

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
    Table,
    carried,
    num_bytes,
    take_turns,
    temporary_bytes,
    time_call,
)
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
WRAPPED = "sparsify({}, rigl)"


def under_rigl(
    inner: optax.GradientTransformation, sparsity: float
) -> optax.GradientTransformation:
    """RigL around an optimiser, its refresh part of the program but never due."""
    return sparsify(inner, rules.rigl(sparsity), every(2**31 - 1))


def sparse_state(
    inner: optax.GradientTransformation, params: PyTree, masks: PyTree
) -> PyTree:
    """The state of `sparsify` around an optimiser, begun with given masks."""

    @jax.jit
    def init(params: PyTree, masks: PyTree) -> PyTree:
        return sparsify(inner, rules.fixed(masks)).init(params)

    return init(params, masks)


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
        {
            "what": "optimiser",
            "model": "model",
            "ms": "ms",
            "cpu_ms": "CPU ms",
            "relative": "relative",
            "temporary": "temporary",
            "state": "state",
        },
        rows,
    )


def _step_rows(model: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    params = make_params(model, sizes.image)
    grads = jax.tree.map(lambda w: 1e-3 * w[..., ::-1], params)
    carries = dict(_carries(params, sizes.sparsity))
    programs = {
        name: compile_step(tx, carry, grads, sizes.repeats)
        for name, (tx, carry) in carries.items()
    }
    candidates = {
        name: Candidate(_repeated(program, carries[name][1], grads, sizes.steps))
        for name, program in programs.items()
    }
    timings = take_turns(candidates, sizes.rounds, sizes.slow_rounds)
    for name in timings:
        timing = timings[name].over(sizes.steps * sizes.repeats)
        plain = next(inner for inner in OPTIMIZERS if inner in name)
        yield {
            "what": name,
            "model": model,
            "ms": 1e3 * timing.wall,
            "cpu_ms": 1e3 * timing.cpu,
            "relative": timings[name].wall / timings[plain].wall,
            "temporary": temporary_bytes(programs[name]) / num_bytes(params),
            "state": num_bytes(carries[name][1][1]) / num_bytes(params),
        }


def _carries(params: PyTree, sparsity: float) -> Iterator[tuple[str, Any]]:
    """Optimisers by name, each with the parameters and the state it begins with."""
    masks = random_masks(params, sparsity)
    for name, make in OPTIMIZERS.items():
        inner = make()
        yield name, (inner, (params, jax.jit(inner.init)(params)))
        begin = (apply_masks(params, masks), sparse_state(inner, params, masks))
        yield WRAPPED.format(name), (under_rigl(inner, sparsity), begin)


def _repeated(
    program: jax.stages.Compiled, carry: Any, grads: PyTree, steps: int
) -> Callable[[], Any]:
    step = carried(program, carry, grads)

    def call() -> None:
        for _ in range(steps):
            step()

    return call


def compile_step(
    tx: optax.GradientTransformation, carry: Any, grads: PyTree, repeats: int = 1
) -> jax.stages.Compiled:
    """The step of `trace_step`, lowered and compiled."""
    return trace_step(tx, carry, grads, repeats).lower().compile()


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
    optimizers = {SGD: inner, WRAPPED.format(SGD): under_rigl(inner, sizes.sparsity)}
    rows = []
    for model in sizes.models:
        shapes = param_shapes(model, sizes.image)
        for name, tx in optimizers.items():
            carry = (shapes, jax.eval_shape(tx.init, shapes))
            with nothing_compiled():
                rows.append({"what": name, "model": model} | _compile_costs(tx, carry))
    return Table(
        "Compiling an optimiser step",
        "Tracing, lowering and compiling together, with the caches of jax empty and "
        "the one on disk off; of it tracing: what the library's Python takes.",
        {
            "what": "optimiser",
            "model": "model",
            "s": "s",
            "cpu_s": "CPU s",
            "trace_cpu_s": "of it tracing",
        },
        rows,
    )


def _compile_costs(tx: optax.GradientTransformation, carry: Any) -> dict[str, float]:
    traced = []
    trace = time_call(lambda: traced.append(trace_step(tx, carry, carry[0])))
    rest = time_call(lambda: traced[0].lower().compile())
    return {
        "s": trace.wall + rest.wall,
        "cpu_s": trace.cpu + rest.cpu,
        "trace_cpu_s": trace.cpu,
    }


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """Lets jax forget its programs and leave those on disk alone for a while."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.clear_caches()
    jax.config.update("jax_enable_compilation_cache", False)
    # Whether there is a cache on disk is asked once and remembered.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
