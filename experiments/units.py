"""How units are run: every method with every seed, each once, with a live display."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from d2sparse import data, metrics, records, train
from d2sparse.train import Data, TrainState
from experiments.singles import Method
from experiments.task import Splits, TaskConfig, draw_splits

Note = Callable[[str], None]
RunOne = Callable[[records.Unit, Splits, Note], None]
Statistics = Callable[[TrainState], Mapping[str, Any]]


class Judged(Protocol):
    """What can be asked of a trained state: `Method` and `Network` answer."""

    @property
    def predict(self) -> Callable[[TrainState, Data], dict[str, np.ndarray]]:
        """Probabilities by output, the headline first."""

    @property
    def costs(self) -> Callable[[TrainState, Data], tuple[int, float]]:
        """Numbers stored, and MACs of the headline at inference."""


def run_each(
    config: TaskConfig,
    out: records.Run,
    source: data.Source,
    names: Iterable[str],
    run_one: RunOne,
) -> None:
    """Runs what is not finished yet, seed by seed.

    Args:
      config: how many seeds, and what each learns from.
      out: where finished units are found.
      source: the data set.
      names: of the methods.
      run_one: trains and records one unit; its last argument is called with what is
        going on.
    """
    names = list(names)
    with _display(config) as progress:
        bar = progress.add_task("", total=config.seeds * len(names))

        def note(text: str) -> None:
            progress.update(bar, description=text)

        for seed in range(config.seeds):
            splits = draw_splits(config, source, seed)
            for name in names:
                unit = records.Unit(name, seed)
                if out.finished(unit) is None:
                    run_one(unit, splits, note)
                progress.advance(bar)


def learn(
    out: records.Run,
    unit: records.Unit,
    method: Method,
    splits: Splits,
    note: Note,
    statistics: Statistics = lambda state: {},
) -> tuple[TrainState, dict[str, float]]:
    """Trains one method with one seed, measuring on the way.

    Args:
      out: where measurements are recorded.
      unit: which method and seed.
      method: the method.
      splits: the data of the seed.
      note: called with what is going on.
      statistics: further measurements of a state.

    Returns:
      The trained state, and the results of the unit.
    """
    out.start(unit)
    note(f"{unit.name}, compiling")
    measure = make_measure(out, unit, method, splits, note, statistics)
    begin = time.perf_counter()
    state = method.init(jax.random.key(unit.seed), splits.train)
    measure(0, state, {})
    state, training_macs = method.fit(state, splits.train, measure)
    seconds = time.perf_counter() - begin
    costs = {"training_macs": training_macs, "seconds": seconds}
    return state, judge(method, state, splits) | costs


def make_measure(
    out: records.Run,
    unit: records.Unit,
    method: Judged,
    splits: Splits,
    note: Note,
    statistics: Statistics = lambda state: {},
) -> train.Report:
    """What records a state in training, with its accuracy outside of the budget."""

    def measure(step: int, state: TrainState, logs: dict[str, float]) -> None:
        if splits.monitor is not None:
            headline = _headline(method.predict(state, splits.monitor))
            logs["monitor_accuracy"] = accuracy(headline, splits.monitor)
        out.log(unit, step, logs | dict(statistics(state)))
        note(f"{unit.name}, step {step}")

    return measure


def judge(method: Judged, state: TrainState, splits: Splits) -> dict[str, float]:
    """What the table says of a trained state: its quality, its size, its cost."""
    outputs = method.predict(state, splits.judge)
    stored, inference_macs = method.costs(state, splits.train)
    return {
        **train.evaluate(_headline(outputs), np.asarray(splits.judge.labels)),
        **{f"accuracy_{k}": accuracy(v, splits.judge) for k, v in outputs.items()},
        "nonzeros": stored,
        "inference_macs": inference_macs,
    }


def accuracy(probabilities: np.ndarray, examples: Data) -> float:
    """Fraction of examples whose label has the largest probability."""
    return float(metrics.accuracy(jnp.asarray(probabilities), examples.labels))


def _headline(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    return next(iter(outputs.values()))


def _display(config: TaskConfig) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        disable=not config.progress,
        transient=True,
    )
