"""`v4jax plan`: what it prints and what it refuses; tiny models, compiled for a v5p."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from tests.support import aot
from v4jax.chips import CHIPS
from v4jax.cli.main import main
from v4jax.config import CSA, HCA, with_hash_routing
from v4jax.hf.config import to_hf
from v4jax.named_configs import get_config


def plan(capsys, *flags):
    """The exit status, stdout and stderr of a command."""
    status = main(["v4jax", "plan", *flags])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


_OURS = ("JAX", "TPU", "XLA", "ALLOW_MULTIPLE", "TF_CPP")  # what tests set and a shell does not
SHAPE = ("--mode=decode", "--context=256", "--batch=4")
DECODE = ("--config=flash_tiny", *SHAPE)


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """Status, JSON and stderr of a decode step of a tiny model on four chips, as from a shell."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    layers = with_hash_routing((CSA, HCA), 1)
    config = dataclasses.replace(get_config("flash_tiny"), layers=layers, mtp_layers=())
    path.write_text(json.dumps(to_hf(config)))
    flags = [f"--config={path}", *SHAPE, "--topology=v5p:2x2x1", "--mesh=expert=4", "--format=json"]
    flags += ["--compilation_cache=off"]  # the user's is no place for tests
    words = [sys.executable, "-m", "v4jax.cli.main", "plan", *flags]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    done = subprocess.run(words, env=plain, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr


@aot.needs_libtpu
def test_json(decoded):
    status, found, noise = decoded
    assert noise == ""
    assert status == 0 and found["fits"] is True and found["failure"] is None
    keys = {"weights", "optimizer", "cache", "temporaries", "peak", "capacity"}
    assert keys <= found["per_device"].keys()
    assert found["mesh"] == {"data": 1, "fsdp": 1, "expert": 4, "sequence": 1, "tensor": 1}
    assert found["strategy"] == "decode" and found["unknown_loops"] == 0
    assert found["flops"] == pytest.approx(sum(found["flops_parts"].values()))
    terms = [found["seconds"][name] for name in ("compute", "memory", "interconnect")]
    assert found["seconds_estimate"] == max(terms) and min(terms) > 0
    assert found["compile_seconds"] > 0
    assert found["per_device"]["capacity"] == CHIPS["v5p"].memory


@aot.needs_libtpu
def test_arguments_are_the_hand_count(decoded):
    device = decoded[1]["per_device"]
    hand = device["by_hand"]
    assert device["weights"] == pytest.approx(hand["weights"], rel=0.01)


@aot.needs_libtpu
def test_a_decode_step_gathers_tokens_and_nothing_as_large_as_a_cache(decoded):
    found = decoded[1]
    assert {tuple(row["axes"]) for row in found["collectives"]} == {("expert",)}
    assert sum(row["bytes"] for row in found["collectives"]) < found["per_device"]["cache"]


@pytest.mark.parametrize(
    "flags, said",
    [
        ((), "--topology is missing"),
        (("--topology=v5p:9x9x9",), "is unknown; expected CHIP:SHAPE"),
        (("--topology=v5p:2x2x1", "--mesh=expert=3"), "needs 3 devices and there are 4"),
        (("--topology=v5p:2x2x1", "--mesh=tensor=4"), "mesh axes tensor=4"),
        (("--topology=v5p:2x2x1", "--mesh=pipe=4"), "mesh axis 'pipe' is unknown"),
        (("--topology=v5p:2x2x1", "--mesh=expert=4", "--search"), "drop one"),
        (("--topology=v5p:2x2x1", "--config=flush"), "--config is 'flush'; expected"),
        (("--topology=v5p:2x2x1", "--context=99999999"), "max_position_embeddings"),
    ],
)
def test_bad_input(capsys, flags, said):
    status, out, err = plan(capsys, *DECODE, *flags)
    assert status == 2 and out == "" and said in err
    assert err.count("\n") == 1


@pytest.mark.slow  # 45 s of processor; quick is the same of a TPU, above
@aot.needs_cuda
def test_a_gpu_node(capsys):
    """Many rows, a few of them on each device: tokens gathered, outputs summed and spread."""
    flags = ("--batch=16", "--topology=h100:1x8", "--mesh=data=2,expert=4", "--format=json")
    status, out, _ = plan(capsys, *DECODE, *flags)
    found = json.loads(out)
    assert status == 0 and found["fits"] and found["devices"] == 8
    device = found["per_device"]
    assert device["arguments_by_compiler"] == pytest.approx(device["arguments"], rel=0.01)
    assert {row["kind"] for row in found["collectives"]} == {"all-gather", "reduce-scatter"}


@pytest.mark.slow
@aot.needs_libtpu
def test_a_training_step(capsys):
    """v4jax.train's own step of a tiny model: experts exchanged, parts of weights gathered."""
    status, out, _ = plan(
        capsys,
        "--config=flash_tiny",
        "--mode=train",
        "--context=128",
        "--batch=8",
        "--topology=v5p:2x2x2",
        "--mesh=fsdp=2,expert=4",
        "--format=json",
    )
    found = json.loads(out)
    assert status == 0 and found["microbatches"] == 1 and found["strategy"] == "train"
    device = found["per_device"]
    for kind in ("weights", "optimizer"):
        assert device[kind] == pytest.approx(device["by_hand"][kind], rel=0.01)
    kinds = {row["kind"]: row["axes"] for row in found["collectives"]}
    assert kinds["ragged-all-to-all"] == ["expert"]
    assert "all-gather" in kinds
