"""The notebooks run from top to bottom, and are stored with what they show."""

import itertools
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


class ThisInterpreter(KernelSpecManager):
    """Runs every notebook under the Python of the tests, whatever is installed."""

    def get_kernel_spec(self, kernel_name):
        module = ["-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=[sys.executable, *module], language="python")


# A comparison of a user's own arrays is tested with those of test_study.
SLOW = ("a_comparison_on_your_arrays",)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def kinds(outputs):
    return [kind for kind, _ in itertools.groupby(o.output_type for o in outputs)]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem in SLOW))
        for p in NOTEBOOKS
    ],
)
def test_a_notebook_runs_without_an_error(path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    # The tests draw to nowhere, a notebook into itself.
    monkeypatch.delenv("MPLBACKEND", raising=False)
    stored = outputs(notebook)
    client = NotebookClient(
        notebook,
        timeout=300,
        km=AsyncKernelManager(kernel_spec_manager=ThisInterpreter()),
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute(cleanup_kc=True)
    fresh = outputs(notebook)
    # What one cell prints may arrive in one message or in several.
    assert kinds(fresh) == kinds(stored)
    # A warning is an output on stderr.
    assert {o.get("name", "stdout") for o in fresh} == {"stdout"}


def test_a_notebook_is_stored_executed_and_says_nothing_of_a_machine(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert all(output.output_type != "error" for output in outputs(notebook))
    assert notebook.metadata == {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    assert all(cell.metadata == {} for cell in notebook.cells)
    text = " ".join(str(output.get("text", "")) for output in outputs(notebook))
    assert "/" not in text
