"""Do two coupled sparse networks learn more from few labels than one?

D2-Sparse (this project's reconstruction, see `d2sparse.dual`) beside the baselines that
matter, at equal stored non-zeros: a static random mask, RigL, iterative magnitude
pruning with rewinding, and an uncoupled pair; and, at their own cost, a dense network
and a dense pair that teaches itself. Mean and standard error over seeds; the difference
to RigL is paired, since all methods of a seed see the same labels.

    python -m experiments.d2_sparse
    python -m experiments.d2_sparse --dataset=mnist --data_dir=../shared/tfds
    python -m experiments.d2_sparse --dataset=cifar10 --model=resnet8s --shift=4 --flip
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from d2sparse import data, dual, metrics, models, plots, records, train, tree
from d2sparse.distributions import check_sparsity
from d2sparse.schedules import refresh_interval, refresh_stop
from d2sparse.train import Data, TrainState
from experiments import cli
from experiments.methods import (
    METHODS,
    Choices,
    Method,
    MethodName,
    Task,
    make_method,
    shapes_and_macs,
)

MONITOR_SIZE = 1000
_LEAST = {
    "seeds": 1,
    "steps": 1,
    "batch_size": 1,
    "report_every": 1,
    "refresh_interval": 0,
    "growth_samples": 0,
    "horizon": 0,
    "learning_rate": 0,
    "momentum": 0,
    "weight_decay": 0,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the experiment."""

    dataset: str = "digits"  # "digits", or any TFDS image classification set
    data_dir: str | None = None  # directory of prepared TFDS sets
    samples_per_class: int = 10  # training labels of every class; 0 for all
    # Part of the labels to validate on. Above 0 the table shows validation accuracy
    # and the test set is not read: choose settings this way.
    validation_fraction: float = 0.0

    model: str = "lenet_300_100"  # network, by its name in d2sparse.models
    width: float | None = None  # width of the network, in the model's own unit
    methods: tuple[MethodName, ...] = METHODS  # what to compare
    seeds: int = 5  # runs of every method: labels, weights and order differ
    sparsity: float = 0.8  # zeros among the prunable weights; a pair shares the rest

    # How D2-Sparse's slow learner learns: by gradient, or as the fast one's average.
    mode: Literal["trained", "consolidated"] = "trained"
    # Pace of the two learners; auto is fast_slow where the slow one consolidates, since
    # a fast learner that anneals leaves nothing to average, and symmetric elsewhere.
    preset: Literal["auto", "symmetric", "fast_slow"] = "auto"
    coupling: float = 1.0  # weight of the peer's teaching, in both learners
    temperature: float = 1.0  # of the softened outputs that are taught
    coupling_ramp: int = 0  # steps over which the teaching grows to its weight
    mask_coupling: float = 1.0  # 1: masks avoid each other, 0: independent, -1: attract
    independent_views: bool = False  # augment the batch for each learner anew
    horizon: int = 0  # steps the slow average reaches back; 0: a sixth of the run

    steps: int = 1000  # optimiser steps of one training
    batch_size: int = 32  # examples per step
    # sgd adds the weight decay to the gradient, sgdw and adamw to the step.
    optimizer: Literal["sgd", "sgdw", "adamw"] = "sgd"
    learning_rate: float = 0.1  # the largest; falls along a cosine
    momentum: float = 0.9  # of sgd; the first moment's decay in adamw
    weight_decay: float = 5e-4  # on live kernels
    label_smoothing: float = 0.0  # in every method's loss
    refresh_interval: int = 0  # steps between mask refreshes; 0: from data and steps
    growth_samples: int = 1024  # examples of a growth gradient; 0: the step's batch
    imp_rounds: int = 5  # prunings of iterative magnitude pruning
    rewind_fraction: float = 0.1  # part of a round whose weights it rewinds to

    shift: int = 1  # augmentation: random crop after padding by so many pixels
    flip: bool = False  # augmentation: mirror left and right
    cutout: int = 0  # augmentation: side of an erased square, in pixels
    jitter: float = 0.0  # augmentation: strength of colour jitter

    report_every: int = 100  # steps between two measurements
    workdir: str = dataclasses.field(default="", compare=False)  # run directory
    progress: bool = dataclasses.field(default=True, compare=False)  # live display


