"""Which of these methods trains the better network, alone or mixed with others?

Any rows of `d2sparse.constraints.METHODS`, each under further constraints by `--with`,
over sparsities, learning rates and seeds. All methods of a seed see the same labels,
and differences to the first method are paired. Mean and standard error over seeds.

    python -m experiments.compare
    python -m experiments.compare --methods=rigl,imp --with=averaged
    python -m experiments.compare --methods=imp,soup,swamp --sparsities=0.9,0.98
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import simple_parsing

from d2sparse import data, plots, records
from d2sparse.constraints import METHODS, MIXES, Options
from d2sparse.train import TrainState
from experiments import cli, results, rows, units
from experiments.splits import draw_splits
from experiments.task import TaskConfig, default_workdir, make_task
from experiments.variants import Variant, exact

_COLUMNS = {
    "method": "method",
    "accuracy": "accuracy %",
    "to_first": "minus the first",
    "nll": "NLL",
    "ece": "ECE %",
    "nonzeros": "non-zeros",
    "relative_macs": "training MACs",
    "seconds": "seconds",
}


@dataclasses.dataclass(frozen=True)
class Config(Options, TaskConfig):
    """Flags of the experiment."""

    # What to compare; differences are to the first one.
    methods: tuple[Literal[*METHODS], ...] = ("dense", "rigl", "imp", "d2_sparse")
    # Constraints that every method is put under as well.
    with_: tuple[Literal[*MIXES], ...] = simple_parsing.field(
        default=(), alias="--with"
    )
    sparsities: tuple[float, ...] = ()  # to compare; none: that of --sparsity
    # Learning rates to compare; none: the one of --learning_rate.
    learning_rates: tuple[float, ...] = ()


def run(config: Config) -> dict[str, Any]:
    """Runs what is not finished yet, and reports on all of it.

    Returns:
      The summary, as in summary.json.

    Raises:
      ValueError: something in the configuration cannot be done.
    """
    if not config.methods:
        raise ValueError(f"expected methods of {', '.join(METHODS)}, got none")
    source = data.load(config.dataset, config.data_dir)
    first = draw_splits(config, source, seed=0).train
    plans = make_plans(config, first, source.num_classes)
    workdir = config.workdir or default_workdir("compare", config)
    out = records.open_run(workdir, config, results.Finished)

    def learn(jobs: Sequence[units.Job]) -> None:
        units.learn(config, out, plans, _nothing, jobs)

    def program(name: str) -> int:
        return id(plans[name].method)

    def report() -> Mapping[str, Any]:
        return _report(config, plans, first, source.num_classes, out)

    with units.reporting(out, report) as reported:
        units.run_each(config, out, source, plans, learn, program)
    return reported()


def make_plans(config: Config, like: Any, classes: int) -> dict[str, Variant]:
    """Every method at every sparsity and learning rate.

    Raises:
      ValueError: a flag is out of its range, or two constraints claim the same thing.
    """
    axes = {"sparsity": config.sparsities, "learning_rate": config.learning_rates}
    given = {name: values for name, values in axes.items() if values}
    plans: dict[str, Variant] = {}
    for method, *values in itertools.product(config.methods, *given.values()):
        settings = dict(zip(given, values, strict=True))
        mixed = [METHODS[method], *(MIXES[name] for name in config.with_)]
        sets = {k: v for row in mixed for k, v in row.sets.items()}
        own = dataclasses.replace(config, **(sets | settings))
        task = make_task(own, like, classes, own.sparsity)
        options = dataclasses.replace(
            own,
            refresh_interval=task.interval,
            horizon=own.horizon or max(own.steps // 6, 1),
        )
        constraints = [c for row in mixed for c in row.constraints(options)]
        name = method + "".join(f"-{k}{exact(v)}" for k, v in settings.items())
        plans[name] = Variant(name, method, rows.make_method(task, constraints), {})
    return plans


def _report(
    config: Config, plans: Mapping[str, Variant], like: Any, classes: int, out: Any
) -> Mapping[str, Any]:
    """Writes summary, table and figures of the finished runs, and prints the table."""
    task = make_task(config, like, classes, config.sparsity)
    finished = {name: results.gather(out, name, config.seeds) for name in plans}
    first, table = next(iter(finished.values())), []
    for number, (name, own) in enumerate(finished.items()):
        row = results.summarise(name, own, task)
        table.append(
            row | (results.difference("to_first", own, first) if number else {})
        )
    summary = results.publish(config, out, "methods", table, _COLUMNS)
    measured = results.measured(table)
    label = f"{results.judged(config)} accuracy"
    out.save_figure(
        "accuracy_against_cost", plots.accuracy_against_cost(measured, label)
    )
    return summary


def _nothing(job: units.Job, state: TrainState) -> Mapping[str, Any]:
    del job, state
    return {}


if __name__ == "__main__":
    cli.main(run, Config)
