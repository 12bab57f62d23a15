"""`v4jax plan`: what it prints and what it refuses; tiny models, compiled for a v5p."""

import json

import pytest

from tests.kernels import aot
from v4jax.cli.main import main
from v4jax.plan import topology


def plan(capsys, *flags):
    """The exit status, stdout and stderr of a command."""
    status = main(["v4jax", "plan", *flags])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


DECODE = ("--config=flash_tiny", "--mode=decode", "--context=256", "--batch=4")


@pytest.fixture(scope="module")
def decoded():
    """The JSON of a decode step of a tiny model on four chips."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main(
            ["v4jax", "plan", *DECODE, "--topology=v5p:2x2x1", "--mesh=expert=4", "--format=json"]
        )
    return status, json.loads(out.getvalue())


@aot.needs_libtpu
def test_json(decoded):
    status, found = decoded
    assert status == 0 and found["fits"] is True and found["failure"] is None
    keys = {"weights", "optimizer", "cache", "temporaries", "peak", "capacity"}
    assert keys <= found["per_device"].keys()
    assert found["mesh"] == {"data": 1, "fsdp": 1, "expert": 4, "sequence": 1, "tensor": 1}
    assert found["strategy"] == "decode" and found["unknown_loops"] == 0
    assert found["flops"] == pytest.approx(sum(found["flops_parts"].values()))
    terms = [found["seconds"][name] for name in ("compute", "memory", "interconnect")]
    assert found["seconds_estimate"] == max(terms) and min(terms) > 0
    assert found["compile_seconds"] > 0
    assert found["per_device"]["capacity"] == topology.CHIPS["v5p"].memory


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