@dataclasses.dataclass(frozen=True)
class Splits:
    """What one seed trains on and is measured on.

    Attributes:
      train: the labels that training may use.
      judge: where the table's numbers come from: the official test set, or the
        validation part of the labels.
      monitor: training images outside of the budget, for the learning curves alone;
        None where there are none.
    """

    train: Data
    judge: Data
    monitor: Data | None


def run(config: Config) -> dict[str, Any]:
    """Runs what is not finished yet, and reports on all of it.

    Returns:
      The summary, as in summary.json.

    Raises:
      ValueError: something in the configuration cannot be done.
    """
    source = data.load(config.dataset, config.data_dir)
    first = draw_splits(config, source, seed=0)
    task = make_task(config, first.train, source.num_classes)
    choices = _choices(config, len(first.train.labels))
    methods = {name: make_method(name, task, choices) for name in config.methods}
    rehearse(task, first.train)
    out = records.open_run(config.workdir or _default_workdir(config), config)
    with _display(config) as progress:
        bar = progress.add_task("", total=config.seeds * len(methods))

        def note(text: str) -> None:
            progress.update(bar, description=text)

        for seed in range(config.seeds):
            splits = draw_splits(config, source, seed)
            for name, method in methods.items():
                unit = records.Unit(name, seed)
                if out.finished(unit) is None:
                    run_unit(out, unit, method, splits, note)
                progress.advance(bar)
    return report(config, task, out)


def draw_splits(config: Config, source: data.Source, seed: int) -> Splits:
    """The budget of a seed, which does not depend on the method."""
    labels = source.train.labels
    chosen = data.budget(labels, config.samples_per_class, seed)
    rest = np.setdiff1d(np.arange(len(labels)), chosen)
    rest = np.random.default_rng(seed).permutation(rest)[:MONITOR_SIZE]

    def pick(indices: np.ndarray, like: Data | None = None) -> Data:
        images = source.train.images[indices]
        return train.to_device(data.Split(images, labels[indices]), like)

    if config.validation_fraction:
        chosen, held_out = data.holdout(
            labels, chosen, config.validation_fraction, seed
        )
        training = pick(chosen)
        judge = pick(held_out, training)
    else:
        training = pick(chosen)
        judge = train.to_device(source.test, training)
    return Splits(training, judge, pick(rest, training) if len(rest) else None)


def make_task(config: Config, labelled: Data, num_classes: int) -> Task:
    """What every method is given.

    Raises:
      ValueError: a number is out of its range.
    """
    for name, least in _LEAST.items():
        if not getattr(config, name) >= least:
            raise ValueError(f"expected {name} >= {least}, got {getattr(config, name)}")
    if not config.methods:
        raise ValueError(f"expected methods of {', '.join(METHODS)}, got none")
    if not 0 <= config.label_smoothing <= 1:
        raise ValueError(
            f"expected label_smoothing in [0, 1], got {config.label_smoothing}"
        )
    check_sparsity(config.sparsity)
    size, stop = len(labelled.labels), refresh_stop(config.steps)
    interval = refresh_interval(size, config.batch_size, stop)
    model = models.make_model(config.model, num_classes, config.width)
    params, macs = shapes_and_macs(model, labelled.images.shape[1:])
    return Task(
        model=model,
        params=params,
        macs=macs,
        augment=data.make_augment(
            padding=config.shift,
            flip=config.flip,
            cutout=config.cutout,
            jitter=config.jitter,
        ),
        optimizer=lambda rate: train.make_optimizer(
            config.optimizer, rate, config.weight_decay, config.momentum
        ),
        learning_rate=config.learning_rate,
        smoothing=config.label_smoothing,
        sparsity=config.sparsity,
        steps=config.steps,
        batch_size=config.batch_size,
        growth_samples=config.growth_samples,
        interval=config.refresh_interval or interval,
        every=config.report_every,
    )


