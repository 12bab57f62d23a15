"""The command itself: its version, how flags may be spelt, what it says of a wrong one."""

import json
import subprocess
import sys
from importlib import metadata

import pytest
from absl import flags

import v4jax
from v4jax import extras
from v4jax.cli import main as main_module
from v4jax.cli.main import main


def test_the_version_is_one_fact(capsys):
    assert main(["v4jax", "--version"]) == 0
    assert capsys.readouterr().out == f"v4jax {v4jax.__version__}\n"
    assert metadata.version("v4jax") == v4jax.__version__


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "v4jax", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"v4jax {v4jax.__version__}\n"


@pytest.fixture
def declared():
    """Flags of every kind."""

    class Module:
        @staticmethod
        def define_flags():
            flags.DEFINE_multi_string("some_text", [], "")
            flags.DEFINE_integer("some_number", 0, "")
            flags.DEFINE_boolean("some_switch", True, "")

    with main_module._flags_of(Module):
        yield


@pytest.mark.parametrize(
    ("given", "spelt"),
    [
        (["--some-number", "3"], ["--some_number", "3"]),
        (["-some-number=3", "--nosome-switch"], ["--some_number=3", "--nosome_switch"]),
        (["--some-switch", "--some-number=1"], ["--some_switch", "--some_number=1"]),
        # A value is nobody's flag, nor is what follows two dashes, nor what is not declared.
        (["--some-text", "--some-number"], ["--some_text", "--some-number"]),
        (["--some-text=--some-number"], ["--some_text=--some-number"]),
        (["--", "--some-number"], ["--", "--some-number"]),
        (["--config.some-thing=1", "--un-known=2"], ["--config.some-thing=1", "--un-known=2"]),
        (["a-b", "-"], ["a-b", "-"]),
    ],
)
def test_dashes_serve_for_underscores(declared, given, spelt):
    assert main_module._underscored(given) == spelt


def test_a_flag_that_is_nearly_right(capsys):
    assert main(["v4jax", "generate", "--promt=x"]) == 2
    err = capsys.readouterr().err
    assert (
        err
        == "v4jax generate: there is no flag --promt, maybe --prompt; see v4jax generate --help\n"
    )


def test_extras_are_installed_from_where_the_package_came(monkeypatch, tmp_path):
    checkout = extras.how_to_install("plot")
    assert checkout.startswith("pip install -e '/") and checkout.endswith("[plot]'")

    class Installed:
        url = ""

        def read_text(self, name):
            return json.dumps({"url": self.url, "dir_info": {}})

    monkeypatch.setattr(extras, "__file__", str(tmp_path / "site-packages/v4jax/extras.py"))
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed())
    wanted = ['matplotlib>=3.9; extra == "plot"', "jax>=0.10.2", 'x>1; extra == "other"']
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    assert extras.how_to_install("plot") == "pip install 'matplotlib>=3.9'"
    (tmp_path / "pyproject.toml").write_text("")
    Installed.url = tmp_path.as_uri()
    assert extras.how_to_install("plot") == f"pip install '{tmp_path}[plot]'"


def test_no_sentence_advises_an_index_that_does_not_have_us():
    root = extras.Path(v4jax.__file__).parent
    advising = [p for p in root.rglob("*.py") if "pip install 'v4jax[" in p.read_text()]
    assert advising == []
