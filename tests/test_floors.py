"""Imports go only downward, and the ground floors need no more than jax and optax."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "checks": -1,  # Below all others.
    "disk": 0,
    "jaxprs": 0,
    "meshes": 0,
    "schema": 0,
    "tree": 0,
    "masks": 1,
    "scores": 1,
    "distributions": 1,
    "schedules": 1,
    "prompts": 1,
    "label_maps": 1,
    "rules": 2,
    "reparam": 2,
    "packing": 2,
    "quantisation": 2,
    "losses": 2,
    "regularizers": 2,
    "metrics": 2,
    "macs": 2,
    "transforms": 3,
    "models": 3,
    "data": 3,
    "surgery": 4,
    "train": 4,
    "anytime": 5,
    "dual": 5,
    "lottery": 5,
    "checkpoint": 5,
    "constraints": 6,
    "records": 6,
    "plots": 6,
    "study": 7,
    "__init__": 8,
}
GROUND = {room for room, floor in FLOORS.items() if floor <= 3} - {"models", "data"}
GROUND_IMPORTS = {"jax", "optax", "numpy", *sys.stdlib_module_names}


def modules() -> dict[str, Path]:
    """Dotted module names inside the package, such as "models.resnet"."""
    package = ROOT / "d2sparse"
    paths = sorted(package.rglob("*.py"))
    return {".".join(p.relative_to(package).with_suffix("").parts): p for p in paths}


def room(module: str) -> str:
    return module.partition(".")[0]


def imported(module: str, source: str) -> set[str]:
    """Absolute names of everything that a module imports, at any depth of nesting."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["d2sparse", *module.split(".")][: -node.level or None]
            parts = [*(package if node.level else []), node.module or ""]
            base = ".".join(filter(None, parts))
            rooms = {a.name for a in node.names} & set(FLOORS)
            is_root = base == "d2sparse"
            names |= {f"{base}.{name}" for name in rooms if is_root}
            if not is_root or len(rooms) < len(node.names):
                names.add(base)
    return names


def violations(module: str, source: str) -> list[str]:
    """What is wrong with the imports of one module, one sentence each."""
    if room(module) not in FLOORS:
        return [f"{module} has no floor: place it in FLOORS of tests/test_floors.py"]
    found = []
    for name in sorted(imported(module, source)):
        top, _, inside = name.partition(".")
        target = room(inside) or "__init__"
        if top == "experiments":
            found.append(f"{module} imports {name}: experiments stand above d2sparse")
        elif top == "d2sparse":
            same_folder = target == room(module)
            if not same_folder and FLOORS.get(target, 99) >= FLOORS[room(module)]:
                found.append(f"{module} imports {name}, which is not on a lower floor")
        elif room(module) in GROUND and top not in GROUND_IMPORTS:
            found.append(f"{module} imports {name}: floors 0 to 3 need jax and optax")
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_go_downward(module):
    found = violations(module, modules()[module].read_text())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("tree", "from d2sparse import masks", "tree imports d2sparse.masks, which"),
        ("tree", "from d2sparse.masks import apply", "tree imports d2sparse.masks,"),
        (
            "scores",
            "import d2sparse.masks as m",
            "scores imports d2sparse.masks, which",
        ),
        ("masks", "from . import rules", "masks imports d2sparse.rules, which"),
        ("models.mlp", "from ..train import fit", "models.mlp imports d2sparse.train,"),
        ("models.mlp", "from d2sparse.data import tfds", "models.mlp imports d2sparse"),
        ("dual", "from d2sparse import sparsify", "dual imports d2sparse, which"),
        ("scores", "from d2sparse import tree, sparsity", "scores imports d2sparse, "),
        ("masks", "def f():\n    import flax", "masks imports flax: floors 0 to 3"),
        ("plots", "from experiments import cli", "plots imports experiments: exp"),
        ("utils", "", "utils has no floor: place it in FLOORS"),
    ],
)
def test_a_planted_violation_is_caught(module, source, message):
    (found,) = violations(module, source)
    assert found.startswith(message)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("masks", "from d2sparse import tree\nimport jax.numpy as jnp\nimport math"),
        ("models.__init__", "from d2sparse.models.mlp import mlp\nimport flax"),
        ("train", "from d2sparse import data, tree"),
        ("models.resnet", "from .mlp import mlp\nfrom d2sparse.models import mlp"),
        ("__init__", "from d2sparse.dual import Dual\nfrom d2sparse import masks"),
    ],
)
def test_a_downward_import_passes(module, source):
    assert violations(module, source) == []
