"""How far can a network be pruned, if its winning ticket is trained again?

Iterative magnitude pruning: train, prune a part of the live weights, rewind the others
to an early step, and repeat. Its control prunes random weights by the same numbers.
Every row of the table is one round: the network that the ticket trains to, and the
paired differences to the dense network and to the control. Tickets are saved, and any
experiment starts from one by `--ticket`.

    python -m experiments.lottery
    python -m experiments.lottery --rewinding=learning_rate
    python -m experiments.lottery --methods=rise --rounds=1 --sparsity=0.98
    python -m experiments.data_efficient_lth
    python -m experiments.prune --methods=fixed --ticket=RUN/tickets/RUN_NAME/ROUND
"""

import dataclasses
import shutil
from collections.abc import Mapping
from typing import Any, Literal

import pandas as pd

from d2sparse import study
from d2sparse.study import cli, reporting
from d2sparse.transforms import get_masks


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """What is pruned."""

    HIDDEN = ("ticket", *study.unread_options(("imp", "rise", "imp_distilled")))

    # imp, whose pruned weights are 0; rise, which holds them at their early values;
    # imp_distilled, which learns from a dense network that is trained before it.
    methods: tuple[Literal["imp", "rise", "imp_distilled"], ...] = ("imp",)
    sparsity: float = 0.95  # zeros among the prunable weights after the last round
    rounds: int = 6  # prunings, each of the same part of the live weights
    axes: Mapping[str, tuple[Any, ...]] = dataclasses.field(
        default_factory=lambda: {"score": ("magnitude", "random")}
    )


def run(config: Config) -> pd.DataFrame:
    """Trains what has not finished yet, and reports on all of it: a row a run."""
    if config.ticket:
        raise ValueError(
            f"expected no ticket, since rounds begin dense, got {config.ticket}; go on "
            "from it with `python -m experiments.prune`"
        )
    experiment = study.Experiment("lottery", examine=keep_ticket, report=report)
    return study.compare(config, experiment)


def keep_ticket(end: study.End) -> Mapping[str, Any]:
    """Saves the ticket of a round of imp; others go on from more than weights."""
    masks = get_masks(end.progress.state.opt_state)
    network = end.plan.training.network
    pruned = study.zeros(network, masks)
    if not end.title or end.plan.row.method != "imp" or not end.out.writes:
        return {"pruned": pruned}
    ticket = end.progress.memory["ticket"]
    name = f"{end.plan.row.name}-seed{end.seed}"
    place = end.out.workdir / "tickets" / name / end.title.replace(" ", "")
    shutil.rmtree(place, ignore_errors=True)  # Of an interrupted attempt.
    return {"pruned": pruned, "ticket_bytes": study.save_ticket(place, ticket)}


def report(comparison: study.Comparison) -> dict[str, Any]:
    """Writes summary, table and figures; a row of the table is a round."""
    rounds = study.read_runs(comparison.out, parts=True)
    if not len(rounds):
        return study.report(comparison)
    number = rounds["title"].str.removeprefix("round ")
    rounds = rounds.assign(zeros=rounds["pruned"], round=number)
    by = ["method", *comparison.axes, "round"]
    rows = study.summarise(rounds, by)
    references = {"dense": {"round": "0"}, "random": {"score": "random"}}
    for name, values in references.items():
        if values.keys() <= set(rounds.columns):
            rows = study.with_difference(rows, rounds, name, values, by)
    axes = [*comparison.axes, "round", "sparsity"]
    columns = ("nll", "nonzeros", "relative_macs")
    table = study.table_of(rows, axes, tuple(references), columns)
    heading = reporting.heading_of(comparison.config)
    results = {"rows": rows.to_dict("records")}
    summary = reporting.write(comparison, results, heading + table)
    reporting.draw_sparsities(comparison, rows)
    reporting.draw_curves(comparison)
    return summary


if __name__ == "__main__":
    cli.main(run, Config)
