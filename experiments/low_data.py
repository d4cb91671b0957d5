"""What should one train with 10 to 500 labels per class and a budget of non-zeros?

Dense networks (also shorter, narrower, smoothed, averaged, sharpness-aware and born
again), pruning before, in and after training, sparse training, and pairs of sparse
networks with one network's weights between them. All methods of a seed see the same
labels. One table for every budget: mean and standard error on the test set, paired
differences to RigL, iterative pruning and the dense network, calibration, stored
numbers and costs; a second one for corrupted images, wrong labels and long tails.

With --tune every method gets as many trials on a validation part of the labels; later
runs in the same directory use what won, and read the test set once. Any cell can be run
alone, by --methods, --budgets and --seeds, and joins the tables of its directory.

    python -m experiments.low_data
    python -m experiments.low_data --workdir=RUN --tune --budgets=10,50
    python -m experiments.low_data --workdir=RUN --budgets=10,50 --label_noises=0.2,0.4
    python -m experiments.low_data --workdir=RUN --methods=rigl --budgets=50 --seeds=10
"""

import dataclasses
from typing import Any

from d2sparse import data, records
from d2sparse.train import TrainState
from experiments import cli, results, units
from experiments.few_labels import tuning
from experiments.few_labels.cells import Cell, list_settings
from experiments.few_labels.judging import look_closer
from experiments.few_labels.options import LowDataOptions, check_low_data
from experiments.few_labels.plans import Plan, Planner, check_recorded, run_plans
from experiments.few_labels.report import report
from experiments.task import default_workdir


@dataclasses.dataclass(frozen=True)
class Config(LowDataOptions):
    """Flags of the experiment."""


def run(config: Config) -> dict[str, Any]:
    """Tunes, or runs what is not finished yet and reports on all of the directory.

    Returns:
      The summary, as in summary.json; of a tuning, the chosen values.

    Raises:
      ValueError: something in the configuration cannot be done.
    """
    check_low_data(config)
    source = data.load(config.dataset, config.data_dir)
    workdir = config.workdir or default_workdir("low_data", config)
    if config.tune:
        return tuning.tune(config, source, workdir)
    tuned, planned = tuning.read_tuned(workdir, config.tuned), []
    for setting in list_settings(config):
        planner = Planner(config, source, setting)
        cells = [Cell(method, setting) for method in config.methods]
        plans = {
            cell: planner.plan(cell.name, cell.method, tuning.values_of(tuned, cell))
            for cell in cells
        }
        planned.append((planner, plans))
    out = records.open_run(workdir, config, results.Finished)

    def conclude(job: units.Job, state: TrainState, plan: Plan) -> dict[str, Any]:
        found = look_closer(plan.variant.method, state, job.splits, config)
        return found | {"values": dict(plan.values)}

    for _, plans in planned:
        check_recorded(out, plans)
    with units.reporting(out, lambda: report(config, source, out)) as reported:
        for planner, plans in planned:
            named = {cell.name: plan for cell, plan in plans.items()}
            run_plans(planner.config, out, source, named, conclude)
    return reported()


if __name__ == "__main__":
    cli.main(run, Config)
