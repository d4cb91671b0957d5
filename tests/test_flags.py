"""Every flag changes what is run, or is refused.

Nothing is trained: what has been made when the first run would begin is walked through,
closures included, down to numbers, texts and arrays.
"""

import dataclasses
import functools
import hashlib
import types
import typing

import jax
import numpy as np
import pytest
from flax import linen as nn

from d2sparse import data, study, train
from d2sparse.constraints import METHODS, MIXES, Options
from d2sparse.study import grid, splits
from experiments import compare, d2_sparse, data_efficient_lth, lottery, prune

TINY = {"width": 0.05, "steps": 12}
OWN = {field.name for field in dataclasses.fields(Options)}
# Other values than the next number or the next choice.
VALUES = {
    "model": ["convnet_s"],
    "layer_sparsities": [("head/*:0.5",)],
    "samples_per_class": [7],
    "imbalance": [2.0],
    "shift": [2],
    "width": [0.1],
    "horizon": [5.0],
    "refresh_interval": [3],
    "coupling_ramp": [3],
    "threshold_interval": [1],
    "epochs": [3.0],
}
# They divide the same work, or decide which runs and which files there are.
ELSEWHERE = {
    *("dataset", "data_dir", "ticket", "methods", "with_"),
    *("axes", "seeds", "report_every"),
    *(field.name for field in dataclasses.fields(study.Config) if not field.compare),
}


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_compiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "rehearse", lambda program, like: None)
        patch.setattr(train, "make_program", lambda *given: given)
        patch.setattr(train, "starting_as", lambda program, *given: program)
        yield


@functools.cache
def digits():
    return splits.make_draw_splits(data.load("digits"))


def built(config):
    """A digest of the trainings of a configuration, and of their data."""
    plans = study.make_plans(config, digits(), 10)
    digest = hashlib.sha256()
    for plan in plans:
        drawn = digits()(plan.config, 0)
        _walk((plan.training, plan.program[1:], drawn), digest, {})
    return digest.hexdigest()


def _walk(value, digest, seen):
    """Adds what a value is made of."""
    assert not isinstance(value, Options), "a training that keeps all flags"
    if isinstance(value, str | bytes | int | float | complex | None | nn.Module):
        digest.update(repr(value).encode())
    elif isinstance(value, np.ndarray | jax.Array):
        keys = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
        value = np.asarray(jax.random.key_data(value) if keys else value)
        digest.update(repr(value.shape).encode() + value.tobytes())
    elif id(value) not in seen:
        seen[id(value)] = value  # Which keeps its place in memory.
        for part in _parts(value):
            _walk(part, digest, seen)


def _parts(value):
    if isinstance(value, functools.partial):
        return [value.func, value.args, sorted(value.keywords.items())]
    if isinstance(value, dict | types.MappingProxyType):
        return [part for item in value.items() for part in item]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__qualname__, value.__defaults__, value.__kwdefaults__, *cells]
    if isinstance(value, jax.ShapeDtypeStruct):
        return [str(value)]
    if hasattr(value, "__wrapped__"):
        return [value.__wrapped__]
    ours = type(value).__module__.startswith("d2sparse")
    return list(vars(value).values()) if ours and hasattr(value, "__dict__") else []


def others(config, name):
    """Values to try for a flag."""
    given = getattr(config, name)
    if name in VALUES:
        return VALUES[name]
    hint = typing.get_type_hints(type(config))[name]
    if typing.get_origin(hint) is typing.Literal:
        return [choice for choice in typing.get_args(hint) if choice != given]
    if isinstance(given, bool):
        return [not given]
    if isinstance(given, int):
        return [given + 1]
    return [given / 2 if given else 0.25]


def has_effect(config, name, before):
    """Whether a flag has a value that changes what was made, or that is refused."""
    for value in others(config, name):
        try:
            if built(dataclasses.replace(config, **{name: value})) != before:
                return True
        except ValueError:
            return True
    return False


# Those whose rows read other options than each other; further ones are variants.
BY_DEFAULT = {
    *("dense_short", "dense_narrow", "dense_averaged", "self_distilled", "rigl"),
    *("granet", "one_shot", "wanda", "top_kast", "str", "powerprop", "imp_capped"),
    *("l2_thresholded", "lobster", "group_lasso"),
    *("soup", "free_tickets", "dense_mutual", "d2_consolidated", "d2_annealed"),
    *("easier", "egp", "lacoot"),
}
NAMES = [
    pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow)
    for name in METHODS
    if name != "fixed"  # It needs a ticket, and goes by no option.
]


