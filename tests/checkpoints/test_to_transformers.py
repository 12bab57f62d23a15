"""Conversions to transformers' form and back: bit for bit, or said what is not the same."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
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
from v4jax.checkpoints.convert import convert
from v4jax.checkpoints.load import load_variables
from v4jax.cli import main as cli
from v4jax.config import CSA, FULL, HCA, WINDOW, with_hash_routing
from v4jax.errors import InputError
from v4jax.files.safetensors import INDEX_NAME
from v4jax.hf.tensors import transformers_key

LAYERS = with_hash_routing((WINDOW, CSA, HCA), 1)
PLAIN = {"mtp_layers": (), "quantization": None, "expert_dtype": None}


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """FP8, FP4 and an MTP block, as the instruct release is stored; not to be changed."""
    directory = tmp_path_factory.mktemp("instruct") / "model"
    synthetic(directory, small_config(layers=LAYERS))
    (directory / "tokenizer.json").write_text('{"model": {}}')
    (directory / "generation_config.json").write_text('{"temperature": 0.6}')
    return directory


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def plain(request, tmp_path_factory):
    """Three layers that are not quantised, without MTP; not to be changed."""
    directory = tmp_path_factory.mktemp(request.param) / "model"
    synthetic(directory, small_config(layers=LAYERS, dtype=request.param, **PLAIN))
    return directory


def run(source, target, to="transformers", weights="stored", verify=False):
    convert(source, target, to, weights, verify, progress=False)
    return target


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def without_mtp(variables):
    return {
        kind: {name: leaf for name, leaf in leaves.items() if not name.startswith("mtp_")}
        for kind, leaves in variables.items()
    }


# There and back


def test_there_and_back_from_each_of_the_three(plain, tmp_path):
    """official, Orbax and transformers: whichever way is taken, no byte of a tensor changes."""
    first = run(plain, tmp_path / "first")
    config, expected = load_variables(plain)
    found, variables = load_variables(first)
    assert_same(variables, expected)
    assert found.dtype == config.dtype and found.layers == config.layers
    stored = tensors(plain)
    assert tensors(first) == {transformers_key(key): stored[key] for key in stored}
    assert tensors(run(first, tmp_path / "official", "official")) == stored
    assert files(run(first, tmp_path / "again")) == files(first)
    orbax = run(first, tmp_path / "orbax", "orbax")
    assert files(run(orbax, tmp_path / "from_orbax")) == files(first)
    assert tensors(run(orbax, tmp_path / "official_from_orbax", "official")) == stored


def test_the_index_names_every_tensor(plain, tmp_path):
    run(plain, tmp_path / "target")
    index = json.loads((tmp_path / "target" / INDEX_NAME).read_text())
    stored = tensors(tmp_path / "target")
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(len(raw) for _, _, raw in stored.values())
    assert {f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)} == set(
        index["weight_map"].values()
    )


def test_floats_of_two_kinds_stay_as_they_are(plain, tmp_path):
    """Each tensor keeps its own type, not that of the config."""
    source = shutil.copytree(plain, tmp_path / "source")
    rewrite(source, lambda key, dtype, array: _widened(key, dtype, array))
    run(source, tmp_path / "target", verify=True)
    assert tensors(run(tmp_path / "target", tmp_path / "back", "official")) == tensors(source)


def _widened(key, dtype, array):
    wider = "norm" in key or key.endswith("layers.1.attn.wkv.weight")
    return ("F32", array.astype(np.float32)) if wider else (dtype, array)


@pytest.mark.parametrize("original", [True, False])
def test_what_transformers_saved_is_written_as_transformers_would(tmp_path, original):
    model = transformers_model()
    model.save_pretrained(tmp_path / "expected")
    model.save_pretrained(tmp_path / "source", save_original_format=original)
    run(tmp_path / "source", tmp_path / "target")
    assert tensors(tmp_path / "target") == tensors(tmp_path / "expected")
    run(tmp_path / "source", tmp_path / "official", "official")
    run(tmp_path / "official", tmp_path / "again")
    assert tensors(tmp_path / "again") == tensors(tmp_path / "expected")


# What transformers has no place for


@pytest.mark.parametrize("weights", ["stored", "bf16", "float32"])
def test_quantised_weights_become_numbers(instruct, tmp_path, weights, caplog):
    run(instruct, tmp_path / "target", weights=weights, verify=True)
    expanded = "bf16" if weights == "stored" else weights
    config, expected = load_variables(instruct, expanded)
    found, variables = load_variables(tmp_path / "target")
    assert_same(variables, without_mtp(expected))
    assert found.dtype == {"bf16": "bfloat16", "float32": "float32"}[expanded]
    assert (found.quantization, found.expert_dtype, found.mtp_layers) == (None, None, ())
    said = " / ".join(record.getMessage() for record in caplog.records)
    assert "tensors of mtp.0 are left out: transformers has no MTP" in said
    note = "matrices are written in bfloat16, as transformers saves no quantised ones: the numbers"
    assert (note in said) == (weights == "stored")
    # The way back gives what the official form of those numbers is.
    back = tensors(run(tmp_path / "target", tmp_path / "back", "official"))
    official = tensors(run(instruct, tmp_path / "official", "official", expanded))
    assert back == {key: value for key, value in official.items() if not key.startswith("mtp.")}


def test_float32_scales_are_rounded_and_that_is_said(tmp_path, caplog):
    source = synthetic(tmp_path / "model", small_config("flash_base_tiny", layers=(WINDOW,)))
    run(source, tmp_path / "target")
    assert "each number is rounded once, and the way back does not" in caplog.text
    assert_same(
        load_variables(tmp_path / "target")[1], without_mtp(load_variables(source, "bf16")[1])
    )


def test_draft_blocks_are_left_out_and_named(tmp_path, caplog):
    source = synthetic(tmp_path / "model", small_config(layers=(WINDOW,), mtp_layers=()))
    without = load_variables(run(source, tmp_path / "without"))[1]
    added = add_drafts(source)
    run(source, tmp_path / "target", verify=True)
    assert f"{len(added)} tensors of mtp.0 to mtp.2 are left out" in caplog.text
    assert_same(load_variables(tmp_path / "target")[1], without)


def test_a_model_that_transformers_lacks_leaves_nothing_behind(tmp_path):
    source = synthetic(tmp_path / "model", small_config(layers=(WINDOW, FULL), mtp_layers=()))
    with pytest.raises(InputError, match="model: transformers' .* layer 1 has full attention"):
        run(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


# Beside the weights


def test_what_lies_beside_the_weights_is_kept(instruct, tmp_path):
    source = shutil.copytree(instruct, tmp_path / "source")
    change_config(source, transformers_version="4.0", attn_implementation="eager")
    run(source, tmp_path / "target")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "target" / name).read_text() == (source / name).read_text()
    keys = json.loads((tmp_path / "target" / "config.json").read_text())
    assert keys["transformers_version"] == "4.0" and "attn_implementation" not in keys
    assert keys["layer_types"][1:] == [
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    ]


# Verified


def test_verify_finds_one_bit(instruct, tmp_path):
    run(instruct, tmp_path / "target")
    assert convert(instruct, tmp_path / "target", "transformers", "stored", True).done == "compared"
    shard = tmp_path / "target" / "model-00003-of-00005.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(InputError, match="layers.1.* differs from the source in 1 of"):
        run(instruct, tmp_path / "target", verify=True)


@pytest.mark.slow  # two processes that import all of it
def test_memory_does_not_grow_with_the_layers(tmp_path):
    """Twelve more layers, 13 MB each in bf16, take the room of three at most."""
    grown = {layers: _peak(tmp_path / str(layers), layers) for layers in (6, 18)}
    assert grown[18] - grown[6] < 40e6, grown


PEAK = """
import resource, sys
from v4jax.checkpoints.convert import convert
convert(sys.argv[1], sys.argv[2] + "/target", "transformers", progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def _peak(directory, layers):
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 8}
    config = small_config(layers=(WINDOW,) * layers, mtp_layers=(), **sizes)
    source = synthetic(directory / "model", config)
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PEAK, source, str(directory)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root},
    )
    return int(done.stdout)


# The command line


def test_the_command(instruct, tmp_path, capfd, caplog):
    arguments = ["--source", instruct, "--target", tmp_path / "t", "--to", "transformers"]
    assert cli.main(["v4jax", "convert", *map(str, arguments), "--verify"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("converted ") and out.count("\n") == 1
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "saves no quantised ones" in said[0] and "are left out" in said[1]
    assert cli.main(["v4jax", "inspect", str(tmp_path / "t"), "--check"]) == 0
