"""A comparison from its flags to its table."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import data, records, train
from d2sparse.checks import optional
from d2sparse.constraints import METHODS, Method
from d2sparse.data import Source
from d2sparse.models import Model
from d2sparse.study import reporting
from d2sparse.study.dry_run import print_plans
from d2sparse.study.flags import Config, ConfigT
from d2sparse.study.grid import Plan, Values, make_plans
from d2sparse.study.reporting import Comparison, Report
from d2sparse.study.runner import Examine, Finished, Runner, Settings, run_plans
from d2sparse.study.splits import make_draw_splits

with optional(__name__):
    import pandas as pd


class Experiment(NamedTuple):
    """What a comparison asks, besides its flags.

    Attributes:
      name: of its run directories.
      references: methods that differences are taken to.
      methods: the table of methods.
      values: further flags of a row, see `make_plans`.
      starts: flags that only say where runs start, see `make_plans`.
      check: called before anything is trained, refuses a run directory whose finished
        runs do not go with the plans.
      examine: further results at the end of a run and of every titled phase.
      settings: see `Runner`.
      report: writes summary, table and figures.
    """

    name: str
    references: tuple[str, ...] = ()
    methods: Mapping[str, Method] = METHODS
    values: Values = lambda row, base: {}
    starts: tuple[str, ...] = ()
    check: Callable[[records.Run, Sequence[Plan]], None] = lambda out, plans: None
    examine: Examine = lambda end: {}
    settings: Settings = lambda plan, seed, out: {}
    report: Report = reporting.report


def compare(
    config: Config,
    experiment: Experiment | None = None,
    source: Source | None = None,
    model: Model | None = None,
) -> "pd.DataFrame":
    """Trains what has not finished yet, reports on it, and returns a row a run.

    >>> import tempfile
    >>> from d2sparse import models
    >>> config = Config(methods=("dense", "static"), steps=4, seeds=1, shift=0,
    ...                 progress=False, workdir=tempfile.mkdtemp())
    >>> linear = models.from_linen(models.mlp.MLP((), 10))
    >>> runs = compare(config, model=linear)  # doctest: +ELLIPSIS
    /...
    >>> runs["method"].tolist()
    ['dense', 'static']

    Args:
      config: the flags.
      experiment: what is asked; a plain comparison to the first method if not given.
      source: data in place of --dataset, from `data.from_arrays`.
      model: a network in place of --model.

    Returns:
      The results of all finished runs: the columns method, seed, a column for every
      flag whose values are compared, accuracy, nll, ece, brier, nonzeros, zeros, costs
      and seconds.

    Raises:
      ValueError: something in the configuration cannot be done.
      FloatingPointError: every run has failed.
    """
    asked = experiment or Experiment("compare", config.methods[:1])
    source = source or data.load(config.dataset, config.data_dir)
    config = identified(config, source, model)
    draw_splits = make_draw_splits(source)
    build = None if model is None else (lambda flags: model)
    classes, table = source.num_classes, asked.methods
    plans = make_plans(
        *(config, draw_splits, classes, build, table, asked.values, asked.starts)
    )
    if config.dry_run:
        print_plans(config, plans, draw_splits)
        return pd.DataFrame()
    workdir = config.workdir or default_workdir(asked.name, config)
    out = records.open_run(workdir, config, Finished)
    asked.check(out, plans)
    runner = Runner(config, out, draw_splits, asked.examine, asked.settings)

    def finished() -> Comparison:
        runs = reporting.read(config, out, plans)
        return Comparison(config, out, plans, runs, asked.references)

    with reporting.partial_report(out, lambda: asked.report(finished())):
        run_plans(runner, plans)
    comparison = finished()
    asked.report(comparison)
    refuse_all_failed(out)
    return comparison.runs


def refuse_all_failed(out: records.Run) -> None:
    """Raises where there is no result at all.

    Raises:
      FloatingPointError: naming a run and why it has failed.
    """
    failures = out.failures()
    if failures and len(failures) == len(out.units()):
        name, why = next(iter(failures.items()))
        raise FloatingPointError(
            f"all {len(failures)} runs have failed, {name} since {why}"
        )


def default_workdir(experiment: str, config: Any) -> str:
    """A run directory of its own for every configuration.

    Returns:
      Such as "runs/prune-digits-10-1a2b3c", whose end is a digest of the flags; without
      the labels per class where one directory takes several.
    """
    flags = records.identity(config)
    digest = hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()
    samples = f"-{config.samples_per_class}" if "samples_per_class" in flags else ""
    return f"runs/{experiment}-{config.dataset}{samples}-{digest[:6]}".replace(":", "-")


def identified(config: ConfigT, source: Source, model: Model | None = None) -> ConfigT:
    """The flags, with names that tell data and networks apart which no flag names."""
    flags: dict[str, Any] = {}
    if source.name != config.dataset:
        arrays = [*jax.tree.leaves(source.train), *jax.tree.leaves(source.test)]
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
        flags["dataset"] = f"{source.name}-{digest.hexdigest()[:6]}"
    if model is not None:
        like = train.to_device(source.train)
        x = train.inputs(train.take(like, jnp.arange(1)))
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        traced = jax.make_jaxpr(lambda v: model.apply(*v, x, train=True)[0])(variables)
        digest = hashlib.sha256(str(traced).encode())
        flags["model"] = f"own-{digest.hexdigest()[:6]}"
    return dataclasses.replace(config, **flags)
