"""The command itself: its version, how flags may be spelt, what it says of a wrong one."""

import contextlib
import io
import json
import os
import subprocess
import sys
from importlib import metadata
from unittest import mock

import hypothesis
import pytest
from absl import flags
from hypothesis import strategies as st

import v4jax
from v4jax import extras
from v4jax.cli import main as main_module
from v4jax.cli.main import main
from v4jax.errors import InputError


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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["generat"], "v4jax: there is no command 'generat', maybe generate; expected one of"),
        (["a" * 5000], "v4jax: there is no command 'aaaa"),
        (["inspect", "--" + "a" * 5000, "flash"], "v4jax inspect: there is no flag --aaaa"),
        (["inspect", "--two words", "flash"], "there is no flag --two words; an argument that"),
        (["inspect", "--nocheck=true", "flash"], "--nocheck=true does not take an argument"),
        (["inspect", "-x", "flash"], "begins with a dash follows --"),
        (["inspect", "a" * 5000], "v4jax inspect: 'aaaa"),
        (["inspect", "flash", "b" * 5000], "v4jax inspect: there is an argument too many, 'bbb"),
        (["inspect", "flash", "--context=" + "9" * 5000], "--context is '9999"),
        (["inspect", "flash", "--format=" + "a:" * 5000], "--format is 'a:a:"),
        (["plan", "--topology=v5p:2x2x1", "--config=" + "a" * 5000], "--config is 'aaaa"),
        (["generate", "--checkpoint=" + "a" * 5000, "x"], "--checkpoint is 'aaaa"),
        (["generate", "--checkpoint=", "x"], "--checkpoint is ''"),
        (["generate", "--prompt_ids=" + "9" * 5000], "--prompt_ids is '9999"),
    ],
)
def test_one_short_sentence_whatever_is_wrong(words, sentence, capsys):
    assert main(["v4jax", *words]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1 and len(err) < 800


ODD = st.text(
    st.sampled_from("-=abcx1 \n:.,é") | st.characters(exclude_categories=("Cs",)), max_size=12
)
NAMES = st.sampled_from(["context", "con-text", "check", "nocheck", "format", "no-format", "x"])
FLAG = st.tuples(st.sampled_from(["-", "--", "---"]), NAMES, st.sampled_from(["", "="]), ODD)


@hypothesis.given(st.lists(ODD | FLAG.map("".join), max_size=4))
@hypothesis.settings(max_examples=100, deadline=None)
def test_no_words_are_a_traceback(words):
    err = io.StringIO()
    with (
        contextlib.redirect_stderr(err),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch("v4jax.cli.inspect.run", lambda source: 0),
    ):
        status = main(["v4jax", "inspect", *words])
    assert status in (0, 2) and err.getvalue().count("\n") == (status == 2)


def test_help_of_a_command_in_either_order(capsys):
    assert main(["v4jax", "help", "plot"]) == main(["v4jax", "plot", "--help"]) == 0
    usage = "Usage: v4jax plot DIR... [flags]"
    assert capsys.readouterr().out.count(usage) == 2
    assert main(["v4jax", "plot", "--", "--help"]) == 2  # a directory of that name


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["inspect", "flash_tiny"]])
def test_what_takes_the_output_may_refuse_it(words):
    shell = f"{sys.executable} -m v4jax {' '.join(words)}"
    full = subprocess.run(f"{shell} >/dev/full", shell=True, capture_output=True, text=True)
    assert full.returncode == 2
    assert full.stderr.endswith(": No space left on device\n")
    assert full.stderr.count("\n") == 1
    closed = subprocess.run(f"{shell} >&-", shell=True, capture_output=True, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")
    broken = subprocess.Popen(
        shell.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    broken.stdout.close()
    assert (broken.stderr.read(), broken.wait()) == ("", 141)
    broken.stderr.close()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["tune", "--tiny", "--out"], "x"),
        (["plot", "run", "--out"], "x.png"),
        (["plan", "--topology=v5p:2x2x1", "--picture"], "x.png"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(words, name, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "dir.png").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    before = sorted(tmp_path.iterdir())
    for place in (f"file/{name}", f"missing/{name}", "dir.png", "fifo.png", "nul\0.png"):
        assert main(["v4jax", *words, f"{tmp_path}/{place}"]) == 2
        err = capsys.readouterr().err
        assert f"{words[-1]} {tmp_path}/{place}: cannot be written (" in err
        assert err.count("\n") == 1 and sorted(tmp_path.iterdir()) == before


def test_a_picture_is_a_png_file(tmp_path, capsys):
    assert main(["v4jax", "plot", "run", f"--out={tmp_path}/x.doc"]) == 2
    assert "expected a file's name with .png" in capsys.readouterr().err


def test_a_target_that_cannot_be_made_is_refused_before_the_conversion(tmp_path, capsys):
    (tmp_path / "file").touch()
    for place in (f"{tmp_path}/file/x", "/proc/x", "/proc/x/y", f"{tmp_path}/{'a' * 500}"):
        words = ["--source=nano", "--to=orbax", f"--target={place}"]
        assert main(["v4jax", "convert", *words]) == 2
        err = capsys.readouterr().err
        assert "cannot be written (" in err and err.count("\n") == 1 and "goes on" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_command_needs_is_said_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="--picture needs matplotlib, .*: pip install -e '/"):
        extras.require("matplotlib", "plot", "--picture")


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


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--seed=many", "--seed is 'many'; expected a whole number"),
        ("--seed=a: b", "--seed is 'a: b'; expected a whole number"),
        ("--temperature=hot: 9", "--temperature is 'hot: 9'; expected"),
        ("--dtype=f: 8", "--dtype is 'f: 8'; expected float32 or bfloat16"),
    ],
)
def test_a_value_is_shown_as_it_was_given(word, said, capsys):
    assert main(["v4jax", "generate", word]) == 2
    assert said in capsys.readouterr().err
