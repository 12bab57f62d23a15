"""Runs notebooks from the first cell to the last and stores them with outputs and pictures.

    python tools/run_notebooks.py [notebooks/01_forward_pass.ipynb ...]

By default all of notebooks/, one after the other, on the CPU, a kernel of this Python for each. A
notebook of which a cell fails is left as it was. Needs Pillow, which comes with matplotlib.
"""

import base64
import io
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image, ImageChops

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CELL_SECONDS = 900
UNSEEN = 24  # of 255


def main(paths):
    for path in map(Path, paths or sorted(NOTEBOOKS.glob("*.ipynb"))):
        notebook = nbformat.read(path, as_version=4)
        run(notebook, path.parent)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = joined(cell.outputs)
        # Says which Python it was, and nothing that the reader wants to know.
        notebook.metadata.language_info = {"name": "python"}
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB", flush=True)


def run(notebook, folder):
    where = {"metadata": {"path": str(folder)}}
    options = {"timeout": CELL_SECONDS, "record_timing": False, "kernel_name": "python3"}
    client = NotebookClient(notebook, resources=where, **options)
    # Plugins of accelerators that are not there write warnings.
    client.execute(env=os.environ | {"JAX_PLATFORMS": "cpu"})


def joined(outputs):
    """The outputs with neighbouring pieces of text in one, and small pictures."""
    found = []
    for output in outputs:
        if found and output.get("name") and found[-1].get("name") == output["name"]:
            found[-1]["text"] += output["text"]
            continue
        if "image/png" in output.get("data", {}):
            output["data"]["image/png"] = small(output["data"]["image/png"])
        found.append(output)
    return found


def small(picture):
    """The PNG with a palette where no colour moves by more than can be seen, else as it is."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        exact = image.convert("RGB")
    reduced = exact.quantize(256, kmeans=1, dither=Image.Dither.NONE)
    moved = ImageChops.difference(exact, reduced.convert("RGB")).getextrema()
    out = io.BytesIO()
    chosen = reduced if max(high for _, high in moved) <= UNSEEN else exact
    chosen.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


if __name__ == "__main__":
    main(sys.argv[1:])
