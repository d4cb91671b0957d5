"""Which weights can a network do without, and when should they go?

Any rule of the library, on any model and data set, over several sparsities and seeds.
All methods of a seed see the same labels, initial weights and batches. The table says
mean and standard deviation over seeds, and the paired difference to the dense network
with its standard error; figures show accuracy against sparsity, and how it was learned.

    python -m experiments.prune
    python -m experiments.prune --rules=rigl --sparsities=0.98 --seeds=1
    python -m experiments.prune --rules=dense,sr_ste --sparsities=0.5,0.75 --group=4
    python -m experiments.prune --dataset=cifar10 --model=resnet20s --shift=4 --flip
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from d2sparse import data, plots, records, tree
from d2sparse.distributions import check_sparsity
from d2sparse.lottery import Ticket
from d2sparse.train import TrainState
from experiments import cli, recipes, results, units
from experiments.recipes import LEARNED_SPARSITY, RECIPES, Options, RecipeName
from experiments.singles import Method
from experiments.splits import draw_splits
from experiments.task import (
    Task,
    TaskConfig,
    check_effects,
    check_least,
    check_of,
    default_workdir,
    make_prunable,
    make_task,
)
from experiments.variants import exact

_COLUMNS = {
    "method": "rule",
    "sparsity": "sparsity %",
    "accuracy": "accuracy %",
    "to_dense": "minus dense",
    "nll": "NLL",
    "ece": "ECE %",
    "nonzeros": "non-zeros",
    "relative_macs": "training MACs",
    "seconds": "seconds",
}
_PRUNED = tuple(name for name in RECIPES if name not in ("dense", "fixed"))
_USERS = {  # The rules that go by a flag.
    "sparsities": tuple(name for name in _PRUNED if name not in LEARNED_SPARSITY),
    **dict.fromkeys(("distribution", "layer_sparsities", "pattern"), _PRUNED),
    "score": ("one_shot", "gradual"),
    "drop_fraction": ("set", "rigl", "sparse_momentum", "granet"),
    "prune_at": ("one_shot", "powerprop", "wanda"),
    "start_sparsity": ("granet",),
    "backward_density": ("top_kast",),
    "score_samples": ("snip", "grasp", "fisher", "wanda"),
    "power": ("powerprop",),
    "threshold_decay": ("str",),
}
_ANEW = {"dense", "static", "str"}  # They do not go on from a ticket.


@dataclasses.dataclass(frozen=True)
class Config(Options, TaskConfig):
    """Flags of the experiment."""

    # What to compare; fixed keeps the masks it starts with, those of a --ticket.
    rules: tuple[RecipeName, ...] = ("dense", "static", "gradual", "set", "rigl")
    # Fractions of zeros among the prunable weights; every rule is run at each of them.
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
    # Learning rates to run everything with; none: the one of --learning_rate.
    learning_rates: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Point:
    """One rule at one sparsity.

    Attributes:
      rule: its name.
      sparsity: fraction of zeros asked for; None for what has none to choose.
      learning_rate: where several are compared.
    """

    rule: str
    sparsity: float | None
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        """The name of its units, such as "rigl-0.9"."""
        sparsity = "" if self.sparsity is None else f"-{exact(self.sparsity)}"
        rate = "" if self.learning_rate is None else f"-lr{exact(self.learning_rate)}"
        return f"{self.rule}{sparsity}{rate}"

    @property
    def label(self) -> str:
        """The rule, and its learning rate where several are compared."""
        rate = self.learning_rate
        return self.rule if rate is None else f"{self.rule}, lr {exact(rate)}"

    @property
    def settings(self) -> dict[str, float]:
        """What tells its runs from others of the rule's program."""
        given = {"sparsity": self.sparsity, "learning_rate": self.learning_rate}
        return {name: value for name, value in given.items() if value is not None}


def run(config: Config) -> dict[str, Any]:
    """Runs what is not finished yet, and reports on all of it.

    Returns:
      The summary, as in summary.json.

    Raises:
      ValueError: something in the configuration cannot be done.
    """
    points = list_points(config)
    source = data.load(config.dataset, config.data_dir)
    first = draw_splits(config, source, seed=0)
    task = make_task(config, first.train, source.num_classes, 0.0)
    task = task._replace(prunable=make_prunable(config.prunable, task))
    plans = make_plans(points, task, config)
    check_of(config, config.rules, _USERS)
    check_effects(config, list_effects(config))
    workdir = config.workdir or default_workdir("prune", config)
    out = records.open_run(workdir, config, results.Finished)

    def conclude(job: units.Job, state: TrainState) -> dict[str, float]:
        live = plans[job.unit.method].method.live(state)
        return {"sparsity": results.sparsity(live, task)}

    def learn(jobs: Sequence[units.Job]) -> None:
        units.learn(config, out, plans, conclude, jobs)

    def program(name: str) -> int:
        return id(plans[name].method)

    with units.reporting(out, lambda: report(config, task, points, out)) as reported:
        units.run_each(config, out, source, plans, learn, program)
    return reported()


def list_effects(config: Config) -> dict[str, tuple[object, str]]:
    """Flags whose effect others take away, see `task.check_effects`."""
    grouped = config.pattern in ("n_of_m", "blocks") or "sr_ste" in config.rules
    rates = config.learning_rates
    return {
        "group": (
            grouped,
            "which is for the patterns n_of_m and blocks and for sr_ste",
        ),
        "learning_rate": (not rates, f"since learning_rates are {rates}"),
    }


