"""The notebooks run from the first cell to the last, and are stored with what they print and draw.

One of them, a user's way from a checkpoint to a text, runs with every test run; the others with the
slow tests.
"""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
CELL_SECONDS = 500
LARGEST = 500_000  # bytes, pictures and all
A_MACHINES_PATH = re.compile(r"/(home|root|tmp|usr|work|Users)/")


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(outputs):
    """What a cell shows: text, pictures. Text may come in one piece or in several."""
    found = [output.get("name") or sorted(output.data) for output in outputs]
    return [kind for kind, before in zip(found, [None, *found], strict=False) if kind != before]


def shown(cell):
    """Without what plugins say of accelerators that are not there, which differs by machine."""
    return kinds([output for output in cell.outputs if output.get("name") != "stderr"])


def test_there_are_notebooks():
    assert [path.name[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_with_its_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert "stderr" not in kinds(cell.outputs), cell.id
        assert ("plt.show()" in cell.source) == (["image/png", "text/plain"] in shown(cell)), (
            cell.id
        )
        assert not A_MACHINES_PATH.search(str(cell.outputs)), cell.id
    assert path.stat().st_size < LARGEST


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_begins_by_installing_what_is_missing(path):
    first = code_cells(read(path))[0].source
    assert 'find_spec("v4jax") is None' in first and '%pip install --quiet "..[plot]"' in first


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.name.startswith("04_") else pytest.mark.slow)
        for path in NOTEBOOKS
    ],
    ids=lambda path: path.stem,
)
def test_runs(path):
    """In a process of its own, as a reader runs it, with one device; compiled as tests are."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    where = {"metadata": {"path": str(path.parent)}}
    notebook, stored = read(path), code_cells(read(path))
    NotebookClient(notebook, timeout=CELL_SECONDS, resources=where).execute(env=environment)
    cells = code_cells(notebook)
    assert all(cell.execution_count for cell in cells)
    assert [shown(cell) for cell in cells] == [shown(cell) for cell in stored]
