"""What should one train with 10 to 500 labels per class and a budget of non-zeros?

Dense networks (also shorter, narrower, smoothed, averaged, sharpness-aware and born
again), pruning before, in and after training, sparse training, and pairs of sparse
networks with one network's weights between them. Tables for every number of labels:
accuracy, calibration and costs; paired differences to four methods; corrupted images,
wrong labels and long tails; and images outside of both sets, to choose designs by.

With --tune every method gets the same number of trials on a validation part of the
labels; later runs in the same directory use the values that won. Any method, number of
labels, noise and seed can be run alone, and joins the tables of its directory.

    python -m experiments.low_data
    python -m experiments.low_data --workdir=RUN --tune
    python -m experiments.low_data --workdir=RUN --label_noise=0,0.2,0.4
    python -m experiments.low_data --workdir=RUN --methods=rigl --seeds=10
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from d2sparse import data, study
from d2sparse.constraints import METHODS, Method
from d2sparse.data import Source
from d2sparse.study import cli, labels, robustness, tuned, tuning

LEARNED = (
    *("dense", "dense_short", "dense_narrow", "dense_smoothed", "dense_averaged"),
    *("dense_sharp", "self_distilled", "one_shot", "snip", "grasp", "synflow"),
    *("static", "set", "rigl", "rigl_averaged", "rigl_half", "granet", "imp"),
    *("imp_capped", "dense_mutual", "uncoupled_annealed", "uncoupled_averaged"),
    *("free_tickets", "d2_sparse", "d2_annealed", "d2_views", "d2_confident"),
    *("d2_sharp", "d2_consolidated", "d2_distilled", "d2_merged"),
    *("d2_averaged_views", "d2_averaged_sharp", "d2_averaged_distilled"),
)


def _axes() -> dict[str, tuple[Any, ...]]:
    return {"samples_per_class": (10, 50), "label_noise": (0.0,), "imbalance": (1.0,)}


@dataclasses.dataclass(frozen=True)
class Config(tuning.Tunable):
    """What is compared.

    Flags that are not compared choose cells: the same directory takes them all.
    """

    methods: tuple[study.MethodName, ...] = study.aside(LEARNED)  # what to compare
    # Training labels of every class, with tables for each number; 0 for all.
    samples_per_class: int = study.aside(10)
    # Part of the training labels that are wrong; 0 in the tables of quality.
    label_noise: float = study.aside(0.0)
    # Long tail: how many times more labels the largest class has, which has those of
    # --samples_per_class, than the smallest; 1 in the tables of quality.
    imbalance: float = study.aside(1.0)
    seeds: int = study.aside(5)  # runs of every cell: labels, weights and order differ
    # From 1, slight, to 5: of the corruptions of the test images.
    severities: tuple[int, ...] = (3,)
    axes: Mapping[str, tuple[Any, ...]] = dataclasses.field(
        default_factory=_axes, compare=False
    )

    def __post_init__(self) -> None:
        """Refuses severities and axes that there are no tables for."""
        super().__post_init__()
        for severity in self.severities:
            if severity not in range(1, 6):
                raise ValueError(f"expected severities from 1 to 5, got {severity}")
        for name in self.axes.keys() - {*robustness.SETTINGS, "trial"}:
            raise ValueError(
                f"expected axes of {', '.join(robustness.SETTINGS)}, got {name}; give "
                "each value of it a --workdir"
            )


def run(
    config: Config,
    source: Source | None = None,
    methods: Mapping[str, Method] = METHODS,
) -> Any:
    """Tunes and returns the chosen values, or compares and returns a row a run."""
    source = source or data.load(config.dataset, config.data_dir)
    experiment = study.Experiment(
        "low_data",
        ("rigl", "imp", "dense", "uncoupled_averaged"),
        methods=methods,
        examine=lambda end: robustness.examine(end, config.severities),
        report=labels.report,
    )
    if config.tune:
        return tuning.tune(config, experiment, source)
    config = study.as_axes(study.identified(config, source), robustness.SETTINGS)
    workdir = config.workdir or study.default_workdir(experiment.name, config)
    values = tuned.read_tuned(workdir, config.tuned, methods)
    return study.compare(config, tuned.with_tuned(experiment, values), source)


if __name__ == "__main__":
    cli.main(run, Config)
