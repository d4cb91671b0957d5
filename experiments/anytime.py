"""Data arrive in pieces: who predicts well at any time, and how small may it get?

Learners on a stream of megabatches, pruned on the way (anytime progressive pruning,
APP), at once (one_shot), within the stages (gradual, rigl), or never (dense). After
every megabatch each is tested; the table says the mean error over the stream, what is
left at the end, and paired differences with their standard errors.

The code released with APP (arXiv 2204.01640) does something else than the method:
masks after the first are computed for random weights, dead weights compete for places
and then stay dead, and the score looks at the first examples that ever came. What is
called "a third of the size" has some 2 % of its weights. Here `app` is the method as it
is described, and `app_2022` the released behaviour; `--compat=app-2022` also takes the
data in their own order. Its augmented validation and its literal learning rate are left
out. `random_matched` deletes random weights down to the same densities.

    python -m experiments.anytime
    python -m experiments.anytime --dataset=mnist --samples_per_class=200 --epochs=15
    python -m experiments.anytime --dataset=cifar10 --model=resnet20s --shift=4 --flip
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from d2sparse import anytime, data, plots, records
from d2sparse.anytime import density
from experiments import cli, results, units
from experiments.megabatches.learners import Learner, make_learner
from experiments.megabatches.options import (
    StreamConfig,
    Timetable,
    check,
    make_timetable,
    released,
)
from experiments.megabatches.scoring import make_scorer
from experiments.megabatches.walks import Stage, walk_unit
from experiments.splits import draw_splits
from experiments.task import Task, default_workdir, make_prunable, make_task

_COLUMNS = {
    "method": "method",
    "mean_error": "mean error %",
    "error_to_dense": "error minus dense",
    "error_to_one_shot": "error minus one-shot",
    "accuracy": "final accuracy %",
    "to_dense": "accuracy minus dense",
    "to_one_shot": "accuracy minus one-shot",
    "gap": "gap %",
    "density": "final density %",
    "nonzeros": "non-zeros",
    "relative_macs": "training MACs",
    "seconds": "seconds",
}
_REFERENCES = ("dense", "one_shot")


class Stages(TypedDict):
    """The results of a unit."""

    stages: list[Stage]


# What is drawn against the megabatches: key, label, whether on a logarithmic axis.
_FIGURES = {
    "anytime_accuracy": ("accuracy", "accuracy", False),
    "density": ("density", "live weights of the prunable ones", True),
    "gap": ("gap", "training minus test accuracy", False),
}
Config = StreamConfig


def run(config: Config) -> dict[str, Any]:
    """Runs what is not finished yet, and reports on all of it.

    Returns:
      The summary, as in summary.json.

    Raises:
      ValueError: something in the configuration cannot be done.
    """
    check(config)
    given, config = config, resolve(config)
    source = data.load(config.dataset, config.data_dir)
    first = draw_splits(config, source, seed=0)
    table = make_timetable(config, np.asarray(first.train.labels), seed=0)
    task = _make_stream_task(config, first.train, source.num_classes, table)
    learners = {
        name: make_learner(
            name, task, config, len(table.stages), len(table.visible[0].train)
        )
        for name in config.methods
    }
    scorers = {
        criterion: make_scorer(task, criterion, config.score_batch)
        for criterion in {own.config.criterion for own in learners.values()}
    }
    workdir = given.workdir or default_workdir("anytime", given)
    out = records.open_run(workdir, given, Stages)

    def learn(jobs: Sequence[units.Job]) -> None:
        for job in jobs:
            own = learners[job.unit.method]
            labels = np.asarray(job.splits.train.labels)
            timetable = make_timetable(config, labels, job.unit.seed)
            left = densities(own, out, job.unit.seed, len(timetable.stages))
            if left is None:
                out.fail(job.unit, f"{own.matches} has failed")
                continue
            scorer = scorers[own.config.criterion]
            walk_unit(task, own, scorer, timetable, out, job, left)

    sizes = source.num_classes, len(first.judge.labels)
    with units.reporting(out, lambda: report(config, task, *sizes, out)) as reported:
        units.run_each(config, out, source, config.methods, learn)
    return reported()


def resolve(config: Config) -> Config:
    """The flags with those that `--compat` stands for."""
    return released(config) if config.compat == "app-2022" else config


def densities(
    learner: Learner, out: records.Run, seed: int, stages: int
) -> list[float | None] | None:
    """Part of the weights that is left at every stage, None where nothing is pruned.

    Returns:
      None for all of it where the learner whose densities are taken has failed.
    """
    if learner.matches is None:
        return list(learner.densities or [None] * stages)
    found = out.finished(records.Unit(learner.matches, seed))
    if found is None or "stages" not in found:
        return None
    return [stage["density"] for stage in found["stages"]]


def _make_stream_task(
    config: Config, labelled: Any, num_classes: int, table: Timetable
) -> Task:
    """The task of the whole stream; the stages set the learning rate."""
    whole = dataclasses.replace(config, steps=table.steps, schedule="constant")
    task = make_task(whole, labelled, num_classes, 1 - density(config.tau))
    return task._replace(prunable=make_prunable(config.prunable, task))


def report(
    config: Config, task: Task, num_classes: int, test_size: int, out: records.Run
) -> dict[str, Any]:
    """Writes summary, table and figures of the finished units, and prints the table."""
    stages = {
        name: {
            seed: unit["stages"]
            for seed, unit in results.gather(out, name, config.seeds).items()
        }
        for name in config.methods
    }
    found = {
        name: {
            seed: measure(config, own, num_classes, test_size)
            for seed, own in by_seed.items()
        }
        for name, by_seed in stages.items()
    }
    rows = [_row(name, found, task) for name in found]
    columns = {
        key: title
        for key, title in _COLUMNS.items()
        if not key.endswith(("to_dense", "to_one_shot"))
        or key.partition("to_")[2] in config.methods
    }
    table = records.markdown_table([_cells(row) for row in rows], columns)
    along = {name: _along_stream(by_seed) for name, by_seed in stages.items()}
    summary = results.write(config, out, {"methods": rows, "stages": along}, table)
    _draw(config, stages, out)
    return summary


def measure(
    config: Config,
    stages: Sequence[Mapping[str, Any]],
    num_classes: int,
    test_size: int,
) -> dict[str, Any]:
    """What is told of one learner with one seed, on the finest grid."""
    errors = data.on_finest_grid(
        [stage["test_error"] for stage in stages],
        config.wait,
        config.megabatches,
        1 - 1 / num_classes,
    )
    stored = [stage["nonzeros"] for stage in stages]
    last = {k: v for k, v in stages[-1].items() if k != "layers"}
    return (
        last
        | anytime.anytime_measures(errors, test_size)
        | {
            "most_nonzeros": max(stored),
            "sum_nonzeros": sum(stored),
            "mean_gap": float(np.mean([stage["gap"] for stage in stages])),
        }
    )


def _row(
    name: str, found: Mapping[str, Mapping[int, dict[str, Any]]], task: Task
) -> dict[str, Any]:
    own = found[name]
    row = results.summarise(name, own, task)
    if not own:
        return row
    for key in next(iter(own.values())):
        summary = records.summarize(unit[key] for unit in own.values())
        row.setdefault(key, summary.mean)
        row[f"{key}_error"] = summary.standard_error
    for reference in _REFERENCES:
        if reference in found and name != reference:
            other = found[reference]
            row |= results.difference(f"to_{reference}", own, other)
            row |= results.difference(
                f"error_to_{reference}", *map(_errors_as_accuracy, (own, other))
            )
    return row


def _errors_as_accuracy(
    units: Mapping[int, Mapping[str, Any]],
) -> dict[int, dict[str, Any]]:
    """What `results.difference` compares."""
    return {seed: {"accuracy": unit["mean_error"]} for seed, unit in units.items()}


def _along_stream(
    by_seed: Mapping[int, Sequence[Mapping[str, Any]]],
) -> dict[str, list[float]]:
    """Means over seeds after every stage."""
    together = list(zip(*by_seed.values(), strict=True))
    return {
        key: [float(np.mean([own[key] for own in stage])) for stage in together]
        for key in ("seen", "test_error", "density", "gap", "released_gap")
    }


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    text = results.cells(row)
    if not row["seeds"]:
        return text
    for key in ("mean_error", "gap"):
        text[key] = results.percent(row[key], row[f"{key}_error"])
    for key in ("to_dense", "to_one_shot", "error_to_dense", "error_to_one_shot"):
        if key in row:
            text[key] = results.signed_percent(row[key], row[f"{key}_error"])
    return text | {"density": f"{100 * row['density']:.3g}"}


def _draw(
    config: Config,
    stages: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]],
    out: records.Run,
) -> None:
    lines = [
        stage | {"method": name, "seed": seed, "step": (number + 1) * config.wait}
        for name, by_seed in stages.items()
        for seed, own in by_seed.items()
        for number, stage in enumerate(own)
    ]
    if not lines:
        return
    for title, (key, label, log) in _FIGURES.items():
        label = f"{results.judged(config)} {label}" if key == "accuracy" else label
        out.save_figure(title, plots.along_stream(lines, key, label, log=log))
    for name in stages:
        layers = [
            {"method": path, "seed": line["seed"], "step": line["step"], "density": d}
            for line in lines
            if line["method"] == name
            for path, d in line["layers"].items()
        ]
        if any(line["density"] < 1 for line in layers):
            figure = plots.along_stream(layers, "density", "live weights", log=True)
            out.save_figure(f"layers-{name}", figure)


if __name__ == "__main__":
    cli.main(run, Config)
