"""A terminal or pipe that cannot show a character gets its escape, whatever the command."""

import io
import os
import shutil
import subprocess
import sys

import pytest

from tests.cli.test_generate import directory, run  # noqa: F401  (fixtures)
from v4jax.checkpoints import load as checkpoint
from v4jax.cli.main import SUBCOMMANDS, main

ODD = "h\u00e9 \u2013 \u65e5\u672c"
SHOWN = "h\\xe9 \\u2013 \\u65e5\\u672c"
# What each command is to say ODD in: its result or, where that takes long, its sentence of what is
# wrong. DIR stands for a folder of that name.
WORDS = {
    "generate": (0, ["--checkpoint=DIR", "--max_length=32", "--max_new_tokens=2", ODD]),
    "chat": (2, ["--checkpoint=DIR"]),
    "serve": (2, ["--checkpoint=DIR/no"]),
    "keys": (2, ["create", "--file=DIR/no/keys.json", "--name=a"]),
    "forget": (2, ["--audit=DIR/no", "--key=0123456789abcdef"]),
    "eval": (2, ["needle", "--checkpoint=DIR/no"]),
    "tiers": (2, ["--worker=DIR/no", "--reviewer=DIR"]),
    "bench": (2, ["--out=DIR/no/waits.png"]),
    "inspect": (0, ["DIR"]),
    "convert": (2, ["--source=DIR/no", "--target=DIR/new", "--to=orbax"]),
    "plan": (2, ["--topology=v5p:2x2x1", f"--config={ODD}"]),
    "tune": (2, ["--out=DIR/no/blocks.json"]),
    "train": (2, ["--config=DIR/no.py", "--workdir=run"]),
    "plot": (2, ["DIR", "--out=DIR/curves.png"]),
    "sweep": (2, ["DIR"]),
}


@pytest.fixture
def folder(directory, tmp_path):  # noqa: F811
    """A checkpoint's config and tokenizer in a folder with an odd name."""
    found = tmp_path / ODD
    found.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(directory / name, found / name)
    return found


def printed(monkeypatch, *words):
    """Status, stdout and stderr of a command whose streams fail on what is not ASCII."""
    raw = {name: io.BytesIO() for name in ("stdout", "stderr")}
    with monkeypatch.context() as patch:
        for name, into in raw.items():
            patch.setattr(sys, name, io.TextIOWrapper(into, "ascii", "strict"))
        status = main(["v4jax", *words])
        sys.stdout.flush()
        sys.stderr.flush()
        return status, *(into.getvalue().decode("ascii") for into in raw.values())


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_command_escapes_what_cannot_be_shown(name, folder, monkeypatch):
    expected, words = WORDS[name]
    words = [word.replace("DIR", str(folder)) for word in words]
    status, out, err = printed(monkeypatch, name, *words)
    assert status == expected
    assert SHOWN in (err if status else out)


@pytest.mark.parametrize("words", [[ODD], ["inspect", f"--{ODD}", "flash"], ["inspect", ODD]])
def test_mistakes_are_shown_too(words, monkeypatch):
    status, _, err = printed(monkeypatch, *words)
    assert status == 2 and SHOWN in err


def test_a_process_with_ascii_streams(tmp_path):
    found = tmp_path / ODD
    found.mkdir()
    shutil.copy(os.path.join(checkpoint.locate("nano"), "config.json"), found)
    done = subprocess.run(
        [sys.executable, "-m", "v4jax", "inspect", found],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert SHOWN in done.stdout.decode("ascii") and done.stderr == b""
