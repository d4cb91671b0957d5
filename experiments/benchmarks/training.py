"""Whole training steps: one large network, and many small ones at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import models, rules, train
from d2sparse.masks import apply_masks
from d2sparse.schedules import every
from d2sparse.train import TrainState
from d2sparse.transforms import sparsify
from experiments.benchmarks.measure import Candidate, Table, carried, take_turns
from experiments.benchmarks.steps import OPTIMIZERS, SGD, sparse_state, under_rigl
from experiments.benchmarks.workload import (
    CLASSES,
    Sizes,
    random_data,
    random_masks,
)

DENSE, SPARSE = "dense", "sparsify(rigl), no refresh"
AT_ONCE, IN_TURN = "{} vmapped", "{} one after another"
MEMBER_IMAGE = (8, 8, 1)


def training_table(sizes: Sizes) -> Table:
    """A step of the first model, from images to new weights, sparse and dense."""
    data = random_data(sizes.batch, sizes.image)
    batch = jnp.arange(sizes.batch).reshape(1, -1)
    candidates = {
        what: Candidate(carried(run, state, data, batch))
        for what, (run, state) in _large_runs(data, sizes).items()
    }
    # A step of a large network takes seconds on a few cores.
    rounds = min(sizes.rounds, 2 * sizes.slow_rounds)
    timings = take_turns(candidates, rounds, rounds)
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
        "From uint8 images to new weights, sgd with momentum. Relative: to the dense "
        "network.",
        {
            "what": "training",
            "model": "model",
            "ms": "ms",
            "cpu_ms": "CPU ms",
            "relative": "relative",
        },
        rows,
    )


def _large_runs(
    data: train.Data, sizes: Sizes
) -> dict[str, tuple[train.Step, TrainState]]:
    model = models.make_model(sizes.models[0], num_classes=CLASSES)
    loss, inner = train.make_loss(model), OPTIMIZERS[SGD]()
    init = jax.jit(functools.partial(train.init_state, model, inner))
    dense = init(data, jax.random.key(0))
    masks = random_masks(dense.params, sizes.sparsity)
    sparse = dense._replace(
        params=apply_masks(dense.params, masks),
        opt_state=sparse_state(inner, dense.params, masks),
    )
    wrapped = under_rigl(inner, sizes.sparsity)
    return {
        DENSE: (train.make_runner(train.make_train_step(loss, inner)), dense),
        SPARSE: (train.make_runner(train.make_train_step(loss, wrapped)), sparse),
    }


def seeds_table(sizes: Sizes) -> Table:
    """Many seeds of a small network in one program against one after another."""
    timings = take_turns(member_candidates(sizes), sizes.rounds, sizes.slow_rounds)
    rows = []
    for seeds in sizes.seeds:
        in_turn = timings[IN_TURN.format(seeds)].wall
        for what in (AT_ONCE.format(seeds), IN_TURN.format(seeds)):
            wall = timings[what].wall
            rows.append(
                {
                    "what": what,
                    "model": "convnet_s",
                    "ms": 1e3 * wall / sizes.member_steps,
                    "member_steps": seeds * sizes.member_steps / wall,
                    "relative": in_turn / wall,
                }
            )
    return Table(
        f"Many runs, {sizes.member_batch} images of 8 × 8 each",
        f"RigL with a refresh every {sizes.member_steps} steps. ms: one step of all "
        "runs. Member-steps: steps of single runs in a second. Relative: to the same "
        "runs one after another; above 1 is faster.",
        {
            "what": "runs",
            "model": "model",
            "ms": "ms",
            "member_steps": "member-steps per s",
            "relative": "relative",
        },
        rows,
    )


def member_candidates(sizes: Sizes) -> dict[str, Candidate]:
    """Every number of seeds, in one program and one after another."""
    data = random_data(4 * sizes.member_batch, MEMBER_IMAGE)
    seeds = max(sizes.seeds)
    step, states = make_members(data, seeds, sizes)
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
    data: train.Data, seeds: int, sizes: Sizes
) -> tuple[train.Step, TrainState]:
    """The training step of one run, and the states of all, stacked but for the step."""
    model = models.convnet_s(CLASSES)
    tx = sparsify(OPTIMIZERS[SGD](), rules.rigl(sizes.sparsity))
    loss, due = train.make_loss(model), every(sizes.member_steps)

    step = train.make_train_step(loss, tx, when=due)
    init = jax.vmap(functools.partial(train.init_state, model, tx, data))
    states = jax.jit(init)(jax.random.split(jax.random.key(0), seeds))
    return step, states._replace(step=jnp.zeros((), jnp.int32))


def pick_members(states: TrainState, index: int | slice) -> TrainState:
    """The state of one run or of some, out of those that `make_members` stacks."""
    members = jax.tree.map(lambda x: x[index], states._replace(step=None))
    return members._replace(step=states.step)


def _all(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    return lambda: [call() for call in calls]