@pytest.mark.parametrize("method", NAMES)
def test_every_option_that_a_method_goes_by_changes_it(method):
    used = grid.flags_used([METHODS[method]], study.Config()) & OWN
    intervals = {"refresh_interval": 4, "threshold_interval": 2}
    own = {name: steps for name, steps in intervals.items() if name in used}
    config = study.Config(**TINY, **own, methods=(method,))
    before = built(config)
    idle = [name for name in sorted(used) if not has_effect(config, name, before)]
    assert idle == []


def test_what_methods_are_mixed_with_goes_by_its_options():
    config = study.Config(**TINY, methods=("dense",), with_=("averaged",))
    assert has_effect(config, "tail", built(config))
    mixed = [dataclasses.replace(config, with_=(name,)) for name in MIXES]
    assert len({built(each) for each in mixed}) == len(MIXES)


SHARED = [
    field.name
    for field in dataclasses.fields(study.Config)
    if field.name not in OWN | ELSEWHERE
]


@pytest.mark.parametrize("name", SHARED)
def test_every_flag_that_is_for_all_methods_changes_them(name):
    steps = {} if name == "epochs" else {"steps": 12}
    config = study.Config(**steps, width=0.05, methods=("static",))
    if name == "model":
        config = dataclasses.replace(config, width=None)
    values = [value for value in others(config, name) if value != "convolutions"]
    changed = [dataclasses.replace(config, **{name: value}) for value in values]
    assert len({built(config), *map(built, changed)}) == 1 + len(changed)


def test_the_same_flags_make_the_same():
    config = study.Config(**TINY, refresh_interval=4, methods=("d2_sparse", "imp"))
    again = dataclasses.replace(config, report_every=7, keep_checkpoints=3, seeds=2)
    assert built(config) == built(again)


# What is only read where another flag asks for it.
BESIDE = [
    ("static", {"pattern": "n_of_m"}, {"group": 2}),
    ("static", {"pattern": "n_of_m"}, {"pattern": "channels"}),
    ("static", {}, {"prunable": "body"}),
    ("d2_sparse", {"preset": "averaged"}, {"tail": 0.5}),
    ("d2_sparse", {"weighted_coupling": True}, {"trust_threshold": 0.5}),
]


@pytest.mark.parametrize(("method", "beside", "change"), BESIDE)
def test_a_flag_that_belongs_to_another_changes_something(method, beside, change):
    own = {"refresh_interval": 4} if method == "d2_sparse" else {}
    config = study.Config(**TINY, **own, **beside, methods=(method,))
    assert built(dataclasses.replace(config, **change)) != built(config)


@pytest.mark.parametrize(
    ("experiment", "given", "message"),
    [
        (d2_sparse, {"methods": ("dense",), "sparsity": 0.5}, "no sparsity, .* dense"),
        (d2_sparse, {"horizon": 5}, "no horizon, which none of dense, static, rigl"),
        (compare, {"methods": ("rigl",), "power": 3.0}, "no power, which none of rigl"),
        (compare, {"methods": ("rigl",), "group": 8}, "no group, which none of rigl"),
        (compare, {"methods": ("d2_annealed",), "tail": 0.5}, "no tail, which none"),
        (
            compare,
            {"methods": ("dense_mutual",), "mask_coupling": 0.5},
            "no mask_coupling, which none of dense_mutual",
        ),
        (
            compare,
            {"methods": ("dense_short",), "rewind_fraction": 0.5},
            "no rewind_fraction, which none of dense_short",
        ),
        (
            compare,
            {"methods": ("imp_capped",), "rounds": 4},
            "no rounds, which none of imp_capped",
        ),
        (prune, {"methods": ("dense",)}, "no sparsity, which none of dense goes by"),
        (lottery, {"growth_samples": 5}, "no growth_samples, which none of imp goes"),
        (lottery, {"steps": 5, "epochs": 3}, "either steps or epochs, got both"),
    ],
    ids=str,
)
def test_a_flag_without_effect_is_refused(experiment, given, message):
    config = experiment.Config(**given)
    with pytest.raises(ValueError, match=message):
        grid.check_effects(config)


def test_what_a_method_makes_of_the_flags_is_made_of_those_of_its_row():
    axes = {"steps": (100, 200)}
    config = study.Config(methods=("dense", "dense_short"), axes=axes)
    _, _, short, longer = study.make_plans(config, digits(), 10)
    assert 1.9 * short.config.steps < longer.config.steps < 100


def test_a_recipe_is_the_lottery_with_other_defaults():
    own = {field.name for field in dataclasses.fields(data_efficient_lth.Config)}
    assert own == {field.name for field in dataclasses.fields(lottery.Config)}
