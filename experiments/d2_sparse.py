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
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from d2sparse import data, dual, metrics, plots, records, tree
from d2sparse.train import TrainState
from experiments import cli, results, units
from experiments.methods import METHODS, SINGLES, MethodName, make_method
from experiments.pairs import PairOptions, make_choices, pair_effects
from experiments.singles import Method
from experiments.splits import draw_splits
from experiments.task import (
    Task,
    TaskConfig,
    check_effects,
    check_of,
    default_workdir,
    make_prunable,
    make_task,
)
from experiments.variants import Variant, variants

_SPARSE = tuple(name for name in METHODS if name not in ("dense", "dense_mutual"))
_PAIRS, _COUPLED = ("uncoupled_pair", "d2_sparse"), ("dense_mutual", "d2_sparse")
_USERS = {  # The methods that go by a flag.
    **dict.fromkeys(("sparsity", "prunable"), _SPARSE),
    **dict.fromkeys(
        ("distribution", "layer_sparsities", "pattern", "group"),
        ("static", "rigl", *_PAIRS),
    ),
    **dict.fromkeys(("imp_rounds", "rewind_fraction"), ("imp",)),
    **dict.fromkeys(("preset", "pair_rule"), _PAIRS),
    **dict.fromkeys(("mode", "horizon", "mask_coupling"), ("d2_sparse",)),
    **dict.fromkeys(
        ("coupling", "couplings", "temperature", "coupling_ramp"), _COUPLED
    ),
    **dict.fromkeys(("weighted_coupling", "trust_threshold"), _COUPLED),
    "independent_views": _COUPLED,
}
_COLUMNS = {
    "method": "method",
    "accuracy": "accuracy %",
    "to_rigl": "minus RigL",
    "nll": "NLL",
    "ece": "ECE %",
    "nonzeros": "non-zeros",
    "relative_macs": "training MACs",
    "seconds": "seconds",
}


@dataclasses.dataclass(frozen=True)
class Config(PairOptions, TaskConfig):
    """Flags of the experiment."""

    methods: tuple[MethodName, ...] = METHODS  # what to compare
    sparsity: float = 0.8  # zeros among the prunable weights; a pair shares the rest

    couplings: tuple[float, ...] = ()  # weights to compare; none: that of --coupling
    # Learning rates to run everything with; none: the one of --learning_rate.
    learning_rates: tuple[float, ...] = ()

    imp_rounds: int = 5  # prunings of iterative magnitude pruning
    rewind_fraction: float = 0.1  # part of a round whose weights it rewinds to


def run(config: Config) -> dict[str, Any]:
    """Runs what is not finished yet, and reports on all of it.

    Returns:
      The summary, as in summary.json.

    Raises:
      ValueError: something in the configuration cannot be done.
    """
    if not config.methods:
        raise ValueError(f"expected methods of {', '.join(METHODS)}, got none")
    if config.ticket and (pairs := set(config.methods) - set(SINGLES)):
        raise ValueError(
            "expected methods of one network to start from a ticket, got "
            f"{', '.join(sorted(pairs))}; choose --methods of {', '.join(SINGLES)}"
        )
    source = data.load(config.dataset, config.data_dir)
    first = draw_splits(config, source, seed=0)
    task = make_task(config, first.train, source.num_classes, config.sparsity)
    task = task._replace(prunable=make_prunable(config.prunable, task))
    choices = make_choices(config, config, len(first.train.labels))
    methods: dict[str, Method] = {
        name: make_method(
            name, task, choices, config.imp_rounds, config.rewind_fraction
        )
        for name in config.methods
    }
    check_of(config, config.methods, _USERS)
    check_effects(config, list_effects(config))
    lists = {"coupling": config.couplings, "learning_rate": config.learning_rates}
    plans = variants(methods, lists)
    workdir = config.workdir or default_workdir("d2_sparse", config)
    out = records.open_run(workdir, config, results.Finished)

    def conclude(job: units.Job, state: TrainState) -> dict[str, Any]:
        unit = job.unit
        if unit.seed == 0 and plans[unit.method].base == "d2_sparse":
            lines = records.read_metrics(out.workdir)
            own = [line for line in lines if line["unit"] == unit.name]
            overlaps = [(line["step"], line["overlap"]) for line in own]
            name = unit.method.replace("d2_sparse", "masks", 1)
            out.save_figure(name, _picture(state, overlaps))
        return {}

    def learn(jobs: Sequence[units.Job]) -> None:
        units.learn(config, out, plans, conclude, jobs, _mask_statistics)

    def program(name: str) -> int:
        return id(plans[name].method)

    with units.reporting(out, lambda: report(config, task, plans, out)) as reported:
        units.run_each(config, out, source, plans, learn, program)
    return reported()


def list_effects(config: Config) -> dict[str, tuple[object, str]]:
    """Flags whose effect others take away, see `task.check_effects`."""
    rates, weights = config.learning_rates, config.couplings
    return pair_effects(config) | {
        "learning_rate": (not rates, f"since learning_rates are {rates}"),
        "coupling": (not weights, f"since couplings are {weights}"),
    }


def report(
    config: Config, task: Task, plans: Mapping[str, Variant], out: records.Run
) -> dict[str, Any]:
    """Writes summary, table and figures of the finished units, and prints the table."""
    finished = {name: results.gather(out, name, config.seeds) for name in plans}
    rows = [results.summarise(name, own, task) for name, own in finished.items()]
    for row in rows:
        rigl = _rigl_beside(plans[row["method"]], plans)
        if rigl in finished:
            own = finished[row["method"]]
            row |= results.difference("to_rigl", own, finished[rigl])
    summary = results.publish(config, out, "methods", rows, _COLUMNS)
    lines = records.read_metrics(out.workdir)
    curves = plots.learning_curves(lines, *results.curve_key(lines), percent=True)
    out.save_figure("learning_curves", curves)
    measured = results.measured(rows)
    cost = plots.accuracy_against_cost(measured, f"{results.judged(config)} accuracy")
    out.save_figure("accuracy_against_cost", cost)
    return summary


def _rigl_beside(own: Variant, plans: Mapping[str, Variant]) -> str | None:
    """RigL at the same learning rate, by name; None for RigL itself."""
    rate = own.settings.get("learning_rate")
    for other in plans.values():
        same = other.settings.get("learning_rate") == rate
        if other.base == "rigl" and same and own.base != "rigl":
            return other.name
    return None


def _mask_statistics(state: TrainState) -> dict[str, Any]:
    if not isinstance(state.params, dual.Dual):
        return {}
    return dict(jax.device_get(_overlaps(dual.get_pair_masks(state))))


@jax.jit
def _overlaps(masks: dual.Dual) -> dict[str, jax.Array]:
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
