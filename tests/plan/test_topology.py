"""Slices by name, what is said of unknown ones, and what a compiler that is missing asks for."""

import importlib.util

import pytest

from tests.support import aot
from v4jax import chips
from v4jax.errors import InputError
from v4jax.plan import topology


@pytest.mark.parametrize(
    "name, count", [("v5p:2x2x1", 4), ("v5e:8x16", 128), ("tpu7x:2x2x2", 16), ("h100:2x8", 16)]
)
def test_count_of_devices(name, count):
    assert topology.parse(name).count == count


@aot.needs_libtpu
@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:2x2x4", "v6e:2x4", "tpu7x:2x2x1"])
def test_libtpu_describes_as_many(name):
    found = topology.parse(name)
    assert len(found.devices) == found.count


@aot.needs_cuda
def test_the_cuda_plugin_describes_as_many():
    found = topology.parse("h100:2x8")
    assert len(found.devices) == 16


@aot.needs_libtpu
@aot.needs_cuda
@pytest.mark.parametrize("chip", chips.CHIPS)
def test_a_device_is_known_by_what_jax_calls_it(chip):
    """MFU and block sizes go by that name: of one device, half a chip on tpu7x."""
    kind = topology.parse(aot.SLICES[chip]).devices[0].device_kind
    assert chips.named(kind) == chip
    assert chips.peak_flops(kind) == chips.CHIPS[chip].flops


@aot.needs_libtpu
def test_every_known_tpu_slice_can_be_described():
    for chip in ("v5e", "v5p", "v6e", "tpu7x"):
        for found in topology.slices(chip)[-3:]:
            assert len(found.devices) == found.count


@pytest.mark.parametrize("name", ["v5p", "v5p:3x3x3", "v9:2x2", "h100:8", ""])
def test_an_unknown_topology_lists_the_known(name):
    with pytest.raises(InputError, match="v5p: 2x2x1 .*h100: 1x8") as error:
        topology.parse(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", ["v5p:2x2x1", "h100:1x8"])
def test_a_missing_compiler_names_the_extra(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e '.*\[aot\]'"):
        topology.parse(name).devices  # noqa: B018 (asked for its error)


def test_slices_grow():
    counts = [found.count for found in topology.slices("v5p")]
    assert counts == sorted(counts) and counts[0] == 4
