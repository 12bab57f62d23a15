"""Conversions: byte for byte there and back, and refused where they cannot work."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import (
    add_drafts,
    change_config,
    files,
    rewrite,
    small_config,
    synthetic,
    tensors,
    transformers_model,
)
from v4jax.checkpoints import convert as convert_module
from v4jax.checkpoints.convert import convert
from v4jax.checkpoints.journal import Journal
from v4jax.checkpoints.load import load_variables
from v4jax.cli import main as cli
from v4jax.config import CSA, WINDOW, with_hash_routing
from v4jax.errors import InputError
from v4jax.files.safetensors import NUMPY_DTYPES


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """A checkpoint as the instruct release is stored, with a tokenizer; not to be changed."""
    directory = tmp_path_factory.mktemp("instruct") / "model"
    synthetic(directory, small_config(layers=with_hash_routing((WINDOW, CSA), 1)))
    (directory / "tokenizer.json").write_text('{"model": {}}')
    (directory / "generation_config.json").write_text("{}")
    change_config(directory, dspark_note="kept", transformers_version="4.0")
    return directory


def run(source, target, to="official", weights="stored", verify=False):
    return convert(source, target, to, weights, verify, progress=False)


def config_of(directory):
    return json.loads((Path(directory) / "config.json").read_text())


# There and back


def assert_round_trip(source, tmp_path):
    """official -> Orbax -> official, and official -> official: no byte of a tensor changes."""
    stored = tensors(source)
    report = run(source, tmp_path / "orbax", "orbax")
    assert (report.tensors, report.nbytes) == (len(stored), sum(len(v[2]) for v in stored.values()))
    run(tmp_path / "orbax", tmp_path / "back")
    run(source, tmp_path / "copy")
    assert tensors(tmp_path / "back") == tensors(tmp_path / "copy") == stored
    assert files(tmp_path / "back") == files(tmp_path / "copy")
    assert (tmp_path / "back" / "config.json").read_bytes() == (
        Path(source) / "config.json"
    ).read_bytes()
    for target in ("orbax", "back"):
        assert run(source, tmp_path / target, verify=True).done == "compared"


@pytest.mark.parametrize("folder", ["native", "float32"])
def test_golden_round_trip(golden, tmp_path, folder):
    assert_round_trip(golden / folder, tmp_path)


def test_base_round_trip(tmp_path):
    layers = with_hash_routing((WINDOW, CSA), 1)
    source = synthetic(tmp_path / "model", small_config("flash_base_tiny", layers=layers))
    assert_round_trip(source, tmp_path)


def test_draft_round_trip(tmp_path):
    source = synthetic(tmp_path / "model", small_config(layers=(WINDOW,), mtp_layers=()))
    add_drafts(source)
    assert_round_trip(source, tmp_path)
    assert (tmp_path / "orbax" / "items" / "carried_2").is_dir()


def test_what_lies_beside_the_weights_is_kept(instruct, tmp_path):
    run(instruct, tmp_path / "orbax", "orbax")
    run(tmp_path / "orbax", tmp_path / "back")
    for target in ("orbax", "back"):
        assert config_of(tmp_path / target) == config_of(instruct)
        for name in ("tokenizer.json", "generation_config.json"):
            assert (tmp_path / target / name).read_text() == (instruct / name).read_text()
    run(instruct, tmp_path / "bf16", weights="bf16")
    assert config_of(tmp_path / "bf16")["transformers_version"] == "4.0"
    assert (tmp_path / "bf16" / "tokenizer.json").exists()


def test_orbax_files_are_the_same_every_time(instruct, tmp_path):
    run(instruct, tmp_path / "one", "orbax")
    run(instruct, tmp_path / "two", "orbax")
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize("weights", ["bf16", "float32"])
def test_expanded_checkpoints(golden, tmp_path, weights):
    """Both targets hold what loading with the same weights gives, and are loaded as they are."""
    source = golden / "native"
    config, expected = load_variables(source, weights)
    for to in ("official", "orbax"):
        run(source, tmp_path / to, to, weights)
        found, variables = load_variables(tmp_path / to)
        assert found.quantization is None and found.expert_dtype is None
        assert found.dtype == {"bf16": "bfloat16", "float32": "float32"}[weights]
        assert found.layers == config.layers and found.extra == config.extra
        leaves = zip(leaves_of(expected), leaves_of(variables), strict=True)
        for left, right in leaves:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
        assert run(source, tmp_path / to, to, weights, verify=True).done == "compared"
    run(tmp_path / "orbax", tmp_path / "back")
    assert tensors(tmp_path / "back") == tensors(tmp_path / "official")
    dtype = {"bf16": "BF16", "float32": "F32"}[weights]
    assert {d for d, _, _ in tensors(tmp_path / "back").values()} == {dtype, "F32", "I64"}


def leaves_of(tree):
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("to", ["official", "orbax"])
def test_from_transformers(tmp_path, to):
    transformers_model().save_pretrained(tmp_path / "source")
    run(tmp_path / "source", tmp_path / "target", to)
    _, expected = load_variables(tmp_path / "source")
    config, variables = load_variables(tmp_path / "target")
    for left, right in zip(leaves_of(expected), leaves_of(variables), strict=True):
        np.testing.assert_array_equal(left, right)
    assert "layer_types" not in config_of(tmp_path / "target")
    if to == "official":
        stored = tensors(tmp_path / "source")
        for key, tensor in tensors(tmp_path / "target").items():
            theirs = {"embed.weight": "model.embed_tokens.weight", "head.weight": "head.weight"}
            theirs = theirs.get(key, "model." + key.replace(".kv_norm.", ".norm."))
            assert stored[theirs.replace("model.hc_head_", "model.hc_head.hc_")] == tensor
    assert config.mtp_layers == ()


# Refused


def test_targets_that_cannot_be_used(instruct, tmp_path):
    with pytest.raises(InputError, match="is source and target"):
        run(instruct, instruct)
    os.symlink(instruct, tmp_path / "link")
    with pytest.raises(InputError, match="is source and target"):
        run(instruct, tmp_path / "link")
    with pytest.raises(InputError, match="lies inside the source"):
        run(instruct, instruct / "below")
    with pytest.raises(InputError, match="the source lies inside it"):
        run(instruct, instruct.parent)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; expected a new directory"):
        run(instruct, tmp_path / "file")
    with pytest.raises(InputError, match="Not a directory"):
        run(instruct, tmp_path / "file" / "below")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty; choose a new directory"):
        run(instruct, tmp_path / "full")
    assert files(tmp_path / "full") == {"notes.txt": b"mine"}
    with pytest.raises(InputError, match="to is 'gguf'"):
        run(instruct, tmp_path / "x", "gguf")
    with pytest.raises(InputError, match="weights is 'fp8'"):
        run(instruct, tmp_path / "x", weights="fp8")
    assert not (tmp_path / "x").exists()


def test_a_finished_target_is_not_written_again(instruct, tmp_path):
    run(instruct, tmp_path / "target")
    before = files(tmp_path / "target")
    with pytest.raises(InputError, match="is not empty"):
        run(instruct, tmp_path / "target")
    assert files(tmp_path / "target") == before


def test_a_target_that_may_not_be_written(instruct, tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("v4jax.checkpoints.journal.os.makedirs", refuse)
    with pytest.raises(InputError, match="target: Permission denied"):
        run(instruct, tmp_path / "target")


def test_a_full_disk_is_refused_before_anything_is_written(instruct, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(InputError, match="needs [0-9,]+ bytes and 1,000,000 are free"):
        run(instruct, tmp_path / "deep" / "target")
    assert not (tmp_path / "deep").exists()


def test_a_damaged_source_is_refused_before_the_target_is_made(instruct, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(instruct, source)
    shard = source / "model-00002-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated"):
        run(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("to", ["official", "orbax"])
def test_a_nan_scale_is_not_converted(instruct, tmp_path, to):
    source = tmp_path / "source"
    shutil.copytree(instruct, source)

    def spoil(key, dtype, array):
        if key == "layers.1.ffn.experts.1.w3.scale":
            array = np.full(array.shape, 255, np.uint8).view(NUMPY_DTYPES[dtype])
        return dtype, array

    rewrite(source, spoil)
    with pytest.raises(InputError, match="layers.1.ffn.experts.1.w3.scale: 64 of 64 .* NaN"):
        run(source, tmp_path / "target", to)


# Verified


def flip(path, offset=-3):
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def test_verify_finds_one_bit(instruct, tmp_path):
    run(instruct, tmp_path / "official")
    run(instruct, tmp_path / "orbax", "orbax")
    assert run(instruct, tmp_path / "official", verify=True).done == "compared"
    flip(tmp_path / "official" / "model-00003-of-00005.safetensors")
    with pytest.raises(InputError, match="layers.1.* differs from the source in 1 of"):
        run(instruct, tmp_path / "official", verify=True)
    leaf = tmp_path / "orbax" / "items" / "layer_001" / "params.ffn.experts.w2.values"
    flip(next(path for path in leaf.iterdir() if path.name != ".zarray"))
    with pytest.raises(InputError, match="layers.1.ffn.experts.7.w2.weight differs"):
        run(instruct, tmp_path / "orbax", "orbax", verify=True)


def test_verify_names_what_is_stored_otherwise(instruct, tmp_path):
    run(instruct, tmp_path / "target", weights="bf16")
    with pytest.raises(InputError, match="--weights=stored"):
        run(instruct, tmp_path / "target", verify=True)


def test_verify_converts_first_if_there_is_nothing_yet(instruct, tmp_path):
    assert run(instruct, tmp_path / "target", "orbax", verify=True).done == "converted"
    before = files(tmp_path / "target")
    assert run(instruct, tmp_path / "target", "orbax", verify=True).done == "compared"
    assert files(tmp_path / "target") == before


def test_what_does_not_read_back_is_not_called_whole(instruct, tmp_path, monkeypatch):
    def add(self, item, checksums, real=Journal.add):
        real(self, item, {key: value ^ 1 for key, value in checksums.items()})

    monkeypatch.setattr(Journal, "add", add)
    with pytest.raises(InputError, match="does not read back as it was written"):
        run(instruct, tmp_path / "target")
    assert not (tmp_path / "target" / "config.json").exists()


# The command line


def command(*arguments):
    return cli.main(["v4jax", "convert", *map(str, arguments)])


def test_the_command(instruct, tmp_path, capfd):
    status = command("--source", instruct, "--target", tmp_path / "t", "--to", "orbax", "--verify")
    out, err = capfd.readouterr()
    assert status == 0
    assert out.startswith("converted ") and out.count("\n") == 1
    assert "tensors" in out and "MB/s" in out and "bytes" in out
    assert err == ""  # no bar is drawn into a pipe
    assert run(instruct, tmp_path / "t", "orbax", verify=True).done == "compared"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--source is missing"),
        (["--source", "{source}"], "--target is missing"),
        (["--source", "{source}", "--target", "{target}"], "--to is missing"),
        (["--source", "{source}", "--target", "{target}", "--to", "gguf"], "transformers or orbax"),
        (["--source", "{target}", "--target", "{target}2", "--to", "orbax"], "no such directory"),
        (["--source", "{source}", "--target", "{source}", "--to", "orbax"], "source and target"),
    ],
)
def test_mistakes_are_one_line_and_status_2(instruct, tmp_path, capfd, arguments, sentence):
    places = {"source": instruct, "target": tmp_path / "target"}
    assert command(*[argument.format(**places) for argument in arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and sentence in err


def test_the_tool_is_the_command(instruct, tmp_path):
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "tools" / "convert_weights.py"), "--source", str(instruct)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "v4jax convert: --target is missing; expected a directory"
