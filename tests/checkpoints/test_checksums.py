"""Damage to the bytes of our Orbax format: its manifest holds each tensor's CRC-32."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.support.checkpoints import small_config, synthetic
from v4jax.checkpoints.convert import convert
from v4jax.checkpoints.load import load, load_variables, open_checkpoint
from v4jax.cli.main import main
from v4jax.config import CSA, WINDOW, with_hash_routing
from v4jax.errors import ChecksumError, InputError
from v4jax.sharding.mesh import make_mesh
from v4jax.sharding.rules import PREFILL, Layout

LAYERS = with_hash_routing((WINDOW, CSA), 1)
LEAF = "items/layer_001/params.ffn.experts.w2.values"
KEY = "layers.1.ffn.experts.5.w2.weight"


@pytest.fixture(scope="module")
def orbax(tmp_path_factory):
    """Two layers and an MTP block in our Orbax format; not to be changed."""
    folder = tmp_path_factory.mktemp("orbax")
    config = small_config(layers=LAYERS, num_experts_per_tok=2)
    convert(synthetic(folder / "source", config), folder / "model", "orbax", progress=False)
    return str(folder / "model")


@pytest.fixture
def damaged(orbax, tmp_path):
    """One bit of one expert is another."""
    directory = Path(shutil.copytree(orbax, tmp_path / "model"))
    flip(next(p for p in (directory / LEAF).iterdir() if p.name != ".zarray"), 5.5 / 8)
    return str(directory)


def flip(path, where):
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)


def test_one_bit_is_found_by_whoever_reads(damaged, tmp_path):
    sentence = f"the bytes of {KEY} are not those that were written: .* as v4jax.json says"
    for weights in ("stored", "bf16"):
        with pytest.raises(ChecksumError, match=sentence):
            load_variables(damaged, weights)
    with pytest.raises(ChecksumError, match=sentence):
        convert(damaged, tmp_path / "target", "official", progress=False)


def test_one_bit_is_found_on_a_mesh(damaged):
    shards = Layout(make_mesh(expert=8), PREFILL)
    with pytest.raises(ChecksumError, match=KEY):
        load(damaged, shards=shards)


def test_checksums_may_be_left_out(damaged, orbax):
    _, variables = load(damaged, verify=False)
    _, sound = load(orbax)
    differing = jax.tree.map(
        lambda a, b: int(np.sum(np.asarray(a) != np.asarray(b))), variables, sound
    )
    assert sum(jax.tree.leaves(differing)) == 1


def test_check_names_the_tensor_and_goes_on(damaged, capsys):
    flip(next((Path(damaged) / "items/head/params.norm.weight").glob("[0-9]*")), 0.5)
    assert main(["v4jax", "inspect", damaged, "--check"]) == 1
    text = capsys.readouterr().out
    assert "Check: 2 found" in text
    assert f"  {KEY}: the bytes of {KEY} are not those that were written" in text
    assert "  norm.weight: the bytes of norm.weight are not" in text


@pytest.mark.parametrize("value", [None, -1, 2**32, "12", 1.5, True, [1]])
def test_a_nonsense_checksum_is_refused(orbax, tmp_path, value):
    shutil.copytree(orbax, tmp_path / "model")
    path = tmp_path / "model" / "v4jax.json"
    manifest = json.loads(path.read_text())
    manifest["items"]["layer_001"][KEY]["crc32"] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="not a manifest of ours .*crc32"):
        load_variables(tmp_path / "model")


@pytest.mark.slow
def test_every_flipped_byte_is_found(orbax, tmp_path):
    """Random bytes of random arrays: none is loaded as if nothing were wrong."""
    rng = np.random.default_rng(0)
    directory = Path(shutil.copytree(orbax, tmp_path / "model"))
    chunks = [p for p in directory.glob("items/*/*/[0-9]*") if p.stat().st_size]
    for path in rng.choice(chunks, 40):
        before = path.read_bytes()
        flip(path, rng.random())
        with pytest.raises(InputError), open_checkpoint(directory) as source:
            for name, specs in source.items.items():
                with source.open_item(name) as read:
                    for spec in specs:
                        read(spec.key, np.empty(spec.shape, spec.dtype))
        path.write_bytes(before)