def list_points(config: Config) -> list[Point]:
    """Every rule at every sparsity; once what has no sparsity to choose.

    Raises:
      ValueError: there is none, or a rule cannot go on from the ticket.
    """
    if not config.rules or not config.sparsities:
        raise ValueError(
            f"expected rules of {', '.join(RECIPES)} and sparsities, got "
            f"rules={config.rules} and sparsities={config.sparsities}"
        )
    if "fixed" in config.rules and not config.ticket:
        raise ValueError(
            "expected a --ticket whose masks fixed can keep, got none; `python -m "
            "experiments.lottery` saves tickets"
        )
    if config.ticket and (anew := _ANEW & set(config.rules)):
        raise ValueError(
            f"expected rules that go on from a ticket, got {', '.join(sorted(anew))}; "
            "choose --rules=fixed to keep its masks"
        )
    points = []
    for rule in dict.fromkeys(config.rules):
        # These move the weights of a ticket, as many as it has.
        moves = config.ticket and rule in ("set", "rigl", "sparse_momentum")
        free = moves or rule in ("dense", "fixed", *LEARNED_SPARSITY)
        sparsities = [None] if free else sorted(set(config.sparsities))
        rates = sorted(set(config.learning_rates)) or [None]
        points += [Point(rule, s, rate) for s in sparsities for rate in rates]
    return points


def make_plans(
    points: list[Point], task: Task, config: Config
) -> dict[str, units.Variant]:
    """The methods of all points; those of one rule share its program where they can.

    Raises:
      ValueError: an option is out of its range.
    """
    plans: dict[str, units.Variant] = {}
    by_rule: dict[tuple[str, float | None], Method] = {}
    for point in points:
        check_least(point, {"learning_rate": 0} if point.learning_rate else {})
        shared = by_rule.get((point.rule, None)) or by_rule.get(
            (point.rule, point.sparsity)
        )
        method = make_method(point, task, config)
        takes_any = "sparsity" in method.free
        by_rule.setdefault((point.rule, None if takes_any else point.sparsity), method)
        own = {k: v for k, v in point.settings.items() if k in method.free}
        plans[point.name] = units.Variant(point.name, point.rule, shared or method, own)
    return plans


def make_method(point: Point, task: Task, config: Config) -> Method:
    """The training of one rule at one sparsity.

    Raises:
      ValueError: an option is out of its range.
    """
    check_sparsity(point.sparsity or 0.0)
    prunable = make_prunable(config.prunable, task)
    task = task._replace(sparsity=point.sparsity or 0.0, prunable=prunable)
    if task.ticket is not None and point.sparsity is not None:
        _check_sparser(point.sparsity, task.ticket, task)
    return recipes.make_method(point.rule, task, config)


def _check_sparser(sparsity: float, ticket: Ticket, task: Task) -> None:
    begin = results.sparsity(ticket.masks, task)
    size = tree.size(tree.prunable_leaves(task.params, task.prunable))
    if round((1 - sparsity) * size) > round((1 - begin) * size):
        raise ValueError(
            f"expected --sparsities of at least that of the ticket, {begin:.4g}, got "
            f"{sparsity:g}; what it has pruned does not come back"
        )


def report(
    config: Config, task: Task, points: list[Point], out: records.Run
) -> dict[str, Any]:
    """Writes summary, table and figures of the finished units, and prints the table."""
    finished = {p.name: results.gather(out, p.name, config.seeds) for p in points}
    rows = []
    for point in points:
        own = finished[point.name]
        row = results.summarise(point.label, own, task) | {"asked": point.sparsity}
        dense = Point("dense", None, point.learning_rate).name
        if dense in finished and point.rule != "dense":
            row |= results.difference("to_dense", own, finished[dense])
        rows.append(row)
    columns = dict(_COLUMNS)
    if "dense" not in config.rules:
        del columns["to_dense"]
    summary = results.publish(config, out, "points", rows, columns, "deviation")
    _draw_curves(points, out)
    _draw_sparsities(config, rows, out)
    return summary


def _draw_curves(points: list[Point], out: records.Run) -> None:
    """One figure for every sparsity: all curves in one are too many to tell apart."""
    lines = records.read_metrics(out.workdir)
    key, by_name = results.curve_key(lines), {point.name: point for point in points}
    for sparsity in sorted({p.sparsity for p in points} - {None}) or [None]:
        own = [
            line | {"method": point.label}
            for line in lines
            if (point := by_name[line["method"]]).sparsity in (None, sparsity)
        ]
        curves = plots.learning_curves(own, *key, percent=True)
        end = "" if sparsity is None else f"-{exact(sparsity)}"
        out.save_figure(f"learning_curves{end}", curves)


def _draw_sparsities(
    config: Config, rows: list[dict[str, Any]], out: records.Run
) -> None:
    label = f"{results.judged(config)} accuracy"
    rows = results.with_weights(results.measured(rows))
    of_dense = [row["method"].startswith("dense") for row in rows]
    sparse = [row for row, is_dense in zip(rows, of_dense, strict=True) if not is_dense]
    dense = next(itertools.compress(rows, of_dense), None)
    if sparse:
        figure = plots.accuracy_against_sparsity(sparse, label, dense)
        out.save_figure("accuracy_against_sparsity", figure)


if __name__ == "__main__":
    cli.main(run, Config)
