"""Runs notebooks from the first cell to the last and stores them with outputs and pictures.

    python tools/run_notebooks.py [notebooks/01_forward_pass.ipynb ...]

By default all of notebooks/, one after the other, a kernel of this Python for each. A notebook of
which a cell fails is left as it was.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CELL_SECONDS = 900


def main(paths):
    for path in map(Path, paths or sorted(NOTEBOOKS.glob("*.ipynb"))):
        notebook = nbformat.read(path, as_version=4)
        where = {"metadata": {"path": str(path.parent)}}
        options = {"timeout": CELL_SECONDS, "record_timing": False, "kernel_name": "python3"}
        NotebookClient(notebook, resources=where, **options).execute()
        # What differs from one machine to another and shows nothing.
        notebook.metadata.language_info = {"name": "python"}
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
