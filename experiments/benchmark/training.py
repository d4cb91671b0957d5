"""Whole training steps: one large network, and many small ones at once."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import models, rules, train
from d2sparse.masks import apply_masks
from d2sparse.schedules import every
from d2sparse.train import TrainState
from d2sparse.transforms import sparsify
from experiments.benchmark.measure import Candidate, Table, carried, take_turns
from experiments.benchmark.steps import OPTIMIZERS, SGD, sparse_state
from experiments.benchmark.workload import (
    CLASSES,
    Sizes,
    random_data,
    random_masks,
)

DENSE, SPARSE = "dense", "sparsify(rigl), no refresh"
AT_REFRESH = "sparsify(rigl), at a refresh"
DUE = 2**30  # From this step on the masks are refreshed at every one.
AT_ONCE, IN_TURN = "{} vmapped", "{} one after another"


def training_table(sizes: Sizes) -> Table:
    """A step of the first model, from images to new weights, sparse and dense."""
    data = random_data(sizes.batch, sizes.image)
    batch = jnp.tile(jnp.arange(sizes.batch), (sizes.repeats, 1))
    # Cached: the sparse network is trained by one program, refreshed or not.
    make_runner = functools.cache(train.make_runner)
    candidates = {
        what: Candidate(carried(make_runner(step), state, data, batch))
        for what, (step, state) in large_runs(data, sizes).items()
    }
    # A step of a large network takes seconds on a few cores.
    rounds = min(sizes.rounds, 2 * sizes.slow_rounds)
    timings = take_turns(candidates, rounds, rounds)
    timings = {what: timing.over(sizes.repeats) for what, timing in timings.items()}
    height, width, _ = sizes.image
    rows = [
        {
            "what": what,
            "model": sizes.models[0],
            "ms": 1e3 * timing.wall,
            "cpu_ms": 1e3 * timing.cpu,
            "relative": timing.wall / timings[DENSE].wall,
        }
        for what, timing in timings.items()
    ]
    return Table(
        f"One training step, {sizes.batch} images of {height} × {width}",
        "From uint8 images to new weights, sgd with momentum. At a refresh the step "
        "searches its masks as well. Relative: to the dense network."
        + (f" A call takes {sizes.repeats} steps." if sizes.repeats > 1 else ""),
        {
            "what": "training",
            "model": "model",
            "ms": "ms",
            "cpu_ms": "CPU ms",
            "relative": "relative",
        },
        rows,
    )


def large_runs(
    data: train.Data, sizes: Sizes
) -> dict[str, tuple[train.Step, TrainState]]:
    """Training steps of the first model, each with the state it begins with."""
    model = models.make_model(sizes.models[0], num_classes=CLASSES)
    loss, inner = train.make_loss(model), OPTIMIZERS[SGD]()
    init = jax.jit(functools.partial(train.init_state, model, inner))
    dense = init(data, jax.random.key(0))
    masks = random_masks(dense.params, sizes.sparsity)
    sparse = dense._replace(
        params=apply_masks(dense.params, masks),
        opt_state=sparse_state(inner, dense.params, masks),
    )
    tx = sparsify(inner, rules.rigl(sizes.sparsity))
    step = train.make_train_step(loss, tx, when=lambda step: step >= DUE)
    return {
        DENSE: (train.make_train_step(loss, inner), dense),
        SPARSE: (step, sparse),
        AT_REFRESH: (step, sparse._replace(step=jnp.int32(DUE))),
    }


def seeds_table(sizes: Sizes) -> Table:
    """Many seeds of small networks in one program against one after another."""
    rows = [row for member in sizes.members for row in _seeds_rows(*member, sizes)]
    shapes = (f"{h} × {w} × {c} for {name}" for name, (h, w, c) in sizes.members)
    return Table(
        f"Many runs, {sizes.member_batch} images each",
        f"Images of {', '.join(shapes)}. RigL with a refresh every "
        f"{sizes.member_steps} steps. ms: one step of all runs. Member-steps: steps of "
        "single runs in a second. Relative: to the same runs one after another; above "
        "1 is faster.",
        {
            "what": "runs",
            "model": "model",
            "ms": "ms",
            "member_steps": "member-steps per s",
            "relative": "relative",
        },
        rows,
    )


def _seeds_rows(
    model: str, image: tuple[int, int, int], sizes: Sizes
) -> Iterator[dict[str, Any]]:
    candidates = member_candidates(model, image, sizes)
    timings = take_turns(candidates, sizes.rounds, sizes.slow_rounds)
    for seeds in sizes.seeds:
        in_turn = timings[IN_TURN.format(seeds)].wall
        for what in (AT_ONCE.format(seeds), IN_TURN.format(seeds)):
            wall = timings[what].wall
            yield {
                "what": what,
                "model": model,
                "ms": 1e3 * wall / sizes.member_steps,
                "member_steps": seeds * sizes.member_steps / wall,
                "relative": in_turn / wall,
            }


def member_candidates(
    model: str, image: tuple[int, int, int], sizes: Sizes
) -> dict[str, Candidate]:
    """Every number of seeds of a network, in one program and one after another."""
    data = random_data(4 * sizes.member_batch, image)
    seeds = max(sizes.seeds)
    step, states = make_members(model, data, seeds, sizes)
    shape = (sizes.member_steps, seeds, sizes.member_batch)
    order = np.random.default_rng(0).integers(0, len(data.labels), shape, np.int32)
    run = train.make_runner(step)
    in_turn = [
        carried(run, pick_members(states, i), data, jnp.asarray(order[:, i]))
        for i in range(seeds)
    ]
    candidates = {}
    for n in sizes.seeds:
        group, rows = pick_members(states, slice(n)), jnp.asarray(order[:, :n])
        at_once = carried(run, group, train.stack_runs([data] * n), rows)
        candidates[AT_ONCE.format(n)] = Candidate(at_once, slow=n > 1)
        candidates[IN_TURN.format(n)] = Candidate(_all(in_turn[:n]), slow=n > 1)
    return candidates


def make_members(
    model: str, data: train.Data, seeds: int, sizes: Sizes
) -> tuple[train.Step, TrainState]:
    """The training step of one run, and the states of all, stacked but for the step."""
    network = models.make_model(model, num_classes=CLASSES)
    tx = sparsify(OPTIMIZERS[SGD](), rules.rigl(sizes.sparsity))
    loss, due = train.make_loss(network), every(sizes.member_steps)

    step = train.make_train_step(loss, tx, when=due)
    init = jax.vmap(functools.partial(train.init_state, network, tx, data))
    states = jax.jit(init)(jax.random.split(jax.random.key(0), seeds))
    return step, states._replace(step=jnp.zeros((), jnp.int32))


def pick_members(states: TrainState, index: int | slice) -> TrainState:
    """The state of one run or of some, out of those that `make_members` stacks."""
    members = jax.tree.map(lambda x: x[index], states._replace(step=None))
    return members._replace(step=states.step)


def _all(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    return lambda: [call() for call in calls]
