"""The README's example of Python, run as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.slow  # loads and compiles nano twice, 25 s on two idle cores
def test_the_example_in_python_runs():
    (example,) = re.findall(r"## In Python\n\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert "jax.jit" in example
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, numbers = re.split(r"\n(?=\(1, \d+, 2048\)\n)", done.stdout, maxsplit=1)
    assert text.strip() and "[[[" in numbers  # what was written, then a shape and experts
