"""The report of a plan whose every number is made up, and the search on counts by hand."""

import dataclasses
import json

import pytest

import v4jax
from v4jax.errors import InputError
from v4jax.plan import plan as plan_lib
from v4jax.plan import report, search, topology
from v4jax.plan.hlo import Collective
from v4jax.plan.job import Job, abstract_layout
from v4jax.plan.plan import Compiled, Plan

GB = 10**9
FOUND = [
    Collective("all-gather", 4, 4, ("expert",), 40, 1e6),
    Collective("all-gather", 4, 4, ("expert",), 2, 5e6),
    Collective("all-reduce", 2, 8, ("data",), 1, 1e9),
]


@pytest.fixture
def made_up():
    """A decode step that holds 30 GB and needs 40 at its worst moment."""
    config = v4jax.get_config("flash_tiny")
    job = Job(config, "decode", 256, 8)
    where = topology.parse("v5p:2x2x2")
    sizes = {"data": 2, "fsdp": 1, "expert": 4, "sequence": 1, "tensor": 1}
    counted = plan_lib.count(job, where, abstract_layout(job, sizes))
    arguments = {"weights": 20 * GB, "tokens": 4, "cache": 10 * GB}
    compiled = Compiled(arguments, 30 * GB, 40 * GB, None, FOUND, 0, 12.5, 20.0, 2 * GB)
    return Plan(job, where, sizes, "decode", counted, compiled)


def changed(plan, **compiled):
    return dataclasses.replace(plan, compiled=dataclasses.replace(plan.compiled, **compiled))


def test_json_can_be_dumped_and_adds_up(made_up):
    found = json.loads(json.dumps(report.as_json(made_up)))
    device = found["per_device"]
    assert found["fits"] is True
    assert device["temporaries"] == 40 * GB - 30 * GB - 4
    held = sum(device[kind] for kind in ("weights", "optimizer", "cache", "temporaries"))
    assert held + 4 == device["peak"]


def test_collectives_of_a_kind_stand_together(made_up):
    first, second = report.by_kind(made_up)
    assert first["kind"] == "all-reduce" and first["bytes"] == 1e9
    assert second == {
        "kind": "all-gather", "axes": ["expert"], "group": 4, "count": 42, "bytes": 5e7,
    }  # fmt: skip


def test_time_is_of_the_compiled_exchanges(made_up):
    # Over links of 200 GB/s: 1.05 GB, and 43 latencies of a microsecond or more.
    assert 5.25e-3 < made_up.time.interconnect < 5.5e-3
    assert made_up.time.floor == made_up.time.interconnect


def test_text_says_what_is_left(made_up):
    text = report.as_text(made_up, "flash_tiny")
    assert "fits, 62.80 GB (61.1 %) of every device left" in text
    assert "mesh data=2,expert=4" in text and "all-reduce" in text


def test_what_does_not_fit(made_up):
    too_large = changed(made_up, peak=110 * GB)
    assert not too_large.fits and "too much" in report.verdict(too_large)
    refused = changed(made_up, peak=None, argument=None, failure="Ran out of memory")
    assert not refused.fits and "Ran out of memory" in report.verdict(refused)
    assert report.as_json(refused)["per_device"]["temporaries"] is None
    assert "does not fit" in report.as_text(refused, "flash_tiny")
    assert refused.time == refused.counted.time


def test_picture(made_up, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    report.draw(made_up, "flash_tiny", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_shapes_are_all_factorings():
    found = list(search.shapes(8, ("data", "fsdp", "expert")))
    assert len(found) == len({tuple(sizes.values()) for sizes in found}) == 10
    assert all(sizes["data"] * sizes["fsdp"] * sizes["expert"] == 8 for sizes in found)


def test_candidates_fit_and_are_ranked():
    job = Job(v4jax.get_config("flash_tiny"), "decode", 256, 8)
    found = search.candidates(job, topology.parse("v5p:2x2x1"))
    floors = [candidate.counted.time.floor for candidate in found]
    assert floors[0] <= 1.06 * min(floors)


@pytest.mark.parametrize(
    "rows, length, parts", [(64, 8192, 8), (8, 8192, 1), (64, 1024, 2), (64, 512, 1)]
)
def test_microbatches_leave_a_device_as_many_tokens_as_it_can_take(rows, length, parts):
    config = dataclasses.replace(
        v4jax.get_config("flash_tiny"), max_position_embeddings=1 << 20, mtp_layers=()
    )
    job = Job(config, "train", length, rows, "float32")
    sizes = {"data": 8, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 1}
    assert search.microbatches(job, sizes) == parts


def test_nothing_fits():
    config = v4jax.get_config("flash_tiny")
    job = Job(config, "decode", 256, 1 << 30)  # a cache of more than four chips have
    with pytest.raises(InputError, match="no mesh of it holds decode of"):
        search.search(job, [topology.parse("v5p:2x2x1")])
