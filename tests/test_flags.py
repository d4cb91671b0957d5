"""Every flag of every experiment changes what is run, or is refused.

Nothing is trained: what an experiment has built when its first run would begin is
walked through, closures included, down to numbers, texts and arrays.
"""

import contextlib
import dataclasses
import functools
import hashlib
import types
import typing
from pathlib import Path

import jax
import numpy as np
import pytest

from d2sparse import data, records
from d2sparse.records import Run
from experiments import (
    d2_sparse,
    data_efficient_lth,
    lottery,
    prune,
    units,
)
from experiments.recipes.options import MaskOptions
from experiments.splits import draw_splits
from experiments.task import TaskConfig

# Where files are, and what is shown and saved on the way.
ASIDE = {
    *("data_dir", "workdir", "progress", "distributed"),
    *("report_every", "checkpoint_every", "keep_checkpoints"),
    *("runs_at_once", "data_parallel"),  # They divide the work between devices.
}
TINY = {"width": 0.1, "steps": 12, "refresh_interval": 3}
RULES = ("one_shot", "rigl", "granet", "top_kast", "snip", "str", "powerprop")
EXPERIMENTS = {
    "d2_sparse": (d2_sparse.run, d2_sparse.Config(**TINY, shift=0)),
    "prune": (prune.run, prune.Config(**TINY, rules=RULES, sparsities=(0.5,))),
    "lottery": (lottery.run, lottery.Config(width=0.1, rounds=2)),
}
# Other values than the next number or the next choice.
VALUES = {
    "dataset": ["mnist"],
    "model": ["convnet_s"],
    "ticket": ["nowhere"],
    "tuned": ["nowhere.json"],
    "layer_sparsities": [("head/*:0.5",)],
    "shift": [2],
    "learning_rates": [(0.05,)],
    "couplings": [(0.5,)],
    "label_noises": [(0.2,)],
    "imbalances": [(2.0,)],
    "imbalance": [2.0],
    "tuning_rates": [(0.1, 0.2)],
    "tuning_decays": [(0.1, 0.2)],
    "samples_per_class": [7],
    "group": [2],
    "pattern": ["blocks", "channels"],
    "severities": [(1,)],
    "sparsities": [(0.75,)],
    "rules": [("rigl",)],
    "budgets": [(7,)],
}


class Begun(Exception):
    """The first run would begin."""


@pytest.fixture(autouse=True)
def _nothing_is_run(monkeypatch, tmp_path):
    recorded = []

    def run_each(config, out, source, names, learn, program=None):
        splits = draw_splits(config, source, 0)
        recorded.append((list(names), config.seeds, splits, learn))

    @contextlib.contextmanager
    def reporting(*_):
        try:
            yield
        finally:
            raise Begun([recorded.pop() for _ in list(recorded)])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(units, "run_each", run_each)
    monkeypatch.setattr(data, "load", functools.cache(data.load))
    monkeypatch.setattr(records, "open_run", lambda place, *_: Run(Path(place)))
    monkeypatch.setattr(units, "reporting", reporting)


def planned(run, config):
    """A digest of what is built for a configuration."""
    with pytest.raises(Begun) as begun:
        run(config)
    found = hashlib.sha256()
    _walk(begun.value.args[0], found, frozenset(), {})
    return found.hexdigest()


def _walk(value, found, names, seen):
    """Adds what a value is made of; of flags, those that a function reads by name."""
    if isinstance(value, str | bytes | int | float | complex | None):
        found.update(repr(value).encode())
    elif isinstance(value, np.ndarray | jax.Array):
        keys = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
        value = np.asarray(jax.random.key_data(value) if keys else value)
        found.update(repr(value.shape).encode() + value.tobytes())
    elif (id(value), names) not in seen:
        seen[id(value), names] = value  # Which keeps its place in memory.
        if isinstance(value, types.FunctionType):
            names = _read_by(value)
        for part in _parts(value, names):
            _walk(part, found, names, seen)


