"""Block sizes: the table, a tuned file in force, and the tuner itself on tiny sizes."""

import json

import pytest

from v4jax.cli.main import main
from v4jax.kernels import blocks
from v4jax.kernels.bench import tune


def test_a_tuned_file_is_in_force(tmp_path, monkeypatch):
    path = tmp_path / "blocks.json"
    path.write_text(json.dumps({"h100": {"sparse_attention": {"keys": 16}}}))
    monkeypatch.setenv("V4JAX_BLOCKS", str(path))
    assert blocks.blocks("cuda").sparse_attention.keys == 16
    assert blocks.blocks("tpu") == blocks.TABLE["v5p"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"h200": {}}', "unknown chip 'h200'"),
        ('{"h100": {"softmax": {}}}', "unknown operation 'softmax'"),
        ('{"h100": {"sparse_attention": {"key": 1}}}', "key"),
        ("nothing", "no table of block sizes"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path, monkeypatch, text, complaint):
    path = tmp_path / "blocks.json"
    path.write_text(text)
    monkeypatch.setenv("V4JAX_BLOCKS", str(path))
    with pytest.raises(ValueError, match=complaint):
        blocks.blocks("cuda")


def test_sizes_on_trial_end_with_the_trial():
    usual = blocks.blocks("cuda")
    other = blocks.Blocks(hyper_connections=blocks.HyperConnections(tokens=8))
    with blocks.on_trial("h100", other):
        assert blocks.blocks("cuda") == other
    assert blocks.blocks("cuda") == usual


def test_every_candidate_is_a_field_of_its_operation():
    for platform, ops in tune.CANDIDATES.items():
        for op in ops:
            sizes = getattr(blocks.TABLE["v5p"], op)
            assert all(hasattr(sizes, name) for name in tune.candidates(platform, op)[0])


def test_the_command_writes_a_table_that_can_be_read(tmp_path, capsys):
    path = tmp_path / "blocks.json"
    arguments = ["--tiny", "--op=hyper_connections", "--most=2", f"--out={path}"]
    assert main(["v4jax", "tune", *arguments]) == 0
    out, err = capsys.readouterr()
    assert "Error" not in err
    assert out == f"2 of 2 candidates ran on h100: {path}\n"
    assert blocks.read(path)["h100"].hyper_connections.tokens == 16


def test_a_cpu_is_nothing_to_tune_on(tmp_path, capsys):
    assert main(["v4jax", "tune", f"--out={tmp_path / 'x'}"]) == 2
    assert "measures on a TPU or GPU" in capsys.readouterr().err
