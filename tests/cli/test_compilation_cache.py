"""Where commands keep compiled programs."""

import os
import sys
from pathlib import Path

import pytest

from v4jax.cli import compilation_cache
from v4jax.cli.main import SUBCOMMANDS, main

COMPILING = {
    "generate",
    "chat",
    "serve",
    "bench",
    "eval",
    "tiers",
    "plan",
    "tune",
    "train",
    "sweep",
}


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """What JAX is told, in place of telling it; nothing is set and home is empty."""
    told = {}
    monkeypatch.setattr(compilation_cache, "_set", told.__setitem__)
    for name in (compilation_cache.VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return told


def begin(monkeypatch, flag=None, **options):
    class Flags:
        compilation_cache = flag

    monkeypatch.setattr(compilation_cache, "FLAGS", Flags)
    compilation_cache.begin(**options)


def test_the_default_is_the_users_cache_directory(settings, monkeypatch, tmp_path):
    begin(monkeypatch)
    directory = tmp_path / ".cache" / "v4jax" / "compiled"
    assert settings["jax_compilation_cache_dir"] == str(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    begin(monkeypatch)
    assert settings["jax_compilation_cache_dir"] == str(tmp_path / "xdg/v4jax/compiled")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: to be ignored
    begin(monkeypatch)
    assert settings["jax_compilation_cache_dir"] == str(directory)


def test_jaxs_own_setting_wins_over_the_default_and_the_flag_over_both(
    settings, monkeypatch, tmp_path
):
    monkeypatch.setenv(compilation_cache.VARIABLE, str(tmp_path / "own"))
    begin(monkeypatch)
    assert settings == {} and list(tmp_path.iterdir()) == []
    begin(monkeypatch, str(tmp_path / "flag"))
    assert settings["jax_compilation_cache_dir"] == str(tmp_path / "flag")


def test_off_keeps_nothing(settings, monkeypatch, tmp_path):
    begin(monkeypatch, "off")
    assert settings == {"jax_enable_compilation_cache": False} and list(tmp_path.iterdir()) == []


def test_a_sweep_has_a_place_of_its_own(settings, monkeypatch, tmp_path):
    begin(monkeypatch, default=False)
    assert settings == {} and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["in the way", "of others"])
def test_a_default_that_cannot_be_used_is_a_line(settings, monkeypatch, tmp_path, capsys, where):
    if where == "in the way":
        (tmp_path / ".cache").touch()
    else:
        (tmp_path / ".cache/v4jax/compiled").mkdir(parents=True)
        (tmp_path / ".cache/v4jax/compiled").chmod(0o777)
    begin(monkeypatch)
    err = capsys.readouterr().err
    assert settings == {} and err.count("\n") == 1
    assert "compiled programs are not kept (" in err and "--compilation_cache=DIR" in err


@pytest.mark.parametrize("place", ["file/x", "nul\0", ""])
def test_a_flag_that_cannot_be_used_is_a_sentence(tmp_path, capsys, place):
    (tmp_path / "file").touch()
    value = f"{tmp_path}/{place}" if place else ""
    assert main(["v4jax", "generate", f"--compilation_cache={value}"]) == 2
    err = capsys.readouterr().err
    assert "--compilation_cache" in err and err.count("\n") == 1


def test_only_jaxs_own_entries_are_removed(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(compilation_cache, "LIMIT", 10)
    for name in ("my-cache", f"jit_f-{'0' * 64}-cache", f"jit_g-{'1' * 64}-cache"):
        (tmp_path / name).write_bytes(bytes(8))
    os.utime(tmp_path / f"jit_f-{'0' * 64}-cache", (1, 1))
    begin(monkeypatch, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"my-cache", f"jit_g-{'1' * 64}-cache"}


def test_settings_reach_jax_and_its_children(monkeypatch):
    class Jax:
        class config:
            told = {}
            update = told.__setitem__

    monkeypatch.setitem(sys.modules, "jax", Jax)
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    compilation_cache._set("jax_enable_compilation_cache", False)
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "False"
    assert Jax.config.told == {"jax_enable_compilation_cache": False}


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_command_that_compiles_has_the_flag(name, capsys):
    assert main(["v4jax", name, "--help"]) == 0
    assert ("--compilation_cache" in capsys.readouterr().out) == (name in COMPILING)


def test_programs_lie_within(monkeypatch, tmp_path):
    import jax

    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        assert Path(compilation_cache.programs()) == tmp_path / "programs"
        for elsewhere in ("gs://bucket/x", None):
            jax.config.update("jax_compilation_cache_dir", elsewhere)
            assert compilation_cache.programs() is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
