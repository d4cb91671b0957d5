"""From cells and chosen values to methods that can be trained, and their training."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from d2sparse import data, records
from d2sparse.train import Data, TrainState
from experiments import units
from experiments.few_labels.cells import Cell, Setting
from experiments.few_labels.contenders import CONTENDERS, Base
from experiments.few_labels.options import LowDataOptions
from experiments.singles import Method
from experiments.splits import draw_splits
from experiments.task import Task, make_prunable, make_task
from experiments.variants import Variant

Values = Mapping[str, Any]  # Of flags, by their names.
_FREE = ("learning_rate", "weight_decay")  # They need no program of their own.


class Plan(NamedTuple):
    """How the units of a name are trained.

    Attributes:
      config: their flags.
      variant: their method and its settings.
      values: the flags that were chosen for them, as they are recorded.
    """

    config: LowDataOptions
    variant: Variant
    values: Values


class Planner:
    """Makes plans in one setting; those that can share a program do.

    Attributes:
      config: the flags in this setting.
      base: what they make.
    """

    def __init__(
        self, config: LowDataOptions, source: data.Source, setting: Setting
    ) -> None:
        """Draws the labels of the first seed, for the sizes of things.

        Args:
          config: the flags.
          source: the data set.
          setting: what is learned from.

        Raises:
          ValueError: a flag is out of its range.
        """
        self._given = config
        self.config = dataclasses.replace(config, **setting.fields)
        self._first = draw_splits(self.config, source, seed=0).train
        classes = source.num_classes
        task = _make_task(self.config, self._first, classes)
        self.base = Base(task, len(self._first.labels), classes)
        self._made = functools.cache(self._make)

    def plan(self, name: str, method: str, values: Values) -> Plan:
        """The plan of units.

        Args:
          name: of the units.
          method: one of `CONTENDERS`.
          values: flags in which they differ from the method as it is.

        Raises:
          ValueError: the method is unknown, or a flag does not fit it.
        """
        if method not in CONTENDERS:
            raise ValueError(
                f"expected a method of {', '.join(CONTENDERS)}, got {method!r}"
            )
        fixed = {k: v for k, v in values.items() if k not in _FREE}
        config, made = self._made(method, tuple(sorted(fixed.items())))
        free = {k: values.get(k, getattr(config, k)) for k in _FREE}
        config = dataclasses.replace(config, **free)
        tried = CONTENDERS[method].own(self.config)
        recorded = {k: getattr(config, k) for k in sorted({*free, *tried, *values})}
        return Plan(config, Variant(name, method, made, free), recorded)

    def _make(
        self, method: str, fixed: tuple[tuple[str, Any], ...]
    ) -> tuple[LowDataOptions, Method]:
        contender = CONTENDERS[method]
        own = {**contender.change(self._given, self.base), **dict(fixed)}
        config = dataclasses.replace(self.config, **own)
        size, classes = self.base.samples, self.base.classes
        task = _make_task(config, self._first, classes)
        return config, contender.make(task, config, size)


def _make_task(config: LowDataOptions, labelled: Data, num_classes: int) -> Task:
    task = make_task(config, labelled, num_classes, config.sparsity)
    return task._replace(prunable=make_prunable(config.prunable, task))


def run_plans(
    config: LowDataOptions,
    out: records.Run,
    source: data.Source,
    plans: Mapping[str, Plan],
    conclude: Callable[[units.Job, TrainState, Plan], Values],
) -> None:
    """Trains what is not finished yet of the plans of one setting.

    Args:
      config: the flags in this setting.
      out: where results are recorded.
      source: the data set.
      plans: by the name of their units.
      conclude: (job, trained state, plan) -> further results.
    """

    def learn(jobs: Sequence[units.Job]) -> None:
        def ended(job: units.Job, state: TrainState) -> Values:
            return conclude(job, state, plans[job.unit.method])

        own = plans[jobs[0].unit.method]
        variants = {name: plan.variant for name, plan in plans.items()}
        units.learn(own.config, out, variants, ended, jobs)

    def program(name: str) -> int:
        return id(plans[name].variant.method)

    before = len(out.units())
    units.run_each(config, out, source, plans, learn, program)
    # The programs of one call are of no use to the next, and a process that keeps
    # thousands of them has no room left in its table of memory maps.
    if len(out.units()) > before:
        jax.clear_caches()


def check_recorded(out: records.Run, plans: Mapping[Cell, Plan]) -> None:
    """Refuses to go on with a cell whose finished units had other values.

    Raises:
      ValueError: naming the cell and the values.
    """
    named = {cell.name: plan.values for cell, plan in plans.items()}
    for unit in out.units():
        now = named.get(unit.method)
        known = (out.finished(unit) or {}).get("values", now)
        if now is not None and known != now:
            raise ValueError(
                f"expected {unit.method} with the values of its finished runs, "
                f"{known}, got {now}; give another --workdir, or remove "
                f"units/{unit.method}-seed*.json to run them anew"
            )
