"""Data arrive in pieces: who predicts well at any time, and how small may it get?

A network learns from a stream of megabatches, and is pruned when they arrive (anytime
progressive pruning, APP), once before the first (one_shot), within the stages (gradual,
rigl), or never (dense). After every megabatch it is tested; the tables have the mean
error over the stream, the last accuracy, and paired differences. `random_matched`
deletes random weights down to the densities of `app_2022`.

The code released with APP (arXiv 2204.01640) does something else than the method:
masks after the first are computed for random weights, dead weights compete for places
and then stay dead, and the score looks at the first examples that ever came. What is
called "a third of the size" has some 2 % of its weights. Here `app` is the method as it
is described, and `app_2022` the released behaviour; `--compat=app-2022` also takes the
data in their own order, without its augmented validation and literal learning rate.

    python -m experiments.anytime
    python -m experiments.anytime --dataset=mnist --samples_per_class=200 --epochs=15
    python -m experiments.anytime --methods=dense,app --tau=2,4.5
    python -m experiments.anytime --dataset=cifar10 --model=resnet20s --shift=4 --flip
"""

import dataclasses
from typing import Any, Literal

import pandas as pd

from d2sparse import data, study
from d2sparse.constraints import STREAM_METHODS, StreamOptions, stream_steps
from d2sparse.data import Source
from d2sparse.study import cli, stream_report, streams

_Name = Literal[*STREAM_METHODS]
_NO_MEANING = {
    "ticket": "a stream begins with a new network",
    "sparsity": "--tau says how many weights are left",
    "growth_samples": "other examples than those of the step may be the future's",
}


@dataclasses.dataclass(frozen=True)
class Config(StreamOptions, study.Config):
    """What is compared."""

    HIDDEN = (*_NO_MEANING, *study.unread_options(streams.WITHIN))

    # What to compare. app_magnitude is app with that criterion, app_2022 is APP as its
    # released code does it.
    methods: tuple[_Name, ...] = ("dense", "one_shot", "app", "app_2022")
    samples_per_class: int = 0  # training labels of every class; 0 for all
    learning_rate: float = 0.05  # at the first step of every stage
    growth_samples: int = 0  # growth gradients are those of the step

    def __post_init__(self) -> None:
        """Refuses values out of their ranges, and options without an effect."""
        StreamOptions.__post_init__(self)
        study.Config.__post_init__(self)

    def count_steps(self, labels: Any) -> int:
        """Optimiser steps of all stages together."""
        return stream_steps(streams.stream_options(self), labels, self.batch_size)


def run(config: Config, source: Source | None = None) -> pd.DataFrame:
    """Trains what has not finished yet, and reports on all of it: a row a run."""
    _check(config)
    source = source or data.load(config.dataset, config.data_dir)
    draw_splits = study.make_draw_splits(source)
    sizes = source.num_classes, len(draw_splits(config, 0).judge.labels)
    experiment = study.Experiment(
        "anytime",
        tuple(name for name in ("dense", "one_shot") if name in config.methods),
        streams.stream_methods(draw_splits),
        examine=streams.stage_results,
        settings=streams.stream_settings,
        report=lambda comparison: stream_report.report(comparison, *sizes),
    )
    return study.compare(config, experiment, source)


def _check(config: Config) -> None:
    """Refuses what has no meaning on a stream, and methods in another order."""
    study.refuse(config, _NO_MEANING)
    if "averaged" in config.with_:
        raise ValueError(
            "expected no --with=averaged, since the best epoch of every stage is kept "
            "instead; leave it away"
        )
    first, found, _ = ",".join(config.methods).partition("random_matched")
    if found and "app_2022" not in first.split(","):
        raise ValueError(
            "expected app_2022 among the methods before random_matched, which takes "
            f"its densities, got {', '.join(config.methods)}"
        )


if __name__ == "__main__":
    cli.main(run, Config)