def rehearse(task: Task, labelled: Data) -> None:
    """Traces the loss of one example, so that nothing is written before it works.

    Raises:
      ValueError: the network or the augmentation does not fit the images.
    """
    loss = train.make_loss(task.model, task.augment, task.smoothing)

    def first_loss(labelled: Data) -> Any:
        example, key = train.take(labelled, jax.numpy.arange(1)), jax.random.key(0)
        return loss(*task.model.init(key, train.inputs(example)), example, key)

    jax.eval_shape(first_loss, labelled)


def run_unit(
    out: records.Run,
    unit: records.Unit,
    method: Method,
    splits: Splits,
    note: Callable[[str], None],
) -> None:
    """Trains one method with one seed and records what it learned and cost.

    Args:
      out: where to.
      unit: which method and seed.
      method: the method.
      splits: the data of the seed.
      note: called with what is going on.
    """
    out.start(unit)
    note(f"{unit.name}, compiling")
    overlaps: list[tuple[int, float]] = []

    def measure(step: int, state: TrainState, logs: dict[str, float]) -> None:
        if splits.monitor is not None:
            headline = _headline(method.predict(state, splits.monitor))
            logs["monitor_accuracy"] = _accuracy(headline, splits.monitor)
        if isinstance(state.params, dual.Dual):
            statistics = jax.device_get(_mask_statistics(dual.get_pair_masks(state)))
            logs |= statistics
            overlaps.append((step, statistics["overlap"]))
        out.log(unit, step, logs)
        note(f"{unit.name}, step {step}")

    begin = time.perf_counter()
    state = method.init(jax.random.key(unit.seed), splits.train)
    measure(0, state, {})
    state, training_macs = method.fit(state, splits.train, measure)
    seconds = time.perf_counter() - begin
    if unit == records.Unit("d2_sparse", 0):
        out.save_figure("masks", _picture(state, overlaps))
    costs = {"training_macs": training_macs, "seconds": seconds}
    out.finish(unit, _judge(method, state, splits) | costs)


def report(config: Config, task: Task, out: records.Run) -> dict[str, Any]:
    """Writes summary, table and figures of the finished units, and prints the table."""
    units: dict[str, Any] = {
        name: {
            seed: out.finished(records.Unit(name, seed)) for seed in range(config.seeds)
        }
        for name in config.methods
    }
    rows = [_summarise(name, units, task) for name in units]
    table = records.markdown_table([_cells(row) for row in rows], _columns(config))
    summary = {"config": dataclasses.asdict(config), "methods": rows}
    out.write_summary(summary)
    out.write_text("table.md", table + "\n")
    lines = records.read_metrics(out.workdir)
    key, label = "monitor_accuracy", "accuracy on training images outside the budget"
    if not any(key in line for line in lines):
        key, label = "train_accuracy", "accuracy on training batches"
    curves = plots.learning_curves(lines, key, label, percent=True)
    out.save_figure("learning_curves", curves)
    cost = plots.accuracy_against_cost(rows, f"{_judged(config)} accuracy")
    out.save_figure("accuracy_against_cost", cost)
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"\nEverything is in {out.workdir}")
    return summary


def _judge(method: Method, state: TrainState, splits: Splits) -> dict[str, float]:
    outputs = method.predict(state, splits.judge)
    stored, inference_macs = method.costs(state, splits.train)
    return {
        **train.evaluate(_headline(outputs), np.asarray(splits.judge.labels)),
        **{f"accuracy_{k}": _accuracy(v, splits.judge) for k, v in outputs.items()},
        "nonzeros": stored,
        "inference_macs": inference_macs,
    }