def _parts(value, names):
    if isinstance(value, TaskConfig | MaskOptions):
        return [
            (field.name, getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.name in names
        ]
    if isinstance(value, functools.partial):
        return [value.func, value.args, sorted(value.keywords.items())]
    if isinstance(value, dict | types.MappingProxyType):
        return [part for item in value.items() for part in item]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        return [value.__qualname__, value.__defaults__, value.__kwdefaults__, *cells]
    if hasattr(value, "__wrapped__"):
        return [value.__wrapped__]
    ours = type(value).__module__.startswith(("experiments", "d2sparse"))
    return list(vars(value).values()) if ours and hasattr(value, "__dict__") else []


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:
        return None


@functools.cache
def _read_by(owner, deep=True):
    """Names that occur in a function or a module, and in what a function calls."""
    if isinstance(owner, types.ModuleType):
        own = [x for x in vars(owner).values() if isinstance(x, types.FunctionType)]
        return frozenset().union(*(_names(x.__code__) for x in own))
    found = _names(owner.__code__)
    called = [owner.__globals__.get(name) for name in found]
    for module in [x for x in called if isinstance(x, types.ModuleType)]:
        called += [getattr(module, name, None) for name in found]
    for other in called if deep else ():
        ours = (getattr(other, "__module__", "") or "").startswith("experiments")
        if isinstance(other, types.FunctionType) and ours:
            found = found | _read_by(other, deep=False)
    return found


def _names(code):
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return frozenset(code.co_names).union(*map(_names, inner))


def others(config, field):
    """Values to try for a flag."""
    own = getattr(config, field.name)
    if field.name in VALUES:
        return VALUES[field.name]
    hint = typing.get_type_hints(type(config))[field.name]
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return [choice for choice in choices if choice != own]
    if isinstance(own, bool):
        return [not own]
    if isinstance(own, tuple):
        return [own[:1]]
    if isinstance(own, int):
        return [own + 1]
    return [own / 2 if own else 0.25]


# Many programs, or flags that d2_sparse has too.
SLOW = dict.fromkeys(("prune", "lottery"), pytest.mark.slow)
FLAGS = [
    pytest.param(name, field, marks=SLOW.get(name, ()), id=f"{name}-{field.name}")
    for name, (_, config) in EXPERIMENTS.items()
    for field in dataclasses.fields(config)
    if field.name not in ASIDE
]


@functools.cache
def without(name):
    return planned(*EXPERIMENTS[name])


@pytest.mark.parametrize(("name", "field"), FLAGS)
def test_every_flag_has_an_effect_or_is_refused(name, field):
    run, config = EXPERIMENTS[name]
    for value in others(config, field):
        try:
            changed = planned(run, dataclasses.replace(config, **{field.name: value}))
        except ValueError:
            continue
        assert changed != without(name), f"--{field.name}={value} changes nothing"


def test_the_same_flags_build_the_same():
    assert planned(*EXPERIMENTS["d2_sparse"]) == without("d2_sparse")


def test_a_recipe_is_the_lottery_with_other_defaults():
    own = {field.name for field in dataclasses.fields(data_efficient_lth.Config)}
    assert own == {field.name for field in dataclasses.fields(lottery.Config)}


def test_what_is_shown_on_the_way_is_no_part_of_it():
    run, config = EXPERIMENTS["d2_sparse"]
    shown = dataclasses.replace(config, report_every=7, keep_checkpoints=3)
    assert planned(run, shown) == without("d2_sparse")


MASKS = [
    *({"distribution": "uniform"}, {"layer_sparsities": ("head/*:0.5",)}),
    *({"pattern": "channels"}, {"pattern": "blocks", "group": 2}),
    {"prunable": "body"},
]
PAIRS = [
    *({"pair_rule": "set"}, {"pair_rule": "static"}, {"preset": "symmetric"}),
    *({"mode": "consolidated"}, {"mode": "consolidated", "horizon": 3}),
    *({"mask_coupling": 0.5}, {"independent_views": True}),
]
TAUGHT = [{"coupling": 2.0}, {"temperature": 3.0}, {"weighted_coupling": True}]
REACHED = [
    *[(d2_sparse, own, MASKS) for own in ("static", "rigl", "uncoupled_pair")],
    (d2_sparse, "imp", [{"prunable": "body"}]),
    (d2_sparse, "d2_sparse", [*MASKS, *PAIRS, *TAUGHT]),
    (d2_sparse, "dense_mutual", TAUGHT),
]


@pytest.mark.parametrize(
    ("experiment", "method", "changes"),
    REACHED,
    ids=[f"{own.__name__}-{method}" for own, method, _ in REACHED],
)
def test_a_flag_reaches_the_method_that_it_is_for(experiment, method, changes):
    config = experiment.Config(**TINY, methods=(method,))
    found = [planned(experiment.run, dataclasses.replace(config, **c)) for c in changes]
    assert len({planned(experiment.run, config), *found}) == 1 + len(changes)


@pytest.mark.parametrize(
    ("experiment", "changes", "message"),
    [
        (d2_sparse, {"methods": ("rigl",), "coupling": 2.0}, "for dense_mutual, d2_sp"),
        (d2_sparse, {"methods": ("dense",), "sparsity": 0.5}, "no sparsity, .* static"),
        (d2_sparse, {"coupling": 2.0, "couplings": (0.5,)}, "since couplings are"),
        (d2_sparse, {"horizon": 5}, "no horizon, which is for mode consolidated"),
        (d2_sparse, {"pattern": "channels"}, "no pattern of imp, .* leave imp or the"),
        (d2_sparse, {"pair_rule": "granet"}, "pair_rule of rigl, set, static, got"),
        (prune, {"rules": ("rigl",), "power": 3.0}, "no power, which is for powerprop"),
        (prune, {"rules": ("dense",), "sparsities": (0.5,)}, "no sparsities, which is"),
        (
            prune,
            {"learning_rate": 0.2, "learning_rates": (0.1,)},
            "no learning_rate, s",
        ),
        (prune, {"group": 8}, "no group, which is for the patterns n_of_m and blocks"),
        (lottery, {"steps": 5, "epochs": 3}, "no epochs, since steps are 5, got 3"),
        (
            lottery,
            {"growth_samples": 5},
            "no growth_samples, since masks",
        ),
    ],
    ids=str,
)
def test_a_flag_without_effect_is_refused(experiment, changes, message):
    with pytest.raises(ValueError, match=message):
        experiment.run(experiment.Config(**changes))


def test_a_second_configuration_has_a_directory_of_its_own(monkeypatch):
    opened = []

    def open_run(place, *_):
        opened.append(place)
        return Run(Path(place))

    monkeypatch.setattr(records, "open_run", open_run)
    for sparsity in (0.8, 0.5, 0.8):
        config = d2_sparse.Config(**TINY, methods=("rigl",), sparsity=sparsity)
        planned(d2_sparse.run, config)
    assert opened[0] == opened[2] != opened[1]
