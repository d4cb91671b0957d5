"""Tuned values: read from a file, used and stored by the runs of a comparison."""

import json
import types
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_type_hints

from d2sparse import disk, records, schema
from d2sparse.checks import check_choice
from d2sparse.constraints import METHODS, Method
from d2sparse.constraints.equal_costs import Known
from d2sparse.study.comparing import Experiment
from d2sparse.study.flags import Config
from d2sparse.study.grid import Plan, Row
from d2sparse.study.runner import End
from d2sparse.study.trainings import mixed

Flags = Mapping[str, Any]  # Values by flag.
Tuned = dict[str, dict[str, Flags]]  # By method and labels per class.
FILE = "tuned.json"
RATES = ("learning_rate", "weight_decay")  # That all methods are tuned by.


def read_tuned(
    workdir: str, named: str = "", methods: Mapping[str, Method] = METHODS
) -> Tuned:
    """The chosen values: of the file that is named, or of the run directory.

    Args:
      workdir: the run directory.
      named: a file, or nothing.
      methods: the table of methods.

    Returns:
      Nothing where no file is named and none has been written.

    Raises:
      ValueError: there is no such file, or it is another one.
    """
    if named:
        path = disk.local_path(named, "--tuned")
    else:
        path = disk.local_path(workdir, "--workdir") / FILE
    if not named and not path.exists():
        return {}
    try:
        tuned = json.loads(path.read_text(encoding="utf-8"))
        _check_tuned(tuned, methods)
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(
            f"expected a file of chosen values, got {path} ({error}); --tune writes one"
        ) from None
    return cast(Tuned, tuned)


def with_tuned(experiment: Experiment, tuned: Mapping[str, Any]) -> Experiment:
    """A comparison with tuned values, which its runs store and may not change later.

    Args:
      experiment: what is compared.
      tuned: from `read_tuned`.
    """

    def values(row: Row, base: Known) -> Flags:
        labels = str(base.flags.samples_per_class)
        return cast(Flags, tuned.get(row.method, {}).get(labels, {}))

    def values_of(plan: Plan) -> Flags:
        further = values(plan.row, plan.base)
        return tuned_values(plan, experiment.methods[plan.row.method], further)

    def check(out: records.Run, plans: Sequence[Plan]) -> None:
        experiment.check(out, plans)
        _check_recorded(out, {plan.row.name: values_of(plan) for plan in plans})

    def examine(end: End) -> Flags:
        return {**experiment.examine(end), "tuned": values_of(end.plan)}

    return experiment._replace(values=values, check=check, examine=examine)


def list_tries(flags: Any, method: Method) -> dict[str, tuple[Any, ...]]:
    """The values that a method tries by flag, and what it is mixed with."""
    every: dict[str, tuple[Any, ...]] = {}
    for row in mixed(flags, method):
        every |= row.tries(flags) if callable(row.tries) else row.tries
    return every


def tuned_values(plan: Plan, method: Method, further: Flags) -> dict[str, Any]:
    """The values of a plan of all flags that its method is tuned by."""
    names = {*RATES, *list_tries(plan.base.flags, method), *further}
    return {name: getattr(plan.config, name) for name in sorted(names - {"trial"})}


def _check_tuned(tuned: Any, methods: Mapping[str, Method]) -> None:
    """Raises ValueError where something is no value of a flag, by method and labels."""
    kinds = get_type_hints(Config)
    for method, labels in schema.parse(tuned, dict[str, dict[str, Any]]).items():
        check_choice("method", method, methods)
        for count, values in labels.items():
            if not count.isdecimal():
                raise ValueError(f"{method} has values for {count!r}, not a number")
            for name, value in schema.parse(values, dict[str, Any]).items():
                check_choice("flag", name, kinds)
                form = types.GenericAlias(dict, (str, kinds[name]))
                schema.parse({name: value}, form)


def _check_recorded(out: records.Run, values: Mapping[str, Flags]) -> None:
    """Refuses other values than those of finished runs of the same name.

    Raises:
      ValueError: naming the run and the values.
    """
    for unit in out.units():
        now = values.get(unit.method)
        before = (out.finished(unit) or {}).get("tuned", now)
        if now is not None and before != now:
            raise ValueError(
                f"expected {unit.method} with the values of its finished runs, "
                f"{before}, got {now}; give another --workdir, or remove "
                f"units/{unit.method}-seed*.json to run them anew"
            )
