"""What the tests of experiments share: reading run directories, running commands."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from matplotlib.figure import Figure

from d2sparse.models import Model
from d2sparse.records import reading
from d2sparse.study import grid

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def quick_compilation():
    """Nearly all the time here is compilation, of programs that run for a moment."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@contextlib.contextmanager
def blank_figures():
    """Figures are made, but left blank: drawing two takes as long as a training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw", lambda *_: None)
        yield


@contextlib.contextmanager
def linear_networks():
    """Experiments train linear networks, whatever --model says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "named_model", lambda classes: lambda _: linear(classes))
        yield


def linear(classes):
    """A network of two leaves, which compiles in a moment."""

    def init(key, x):
        shape = (x[0].size, classes)
        kernel = 0.1 * jax.random.normal(key, shape)
        return {"head": {"kernel": kernel, "bias": jnp.zeros(classes)}}, {}

    def apply(params, model_state, x, *, train):
        del train
        flat = x.reshape(len(x), -1)
        return flat @ params["head"]["kernel"] + params["head"]["bias"][
            None
        ], model_state

    return Model(init, apply)


def read(path):
    return json.loads(path.read_text())


def unit_files(workdir):
    return {path.stem: path for path in (workdir / "units").iterdir()}


def results(workdir, method, seeds):
    return [read(workdir / "units" / f"{method}-seed{seed}.json") for seed in seeds]


def reseal(path, change):
    """Changes the results of a unit on file, as if the unit had found others."""
    found = read(path)
    change(found)
    own = {key: value for key, value in found.items() if key != "seal"}
    found["seal"]["results"] = reading.digest_of(own)
    path.write_text(json.dumps(found))


def table_rows(workdir):
    """The cells of the table by column, row by row."""
    lines = (workdir / "table.md").read_text().splitlines()
    title, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [dict(zip(title, row, strict=True)) for row in rows]


def without_time(value):
    """What must be repeated to the last bit: all but seconds, their seal and places."""
    if isinstance(value, dict):
        return {
            key: without_time(item)
            for key, item in value.items()
            if key not in ("seconds", "seal", "workdir")
        }
    return [without_time(item) for item in value] if isinstance(value, list) else value


def modified(paths):
    return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}


def script(*words):
    """Runs Python."""
    return subprocess.run(
        [sys.executable, "-W", "error", *words],
        cwd=ROOT,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": ""},
        capture_output=True,
        text=True,
        check=False,
    )
