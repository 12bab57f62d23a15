"""JAX starts on the CPU alone where no accelerator is, unless somebody has decided."""

import os
import subprocess
import sys

import jax
import pytest

from v4jax import platforms


@pytest.fixture
def undecided(monkeypatch):
    """A machine without devices on which nobody has set anything."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platforms, "_devices", lambda: False)
    monkeypatch.setattr(platforms, "_plugins", lambda: {"xla_cuda13"})
    platforms.only_cpu.cache_clear()
    yield
    platforms.only_cpu.cache_clear()


def test_without_a_device_a_command_takes_the_cpu(undecided):
    platforms.settle_command()
    assert os.environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("value", ["", "tpu", "cuda,cpu"])
def test_what_the_user_has_set_stays(undecided, monkeypatch, value):
    monkeypatch.setenv("JAX_PLATFORMS", value)
    platforms.settle_command()
    assert os.environ["JAX_PLATFORMS"] == value


@pytest.mark.parametrize(
    ("function", "found"),
    [("_devices", True), ("_plugins", {"xla_cuda13", "another_chip"})],
)
def test_where_there_may_be_a_device_jax_looks_for_it(undecided, monkeypatch, function, found):
    monkeypatch.setattr(platforms, function, lambda: found)
    platforms.settle_command()
    assert "JAX_PLATFORMS" not in os.environ


def test_elsewhere_than_on_linux_nothing_is_decided(undecided, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not platforms.only_cpu()


@pytest.mark.parametrize("pattern", ["DEVICES", "VENDORS"])
def test_devices_are_found_by_their_files(monkeypatch, tmp_path, pattern):
    monkeypatch.setattr(platforms, "DEVICES", (f"{tmp_path}/nvidia*",))
    monkeypatch.setattr(platforms, "VENDORS", f"{tmp_path}/*/vendor")
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "vendor").write_text("0x8086\n")
    assert not platforms._devices()
    if pattern == "DEVICES":
        (tmp_path / "nvidiactl").touch()
    else:
        (tmp_path / "card" / "vendor").write_text("0x1ae0\n")
    assert platforms._devices()


def test_a_library_call_decides_for_its_process_only(undecided):
    before = jax.config.jax_platforms
    try:
        for set_already, after in ((None, "cpu"), ("tpu", "tpu")):
            jax.config.update("jax_platforms", set_already)
            platforms.settle_process()
            assert jax.config.jax_platforms == after
        assert "JAX_PLATFORMS" not in os.environ
    finally:
        jax.config.update("jax_platforms", before)


LIBRARY = "import v4jax; v4jax.Transformer; import jax; print(jax.default_backend())"


@pytest.mark.skipif(not platforms.only_cpu(), reason="there is an accelerator, or another plugin")
def test_no_plugin_complains_of_its_absent_device():
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "TPU", "TF_CPP"))}
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY], env=plain, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("cpu\n", "")