def _headline(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    return next(iter(outputs.values()))


def _summarise(name: str, units: Mapping[str, Any], task: Task) -> dict[str, Any]:
    own = units[name]
    mean = {
        key: float(np.mean([unit[key] for unit in own.values()]))
        for key in next(iter(own.values()))
    }
    accuracy = {seed: unit["accuracy"] for seed, unit in own.items()}
    dense = 3 * task.steps * sum(task.macs.values())
    row = {
        "method": name,
        "accuracy": mean["accuracy"],
        "standard_error": records.summarize(accuracy.values()).standard_error,
        "nll": mean["nll"],
        "ece": mean["ece"],
        "nonzeros": mean["nonzeros"],
        "relative_macs": mean["training_macs"] / dense,
        "inference_macs": mean["inference_macs"],
        "seconds": float(np.median([unit["seconds"] for unit in own.values()])),
        "outputs": {k: v for k, v in mean.items() if k.startswith("accuracy_")},
    }
    if "rigl" in units and name != "rigl":
        reference = {seed: unit["accuracy"] for seed, unit in units["rigl"].items()}
        difference = records.paired_difference(accuracy, reference)
        row["to_rigl"], row["to_rigl_error"] = difference[:2]
    return row


def _judged(config: Config) -> str:
    return "validation" if config.validation_fraction else "test"


def _columns(config: Config) -> dict[str, str]:
    return {
        "method": "method",
        "accuracy": f"{_judged(config)} accuracy %",
        "to_rigl": "minus RigL",
        "nll": "NLL",
        "ece": "ECE %",
        "nonzeros": "non-zeros",
        "relative_macs": "training MACs",
        "seconds": "seconds",
    }


def _cells(row: dict[str, Any]) -> dict[str, str]:
    def percent(value: float, error: float) -> str:
        mean = f"{100 * value:.2f}"
        return mean if np.isnan(error) else f"{mean} ± {100 * error:.2f}"

    cells = {
        "method": row["method"],
        "accuracy": percent(row["accuracy"], row["standard_error"]),
        "nll": f"{row['nll']:.3f}",
        "ece": f"{100 * row['ece']:.1f}",
        "nonzeros": f"{row['nonzeros']:,.0f}",
        "relative_macs": f"{row['relative_macs']:.2f}",
        "seconds": f"{row['seconds']:.1f}",
    }
    if "to_rigl" in row:
        cells["to_rigl"] = "+" * (row["to_rigl"] >= 0) + percent(
            row["to_rigl"], row["to_rigl_error"]
        )
    return cells


def _choices(config: Config, samples: int) -> Choices:
    epoch = data.steps_per_epoch(samples, config.batch_size)
    suited = "fast_slow" if config.mode == "consolidated" else "symmetric"
    return Choices(
        coupling=dual.Coupling(
            fast=config.coupling,
            slow=config.coupling,
            temperature=config.temperature,
            ramp=config.coupling_ramp,
            masks=config.mask_coupling,
            independent_views=config.independent_views,
        ),
        preset=suited if config.preset == "auto" else config.preset,
        mode=config.mode,
        horizon=config.horizon or max(config.steps / 6, epoch),
        imp_rounds=config.imp_rounds,
        rewind_fraction=config.rewind_fraction,
    )


def _default_workdir(config: Config) -> str:
    return f"runs/d2_sparse-{config.dataset}-{config.samples_per_class}"


def _display(config: Config) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        disable=not config.progress,
        transient=True,
    )


def _accuracy(probabilities: np.ndarray, examples: Data) -> float:
    return float(metrics.accuracy(jax.numpy.asarray(probabilities), examples.labels))


@jax.jit
def _mask_statistics(masks: dual.Dual) -> dict[str, jax.Array]:
    return {
        "overlap": metrics.mask_overlap(*masks),
        "chance_overlap": metrics.chance_overlap(*masks),
    }


def _picture(state: TrainState, overlaps: Sequence[tuple[int, float]]) -> Any:
    """The masks of the largest layer, and the overlap of all layers over time."""
    pair = dual.get_pair_masks(state)
    weights = tree.prunable_leaves(state.params.fast)
    largest = max(weights, key=lambda path: weights[path].size)
    fast, slow = (tree.flatten(masks)[largest] for masks in pair)
    width = fast.shape[-1]
    over_time = np.array(overlaps)
    return plots.mask_pair(
        fast.reshape(-1, width),
        slow.reshape(-1, width),
        over_time[:, 0],
        over_time[:, 1],
        float(metrics.chance_overlap(*pair)),
    )


if __name__ == "__main__":
    cli.main(run, Config)
