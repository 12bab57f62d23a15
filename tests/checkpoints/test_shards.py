"""Loading onto a mesh of eight devices: the same numbers, in parts, and no byte too many."""

import math
import os

import jax
import numpy as np
import pytest

from tests.support.checkpoints import small_config, synthetic
from v4jax.checkpoints import load as checkpoint
from v4jax.checkpoints.convert import convert
from v4jax.errors import InputError
from v4jax.files import regions
from v4jax.model.sharded import variable_shardings
from v4jax.quant import QTensor
from v4jax.sharding.mesh import make_mesh
from v4jax.sharding.rules import STRATEGIES, Layout

FLOAT = ("train", dict(fsdp=2, expert=2, tensor=2))
# The tiny model's matrices are single FP8 blocks, which only experts divide.
STORED = [("prefill", dict(fsdp=2, expert=4)), ("decode", dict(data=2, expert=2, sequence=2))]
CASES = [(*case, "stored") for case in STORED] + [(*FLOAT, "float32"), (*FLOAT, "bf16")]


def layout_on(strategy, **sizes):
    return Layout(make_mesh(**sizes), STRATEGIES[strategy])


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return synthetic(tmp_path_factory.mktemp("load") / "official")


@pytest.fixture(scope="module")
def orbax(official, tmp_path_factory):
    target = str(tmp_path_factory.mktemp("load") / "orbax")
    convert(official, target, "orbax", progress=False)
    return target


@pytest.fixture
def bytes_read(monkeypatch):
    """Bytes of weights read so far: `sum(bytes_read)`."""
    counts = []
    real = os.preadv

    def preadv(fd, buffers, offset):
        counts.append(real(fd, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(regions.os, "preadv", preadv)
    return counts


def same(ours, theirs):
    def check(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))

    jax.tree.map(check, ours, theirs)


def check_placed(model, variables):
    def check(sharding, leaf):
        for part in (leaf.values, leaf.scales) if isinstance(leaf, QTensor) else (leaf,):
            assert part.sharding == sharding

    jax.tree.map(check, variable_shardings(model), variables)


@pytest.mark.parametrize("strategy, sizes, weights", CASES)
def test_official(official, strategy, sizes, weights):
    model, variables = checkpoint.load(
        official, weights=weights, shards=layout_on(strategy, **sizes)
    )
    check_placed(model, variables)
    same(variables, checkpoint.load(official, weights=weights)[1])


@pytest.mark.parametrize("strategy, sizes, weights", CASES[::2])
def test_orbax(orbax, strategy, sizes, weights):
    model, variables = checkpoint.load(orbax, weights=weights, shards=layout_on(strategy, **sizes))
    check_placed(model, variables)
    same(variables, checkpoint.load(orbax, weights=weights)[1])


@pytest.mark.parametrize("kind", ("official", "orbax"))
def test_no_byte_is_read_twice(kind, bytes_read, request):
    """All eight devices are this process's: the whole checkpoint once, whatever is replicated."""
    path = request.getfixturevalue(kind)
    with checkpoint.open_checkpoint(path) as source:
        total = sum(spec.nbytes for specs in source.items.values() for spec in specs)
    checkpoint.load(path, shards=layout_on("prefill", fsdp=2, expert=4))
    assert sum(bytes_read) == total


@pytest.mark.parametrize(
    "shape, region",
    [
        ((6, 5, 4), ((1, 3), (0, 5), (0, 4))),
        ((6, 5, 4), ((1, 3), (2, 4), (0, 4))),
        ((6, 5, 4), ((5, 6), (0, 5), (1, 2))),
        ((6, 5, 4), ((0, 6), (0, 5), (0, 4))),
        ((6, 5, 4), ((2, 2), (0, 5), (0, 4))),
        ((7,), ((3, 5),)),
        ((), ()),
    ],
)
def test_regions(shape, region, tmp_path, bytes_read):
    array = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    path = tmp_path / "array"
    path.write_bytes(b"head" + array.tobytes())
    out = np.empty(regions.shape_of(region), np.int32)
    with path.open("rb") as file:
        regions.read_region(file.fileno(), 4, shape, region, out)
    np.testing.assert_array_equal(out, array[regions.slices(region)])
    assert sum(bytes_read) == out.nbytes


def test_a_file_that_ends_early(tmp_path):
    path = tmp_path / "array"
    path.write_bytes(bytes(8))
    with path.open("rb") as file, pytest.raises(EOFError):
        regions.read_region(file.fileno(), 0, (3,), ((0, 3),), np.empty(3, np.int32))


def test_a_mesh_that_does_not_divide(official):
    with pytest.raises(InputError, match="expert has size .* mesh axes"):
        config = small_config(n_routed_experts=6)
        path = official + "-odd"
        checkpoint.load(synthetic(path, config), shards=layout_on("prefill", fsdp=2, expert=4))


def test_a_damaged_zarr_file(orbax, tmp_path):
    import shutil

    copy = shutil.copytree(orbax, tmp_path / "copy")
    folder = copy / "items" / "embed" / "params.embed.weight"
    chunk = next(path for path in folder.iterdir() if path.name != ".zarray")
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(InputError, match="embed.weight.* bytes; expected"):
        checkpoint.load(copy, shards=layout_on("prefill", expert=8))


def test_blocks_that_the_mesh_cuts(official):
    """Scales of 128 x 128 blocks: a mesh may not cut one."""
    with pytest.raises(InputError, match="scales .* cannot be spread .*choose a mesh"):
        checkpoint.load(official, shards=layout_on("train", fsdp=8))
