"""`v4jax generate` as from a shell: what one process has compiled the next one finds."""

import json
import os
import subprocess
import sys

import pytest

COMMAND = [
    "generate",
    "--prompt=h\u00e9llo \u2013 \u65e5\u672c",
    "--max_new_tokens=8",
    "--format=json",
]
_OURS = ("JAX", "XLA", "TPU", "TF_CPP")  # what tests set and a shell does not


def generate(cache):
    """The JSON that it prints, and stderr."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    plain |= {"XDG_CACHE_HOME": str(cache), "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-m", "v4jax", *COMMAND]
    done = subprocess.run(words, env=plain, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow  # compiles the packaged model twice with LLVM's optimisations
def test_the_second_start_neither_traces_nor_compiles(tmp_path):
    (first, _), (second, err) = generate(tmp_path), generate(tmp_path)
    assert second["tokens"] == first["tokens"] and len(first["tokens"][0]) == 8
    assert second["compile_seconds"] < first["compile_seconds"] / 2
    assert "Traceback" not in err and len(err.splitlines()) == 2  # the model and the summary
    programs = sorted((tmp_path / "v4jax" / "compiled" / "programs").glob("*.entry"))
    assert len(programs) == 3
    for program in programs:
        program.write_bytes(program.read_bytes()[:-100])
    damaged, _ = generate(tmp_path)
    assert damaged["tokens"] == first["tokens"]
