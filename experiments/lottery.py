"""How far can a network be pruned, if its winning ticket is trained again?

Iterative magnitude pruning: train, prune a part of the live weights, rewind the others
to an early step, and repeat. Its control prunes random weights by the same numbers.
Every row of the table is one round: mean and standard deviation over seeds of the
network that the ticket trains to, and the paired differences to the dense network and
to the control with their standard errors. Tickets are saved, and any experiment starts
from one by `--ticket`.

    python -m experiments.lottery
    python -m experiments.lottery --rewinding=learning_rate
    python -m experiments.lottery --losers=freeze --rounds=1 --sparsity=0.98
    python -m experiments.data_efficient_lth
    python -m experiments.prune --rules=fixed --ticket=RUN/tickets/UNIT/ROUND
"""

import dataclasses
import shutil
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax

from d2sparse import data, lottery, plots, records, rules, scores
from d2sparse.lottery import Rewinding, Ticket
from d2sparse.masks import dense_masks
from d2sparse.train import TrainState
from d2sparse.transforms import freeze, get_masks, sparsify
from experiments import cli, results, units
from experiments.methods import hunt_tickets
from experiments.singles import Network, Recipe, make_network, rewind_step
from experiments.splits import draw_splits
from experiments.task import (
    PrunableName,
    Task,
    TaskConfig,
    check_choice,
    check_effects,
    check_least,
    default_workdir,
    make_prunable,
    make_task,
)
from experiments.tickets import save_ticket

_COLUMNS = {
    "method": "pruned by",
    "sparsity": "sparsity %",
    "accuracy": "accuracy %",
    "to_dense": "minus dense",
    "to_random": "minus random",
    "nll": "NLL",
    "ece": "ECE %",
    "nonzeros": "non-zeros",
    "relative_macs": "MACs so far",
    "seconds": "seconds so far",
}


@dataclasses.dataclass(frozen=True)
class Config(TaskConfig):
    """Flags of the experiment."""

    # What rounds prune by: the smallest magnitudes or, as the control, random weights.
    score: tuple[Literal["magnitude", "random"], ...] = ("magnitude", "random")
    # Zeros among the prunable weights after the last round; None: a fifth of the live
    # weights goes in every round.
    sparsity: float | None = 0.95
    rounds: int = 6  # number of prunings, each of the same part of the live weights
    steps: int = 0  # optimiser steps of one round; 0: by --epochs
    epochs: int = 0  # length of a round in passes over the labels; 0: of 1000 steps
    # The step that later rounds start from, as a part of the first; 0 is its start.
    rewind_fraction: float = 0.1
    # What goes back to that step: weights and learning rate, or only the latter.
    rewinding: Rewinding = "weights"
    # What becomes of pruned weights: zero, or frozen at the value they are rewound to
    # (RISE). Networks with frozen weights are dense, and leave no ticket.
    losers: Literal["zero", "freeze"] = "zero"
    # What may be pruned; body is all but the first layer and the head.
    prunable: PrunableName = "kernels"


def run(config: Config) -> dict[str, Any]:
    """Runs what is not finished yet, and reports on all of it.

    Returns:
      The summary, as in summary.json.

    Raises:
      ValueError: something in the configuration cannot be done.
    """
    _check(config)
    source = data.load(config.dataset, config.data_dir)
    first = draw_splits(config, source, seed=0)
    config = resolve(config, len(first.train.labels))
    task = make_task(config, first.train, source.num_classes, config.sparsity)
    sparsities = lottery.round_sparsities(config.sparsity, config.rounds)
    rewind_step(config.rewind_fraction, config.steps)
    task = task._replace(prunable=make_prunable(config.prunable, task))
    wrap = freeze if config.losers == "freeze" else sparsify
    rule = rules.fixed(dense_masks(task.params))
    network = make_network(task, Recipe(rule, wrap=wrap))
    workdir = config.workdir or default_workdir("lottery", config)
    out = records.open_run(workdir, config, results.Rounds)

    def learn(jobs: Sequence[units.Job]) -> None:
        for job in jobs:
            run_unit(config, task, network, sparsities, out, job)

    asked = [0.0, *sparsities]
    with units.reporting(out, lambda: report(config, task, asked, out)) as reported:
        units.run_each(config, out, source, config.score, learn)
    return reported()


