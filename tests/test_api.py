"""The public names: what there is, what it costs to import, how it is documented."""

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import d2sparse

# Rooms whose functions need no more than arrays to be shown in an example.
GROUND = [
    "checks",
    "tree",
    "masks",
    "scores",
    "distributions",
    "schedules",
    "rules",
    "losses",
]
GROUND += ["checks", "metrics", "macs", "transforms", "reparam", "packing"]
GROUND += ["quantisation", "regularizers", "surgery"]
MODULES = [m.name for m in pkgutil.walk_packages(d2sparse.__path__, "d2sparse.")]
NEVER_ON_IMPORT = {
    *("flax", "matplotlib", "orbax", "sklearn", "tabulate", "tensorboardX"),
    *("tensorflow", "tensorflow_datasets", "d2sparse.models", "d2sparse.data"),
}


def public_names(module):
    """Functions and classes that a module defines."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }


def test_the_names_that_a_user_starts_from():
    names = (
        "sparsify rigl gradual fixed erk uniform every get_masks apply_masks density"
    )
    assert set(names.split()) | {"sparsity"} <= set(d2sparse.__all__)


def test_all_is_sorted_and_complete():
    assert d2sparse.__all__ == sorted(set(d2sparse.__all__))
    public = {name for name in vars(d2sparse) if not name.startswith("_")}
    modules = {
        name for name in public if isinstance(vars(d2sparse)[name], types.ModuleType)
    }
    assert public - modules == set(d2sparse.__all__) - modules
    assert set(d2sparse.__all__) <= public


ROOM = "print(d2sparse.lottery.__name__)"


def test_the_import_is_light_and_touches_no_device():
    # A platform that does not exist: whoever asks for a device fails.
    shown = subprocess.run(
        [sys.executable, "-c", f"import d2sparse, sys; print(*sys.modules); {ROOM}"],
        env={**os.environ, "JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
        check=True,
    )
    *modules, room = shown.stdout.split()
    assert not NEVER_ON_IMPORT & set(modules)
    assert room == "d2sparse.lottery"  # Imported when it is asked for.


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )


def test_rooms_are_there_after_the_import_and_name_what_they_lack():
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['flax', 'matplotlib', 'tensorstore']))\n"
        "for form in ('import d2sparse.{0}', 'from d2sparse import {0}'):\n"
        "  for room in 'dual models train lottery anytime plots records checkpoint'"
        ".split():\n"
        "    try: exec(form.format(room))\n"
        "    except ModuleNotFoundError as error: print(error)\n"
    )
    said = run_python(code).stdout.splitlines()
    named = ["flax"] * 5 + ["matplotlib"] * 2 + ["tensorstore"]
    for line, package in zip(said, named * 2, strict=True):
        wanted = f'needs {package}, which is not installed; pip install "d2sparse[exp'
        assert wanted in line
    with pytest.raises(AttributeError, match="no attribute 'duel'"):
        d2sparse.duel  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for public, value in public_names(module).items():
        doc = inspect.getdoc(value) or ""
        assert doc.split("\n")[0].endswith((".", ":", "?")), public
        # NamedTuples and dataclasses that have none get one made of their fields.
        assert not doc.startswith(f"{public}("), public


@pytest.mark.parametrize("name", [m for m in MODULES if m.split(".")[1] in GROUND])
def test_every_function_of_the_ground_floors_has_an_example(name):
    for public, value in public_names(importlib.import_module(name)).items():
        assert not inspect.isfunction(value) or ">>>" in (value.__doc__ or ""), public


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_are_annotated(name):
    for public, value in public_names(importlib.import_module(name)).items():
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            parts = [p.annotation for p in signature.parameters.values()]
            assert inspect.Signature.empty not in [
                *parts,
                signature.return_annotation,
            ], public


def test_the_names_work_together():
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    target = x[:, :1] * 3.0 + x[:, 1:2] * 3.0
    params = {"kernel": jnp.full((8, 1), 0.1), "bias": jnp.zeros(1)}
    rule = d2sparse.rigl(sparsity=0.75, drop_fraction=0.5)
    tx = d2sparse.sparsify(optax.sgd(0.1), rule, d2sparse.every(5, stop=40))
    state = tx.init(params)
    params = d2sparse.apply_masks(params, d2sparse.get_masks(state))

    def loss(params):
        return jnp.mean((x @ params["kernel"] + params["bias"][None] - target) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return params, state, d2sparse.density(d2sparse.get_masks(state))

    for _ in range(60):
        params, state, density = step(params, state)
        assert density == 0.25
    # RigL finds the two inputs that matter.
    assert np.flatnonzero(params["kernel"]).tolist() == [0, 1]
    assert loss(params) < 1e-4
    assert d2sparse.sparsity(d2sparse.get_masks(state)) == 0.75
