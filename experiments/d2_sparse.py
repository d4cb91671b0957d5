"""Do two coupled sparse networks learn more from few labels than one?

D2-Sparse (this project's reconstruction, see `d2sparse.dual`) beside the baselines that
matter, at equal stored non-zeros: a static random mask, RigL, iterative magnitude
pruning with rewinding, and an uncoupled pair; and, at their own cost, a dense network
and a dense pair that teaches itself. The difference to RigL is paired, since all
methods of a seed see the same labels.

    python -m experiments.d2_sparse
    python -m experiments.d2_sparse --dataset=mnist --data_dir=../shared/tfds
    python -m experiments.d2_sparse --dataset=cifar10 --model=resnet8s --shift=4 --flip
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from d2sparse import metrics, plots, records, study, tree
from d2sparse.constraints import pair_masks
from d2sparse.study import cli


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """What is compared."""

    # What to compare, all but RigL with its difference to RigL.
    methods: tuple[study.MethodName, ...] = (
        *("dense", "static", "rigl", "imp"),
        *("uncoupled_pair", "dense_mutual", "d2_sparse"),
    )


def run(config: Config) -> pd.DataFrame:
    """Trains what has not finished yet, and reports on all of it: a row a run."""
    experiment = study.Experiment("d2_sparse", ("rigl",), examine=draw_masks)
    return study.compare(config, experiment)


def draw_masks(end: study.End) -> Mapping[str, Any]:
    """A figure of the first D2-Sparse pair: its masks, and their overlap over time."""
    if end.seed == 0 and end.plan.row.method == "d2_sparse":
        masks = pair_masks(end.state)
        lines = records.read_metrics(end.out.workdir)
        unit = records.Unit(end.plan.row.name, end.seed)
        own = [line for line in lines if line["unit"] == unit.name]
        weights = tree.prunable_leaves(end.state.params.fast)
        largest = max(weights, key=lambda path: weights[path].size)
        fast, slow = (tree.flatten(mask)[largest] for mask in masks)
        width = fast.shape[-1]
        figure = plots.mask_pair(
            fast.reshape(-1, width),
            slow.reshape(-1, width),
            np.array([line["step"] for line in own]),
            np.array([line["overlap"] for line in own]),
            float(metrics.chance_overlap(*masks)),
        )
        end.out.save_figure(end.plan.row.name.replace("d2_sparse", "masks", 1), figure)
    return {}


if __name__ == "__main__":
    cli.main(run, Config)