def _check(config: Config) -> None:
    if not config.score:
        raise ValueError("expected a score to prune by, magnitude or random, got none")
    for score in config.score:
        check_choice("score", score, ("magnitude", "random"))
    check_choice("losers", config.losers, ("zero", "freeze"))
    check_choice("rewinding", config.rewinding, get_args(Rewinding))
    check_least(config, {"steps": 0, "epochs": 0, "batch_size": 1})
    still = (False, "since masks change between rounds alone")
    by_steps = (not config.steps, f"since steps are {config.steps}")
    effects = {"refresh_interval": still, "growth_samples": still, "epochs": by_steps}
    check_effects(config, effects)
    if config.ticket:
        raise ValueError(
            f"expected no ticket, since rounds begin dense, got {config.ticket}; go on "
            "from it with `python -m experiments.prune`"
        )
    if config.sparsity == 0:
        raise ValueError("expected a sparsity above 0 to prune to, got 0")


def resolve(config: Config, samples: int) -> Config:
    """The configuration with the steps of a round and the final sparsity as numbers."""
    per_epoch = data.steps_per_epoch(samples, config.batch_size)
    steps = config.steps or config.epochs * per_epoch or TaskConfig.steps
    fifths = 1 - 0.8**config.rounds
    sparsity = fifths if config.sparsity is None else config.sparsity
    return dataclasses.replace(config, steps=steps, sparsity=sparsity)


def run_unit(
    config: Config,
    task: Task,
    network: Network,
    sparsities: list[float],
    out: records.Run,
    job: units.Job,
) -> None:
    """Finds the tickets of one seed, and records what each round learned and cost."""
    unit, splits = job.unit, job.splits
    session = units.open_session(config, out, network, job)
    key = jax.random.key(unit.seed)
    hunt = session.begin(
        lambda: lottery.begin_hunt(network.init(key, splits.train)),
        lambda hunt: hunt.state,
    )
    tickets = out.workdir / "tickets" / unit.name
    names = [
        f"round{number}-sparsity-{sparsity:.4f}"
        for number, sparsity in enumerate([0.0, *sparsities])
    ]
    known = names[: len(session.ledger.rounds)]
    for ticket in tickets.glob("*"):
        if ticket.name not in known:
            shutil.rmtree(ticket)  # Of an interrupted attempt.

    def on_round(number: int, state: TrainState, ticket: Ticket) -> None:
        found = units.judge(network, network.settle(state, splits.train), splits) | {
            "sparsity": results.sparsity(get_masks(state.opt_state), task),
            "training_macs": session.ledger.spent,
            "seconds": session.seconds,
        }
        if config.losers == "zero":
            found["ticket_bytes"] = save_ticket(tickets / names[number], ticket)
        session.ledger.rounds.append(found)

    try:
        hunt_tickets(
            session,
            network.run,
            hunt,
            splits.train,
            config.steps,
            rewind_step(config.rewind_fraction, config.steps),
            sparsities,
            on_round=on_round,
            prunable=task.prunable,
            score=getattr(scores, unit.method),
            rewinding=config.rewinding,
        )
    except FloatingPointError as error:
        out.fail(unit, str(error))
        return
    finally:
        session.wait()
    out.finish(unit, {"rounds": session.ledger.rounds})


def report(
    config: Config, task: Task, sparsities: list[float], out: records.Run
) -> dict[str, Any]:
    """Writes summary, table and figures of the finished units, and prints the table."""
    rows = []
    for score in config.score:
        for number, sparsity in enumerate(sparsities):
            own = _round(out, score, config.seeds, number)
            row = results.summarise(score, own, task) | {"asked": sparsity}
            if number:
                dense = _round(out, score, config.seeds, 0)
                row |= results.difference("to_dense", own, dense)
            if number and score == "magnitude" and "random" in config.score:
                control = _round(out, "random", config.seeds, number)
                row |= results.difference("to_random", own, control)
            rows.append(row)
    columns = dict(_COLUMNS)
    if config.losers == "freeze":
        columns["sparsity"] = "frozen %"
    summary = results.publish(config, out, "rounds", rows, columns, "deviation")
    _draw(config, rows, out)
    return summary


def _draw(config: Config, rows: list[dict[str, Any]], out: records.Run) -> None:
    label = f"{results.judged(config)} accuracy"
    rows = results.measured(rows)
    if not rows:
        return
    dense = rows[0] | {"method": "dense"}
    sparse = [row for row in results.with_weights(rows) if row["asked"]]
    if sparse:
        figure = plots.accuracy_against_sparsity(sparse, label, dense)
        out.save_figure("accuracy_against_sparsity", figure)
    lines = records.read_metrics(out.workdir)
    curves = plots.learning_curves(lines, *results.curve_key(lines), percent=True)
    out.save_figure("learning_curves", curves)


def _round(out: records.Run, score: str, seeds: int, number: int) -> results.Results:
    """What every seed found in one round."""
    units = results.gather(out, score, seeds)
    return {seed: unit["rounds"][number] for seed, unit in units.items()}


if __name__ == "__main__":
    cli.main(run, Config)
