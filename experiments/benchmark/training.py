"""Cost of whole training steps: of one large network, and of many small ones."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import constraints, models, train
from d2sparse.constraints import Moves
from d2sparse.train import Data, Program, Recipe, Training, TrainState
from experiments.benchmark.measure import Candidate, stateful, time_in_turns
from experiments.benchmark.tables import Table
from experiments.benchmark.workload import CLASSES, Sizes, random_data

DENSE, SPARSE = "dense", "sparsify(rigl), no refresh"
AT_REFRESH = "sparsify(rigl), at a refresh"
DUE = 2**20  # From this step on the masks of the large network are refreshed at each.
ENDLESS = 2**30  # Steps of a training: its masks move at all steps that are timed.
AT_ONCE, IN_TURN = "{} vmapped", "{} one after another"


def endless(model: str, data: Data, batch_size: int) -> Training:
    """The dense training of a model, by sgd with momentum at a constant rate.

    Raises:
      ValueError: the model is unknown.
    """
    network = models.make_model(model, num_classes=CLASSES)
    return train.plain(network, data, at_constant_rate(batch_size))


def at_constant_rate(batch_size: int) -> Recipe:
    """Sgd with momentum, as long as one likes."""
    return Recipe(ENDLESS, batch_size, schedule="constant", weight_decay=0.0)


def under_rigl(training: Training, sparsity: float, interval: int = 1) -> Training:
    """A training under RigL, whose growth looks at the gradient of the step."""
    moves = Moves(interval, growth_samples=0)
    return train.constrain(training, constraints.rigl(sparsity, moves))


def init_runs(program: Program, data: Data, number: int) -> list[TrainState]:
    """The states of several runs at step 0, by as many keys."""
    init = jax.jit(lambda key, data: program.init(key, data).state)
    return [init(key, data) for key in jax.random.split(jax.random.key(0), number)]


def training_table(sizes: Sizes) -> Table:
    """A step of the first model, from images to new weights, sparse and dense."""
    data = random_data(sizes.batch, sizes.image)
    indices = jnp.tile(jnp.arange(sizes.batch), (sizes.repeats, 1))
    candidates = {
        name: Candidate(stateful(program.run, state, data, indices))
        for name, (program, state) in large_runs(data, sizes).items()
    }
    # A step of a large network takes seconds on a few cores.
    rounds = min(sizes.rounds, 2 * sizes.slow_rounds)
    timings = time_in_turns(candidates, rounds, rounds)
    rows = [
        {
            "training": name,
            "model": sizes.models[0],
            **timing.over(sizes.repeats).cells(),
            "relative": timing.wall / timings[DENSE].wall,
        }
        for name, timing in timings.items()
    ]
    height, width, _ = sizes.image
    return Table(
        f"One training step, {sizes.batch} images of {height} × {width}",
        "From uint8 images to new weights, sgd with momentum. At a refresh the step "
        "searches its masks as well. Relative: to the dense network."
        + (f" A call takes {sizes.repeats} steps." if sizes.repeats > 1 else ""),
        rows,
    )


def large_runs(data: Data, sizes: Sizes) -> dict[str, tuple[Program, TrainState]]:
    """Trainings of the first model by name, each with the state it starts from."""
    dense = endless(sizes.models[0], data, sizes.batch)
    # One program, whose refreshes depend on the step, serves both rows.
    sparse = under_rigl(dense, sizes.sparsity)._replace(when=lambda step: step >= DUE)
    programs = {DENSE: train.make_program(dense), SPARSE: train.make_program(sparse)}
    runs = {name: (p, init_runs(p, data, 1)[0]) for name, p in programs.items()}
    program, state = runs[SPARSE]
    return {**runs, AT_REFRESH: (program, state._replace(step=jnp.int32(DUE)))}


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
        rows,
    )


def _seeds_rows(
    model: str, image: tuple[int, int, int], sizes: Sizes
) -> Iterator[dict[str, Any]]:
    candidates = member_candidates(model, image, sizes)
    timings = time_in_turns(candidates, sizes.rounds, sizes.slow_rounds)
    for seeds in sizes.seeds:
        in_turn = timings[IN_TURN.format(seeds)].wall
        for name in (AT_ONCE.format(seeds), IN_TURN.format(seeds)):
            wall = timings[name].wall
            yield {
                "runs": name,
                "model": model,
                "ms": 1e3 * wall / sizes.member_steps,
                "member-steps per s": seeds * sizes.member_steps / wall,
                "relative": in_turn / wall,
            }


def member_candidates(
    model: str, image: tuple[int, int, int], sizes: Sizes
) -> dict[str, Candidate]:
    """Every number of seeds of a network, in one program and one after another."""
    program, states, data = make_members(model, image, sizes)
    shape = (sizes.member_steps, len(states), sizes.member_batch)
    order = np.random.default_rng(0).integers(0, len(data.labels), shape, np.int32)
    indices = jnp.asarray(order)
    single = [
        stateful(program.run, state, data, indices[:, i])
        for i, state in enumerate(states)
    ]
    candidates = {}
    for n in sizes.seeds:
        group = (train.stack_runs(states[:n]), train.stack_runs([data] * n))
        at_once = stateful(program.run, *group, indices[:, :n])
        candidates[AT_ONCE.format(n)] = Candidate(at_once, slow=n > 1)
        candidates[IN_TURN.format(n)] = Candidate(_all(single[:n]), slow=n > 1)
    return candidates


def make_members(
    model: str, image: tuple[int, int, int], sizes: Sizes
) -> tuple[Program, list[TrainState], Data]:
    """A small network under RigL, the states of its runs, and their data."""
    data = random_data(4 * sizes.member_batch, image)
    dense = endless(model, data, sizes.member_batch)
    sparse = under_rigl(dense, sizes.sparsity, sizes.member_steps)
    program = train.make_program(sparse)
    return program, init_runs(program, data, max(sizes.seeds)), data


def _all(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    return lambda: [call() for call in calls]
