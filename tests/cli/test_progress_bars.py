"""Progress bars are for terminals: a log file or a pipe gets none."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    p for name in ("v4jax", "experiments", "tools") for p in sorted((ROOT / name).rglob("*.py"))
]


def bars():
    for path in FILES:
        text = path.read_text()
        if "tqdm" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tqdm", "tqdm.tqdm"):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


BARS = dict(bars())


@pytest.mark.parametrize("where", BARS)
def test_every_bar_is_left_out_of_pipes(where):
    """`disable=None` is tqdm's way to say so."""
    given = {k.arg: ast.unparse(k.value) for k in BARS[where].keywords if k.arg}
    assert given.get("disable", "").startswith("None")


def test_there_are_bars():
    assert len(BARS) >= 7
