"""Conversions that are killed, run out of disk or meet another one: they go on, or say why not."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.checkpoints import files, rewrite, small_config, synthetic, tensors
from v4jax.checkpoints.convert import convert
from v4jax.checkpoints.journal import Journal
from v4jax.checkpoints.load import load_variables
from v4jax.config import CSA, WINDOW, with_hash_routing
from v4jax.errors import InputError


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """A checkpoint as the instruct release is stored; not to be changed."""
    config = small_config(layers=with_hash_routing((WINDOW, CSA), 1))
    return synthetic(tmp_path_factory.mktemp("instruct") / "model", config)


def run(source, target, to="official", weights="stored"):
    return convert(source, target, to, weights, progress=False)


KILLER = """
    import os, signal, sys
    from v4jax.checkpoints import convert
    from v4jax.checkpoints import journal
    from v4jax.checkpoints import orbax as orbax_io
    from v4jax.checkpoints import target as targets

    source, target, to, *places = sys.argv[1:]

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def after(count, function):
        calls = [0]
        def counted(*args, **options):
            calls[0] += 1
            return die() if calls[0] > count else function(*args, **options)
        return counted

    def half(fd, content):
        write(fd, content[: len(content) // 2])
        die()

    write = os.write
    patches = {
        "writing": lambda n: setattr(os, "pwrite", after(n, os.pwrite)),
        "replacing": lambda n: setattr(os, "replace", after(n, os.replace)),
        "saving": lambda n: setattr(orbax_io, "_save_tree", after(n, orbax_io._save_tree)),
        "renaming": lambda n: setattr(os, "rename", after(n, os.rename)),
        "noting": lambda n: setattr(journal.Journal, "add", after(n, journal.Journal.add)),
        "tearing": lambda n: setattr(os, "write", half),
        "reading": lambda n: setattr(convert, "_check_bytes", after(n, convert._check_bytes)),
        "indexing": lambda n: setattr(targets, "write_index", die),
        "listing": lambda n: setattr(orbax_io, "write_manifest", die),
        "closing": lambda n: setattr(journal.Journal, "close", die),
    }
    for place in places:
        name, count = place.split(":")
        sys.stdout.flush()
        child = os.fork()
        if not child:
            patches[name](int(count))
            convert.convert(source, target, to, progress=False)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        seen = sorted(n for n in os.listdir(target) if n in ("model.safetensors.index.json",
                      "v4jax.json", ".incomplete")) if os.path.isdir(target) else []
        print(place, killed, *seen)
"""


@pytest.mark.parametrize(
    ("to", "places", "whole", "items"),
    [
        (
            "official",
            ["writing:0", "writing:30", "replacing:1", "noting:1", "tearing:0", "reading:40",
             "indexing:0", "closing:0"],
            "model.safetensors.index.json",
            5,
        ),
        (
            "transformers",  # without the MTP block
            ["writing:30", "noting:1", "reading:40", "indexing:0", "closing:0"],
            "model.safetensors.index.json",
            4,
        ),
        (
            "orbax",
            ["saving:1", "renaming:1", "noting:0", "tearing:0", "reading:40", "listing:0",
             "closing:0"],
            "v4jax.json",
            5,
        ),
    ],
)  # fmt: skip
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    instruct, tmp_path, to, places, whole, items
):
    run(instruct, tmp_path / "whole", to)
    target = tmp_path / "target"
    script = textwrap.dedent(KILLER)
    command = [sys.executable, "-W", "ignore", "-c", script, str(instruct), str(target), to]
    path = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [*command, *places],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [[place, "True"] for place in places], done.stderr
    # The journal is there from its first byte on; what makes the directory whole comes last.
    seen = {line[0]: line[2:] for line in lines}
    assert seen.pop("closing:0") == [".incomplete", whole]
    assert all(names in ([], [".incomplete"]) for names in seen.values())
    with pytest.raises(InputError, match="has not ended; run the same v4jax convert again"):
        load_variables(target)
    with pytest.raises(InputError, match="has not ended"):
        run(target, tmp_path / "other")
    report = run(instruct, target, to)
    assert report.resumed == items
    assert files(target) == files(tmp_path / "whole")


class Stop(Exception):
    """Ends a conversion in the test's own process."""


def interrupted(monkeypatch, source, target, to="official", items=2):
    """Leaves a conversion unfinished after some items."""

    def add(self, item, checksums, real=Journal.add):
        if len(self.done) == items:
            raise Stop
        real(self, item, checksums)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add)
        with pytest.raises(Stop):
            run(source, target, to)


def test_a_resumed_run_does_not_write_again(instruct, tmp_path, monkeypatch):
    interrupted(monkeypatch, instruct, tmp_path / "target")
    first = tmp_path / "target" / "model-00001-of-00005.safetensors"
    before = first.stat().st_mtime_ns, first.stat().st_ino
    assert run(instruct, tmp_path / "target").resumed == 2
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == before


def test_a_file_that_is_gone_is_written_again(instruct, tmp_path, monkeypatch):
    interrupted(monkeypatch, instruct, tmp_path / "target")
    (tmp_path / "target" / "model-00001-of-00005.safetensors").unlink()
    assert run(instruct, tmp_path / "target").resumed == 1
    assert tensors(tmp_path / "target") == tensors(instruct)


def test_another_conversion_does_not_go_on_there(instruct, tmp_path, monkeypatch):
    interrupted(monkeypatch, instruct, tmp_path / "target")
    with pytest.raises(InputError, match="differs in to, so finish that one or remove"):
        run(instruct, tmp_path / "target", "orbax")
    with pytest.raises(InputError, match="differs in weights"):
        run(instruct, tmp_path / "target", weights="bf16")
    shutil.copytree(instruct, tmp_path / "moved")
    with pytest.raises(InputError, match="differs in source and content"):
        run(tmp_path / "moved", tmp_path / "target")
    (tmp_path / "target" / ".incomplete").write_text("?\n")
    with pytest.raises(InputError, match="cannot be understood"):
        run(instruct, tmp_path / "target")


def test_a_source_that_changed_does_not_go_on(tmp_path, monkeypatch):
    source = synthetic(tmp_path / "model", small_config(layers=(WINDOW,)))
    interrupted(monkeypatch, source, tmp_path / "target")
    rewrite(source, lambda key, dtype, array: (dtype, array))
    with pytest.raises(InputError, match="differs in content"):
        run(source, tmp_path / "target")


@pytest.mark.parametrize("to", ["official", "orbax"])
def test_a_disk_that_fills_up_leaves_a_conversion_that_goes_on(instruct, tmp_path, monkeypatch, to):
    run(instruct, tmp_path / "whole", to)
    with monkeypatch.context() as patch:
        fail_when_full(patch, to)
        with pytest.raises(InputError, match="No space left on device; .* goes on where it stop"):
            run(instruct, tmp_path / "target", to)
    assert ".incomplete" in files(tmp_path / "target")
    run(instruct, tmp_path / "target", to)
    assert files(tmp_path / "target") == files(tmp_path / "whole")


def fail_when_full(patch, to):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if to == "orbax":
        import orbax.checkpoint as ocp

        def save(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

        patch.setattr(ocp.PyTreeCheckpointHandler, "save", save)
        return
    calls, real = [], os.pwrite

    def pwrite(*args):
        calls.append(args)
        if len(calls) > 100:
            raise full
        return real(*args)

    patch.setattr(os, "pwrite", pwrite)
