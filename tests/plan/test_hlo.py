"""Collectives of small programs with known counts, on CPU devices and compiled for a TPU."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from tests.support import aot
from v4jax.plan import hlo, topology
from v4jax.sharding.mesh import make_mesh

P = PartitionSpec
ROWS, WIDTH, TRIPS, INNER = 64, 256, 7, 3
SIZES = {"fsdp": 2, "expert": 2, "sequence": 2}
FULL = {"data": 1, **SIZES, "tensor": 1}


def program_local(x_XD, w_KDD):
    """Seven trips of a gathered product, of which each has three of a neighbour's exchange."""

    def inner(x, _):
        return x + lax.ppermute(x, "sequence", [(0, 1), (1, 0)]), None

    def outer(x, w):
        w = lax.all_gather(w, "fsdp", axis=0, tiled=True)
        x = lax.psum(jnp.matmul(x, w, precision="highest"), ("expert", "sequence"))
        x, _ = lax.scan(inner, x, None, length=INNER)
        x = lax.all_to_all(x, "expert", 0, 1, tiled=True).reshape(x.shape)
        part = lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)
        return x + jnp.tile(part, (2, 1)), None

    x_XD, _ = lax.scan(outer, x_XD, w_KDD)
    return x_XD


def compiled(devices):
    mesh = make_mesh(devices, **SIZES)
    axes = ("fsdp", "expert", "sequence")
    specs = (P(axes), P(None, "fsdp"))
    run = jax.shard_map(
        program_local, mesh=mesh, in_specs=specs, out_specs=P(axes), check_vma=False
    )
    shapes = ((8 * ROWS, WIDTH), (TRIPS, WIDTH, WIDTH))
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return jax.jit(run).lower(*arguments).compile().as_text()


@pytest.mark.parametrize(
    "groups, first",
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", [0, 4]),
        ("[2,4]<=[8]", [0, 1, 2, 3]),
        ("[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("{}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("mesh['a'=2,'b'=4] {'b','a'}", [0, 4, 1, 5, 2, 6, 3, 7]),
        ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", [0, 2, 4, 6]),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", [0, 1]),
        ("mesh['a'=8] {'a':(2)2}", [0, 2]),
        ("mesh['a'=2,'b'=4] {'a','b':(1)2}", [0, 2, 4, 6]),
    ],
)
def test_each_way_to_write_groups(groups, first):
    program = f"""HloModule m

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %sum = f32[8]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add
}}
"""
    mesh = {"x": 2, "y": 2, "z": 2}
    [one], _ = hlo.collectives(program, mesh)
    places = np.unravel_index(first, (2, 2, 2))
    axes = tuple(axis for axis, place in zip(mesh, places, strict=True) if len(set(place)) > 1)
    assert (one.group, one.span, one.axes) == (len(first), max(first) + 1, axes)


def test_groups_of_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match="replica_groups=spiral"):
        hlo.collectives(
            "HloModule m\n\nENTRY %main (x: f32[8]) -> f32[8] {\n"
            "  %x = f32[8]{0} parameter(0)\n"
            "  ROOT %y = f32[8]{0} all-reduce(%x), replica_groups=spiral[8], to_apply=%add\n}\n",
            {"x": 8},
        )


def check(text):
    found, unknown = hlo.collectives(text, FULL)
    assert unknown == 0
    rows, weight = 4 * ROWS * WIDTH, 4 * WIDTH * WIDTH
    seen = {(c.kind, c.axes): (c.count, c.bytes) for c in found}
    assert seen == {
        ("all-gather", ("fsdp",)): (TRIPS, weight / 2),
        ("all-reduce", ("expert", "sequence")): (TRIPS, 2 * 3 / 4 * rows),
        ("collective-permute", ("sequence",)): (TRIPS * INNER, rows),
        ("all-to-all", ("expert",)): (TRIPS, rows / 2),
        ("reduce-scatter", ("fsdp",)): (TRIPS, rows / 2),
    }


def test_eight_cpu_devices():
    """In a process of its own, since the number of devices is fixed at the first use of jax."""
    code = (
        "import jax; from tests.plan import test_hlo; "
        "test_hlo.check(test_hlo.compiled(jax.devices()))"
    )
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@aot.needs_libtpu
@pytest.mark.parametrize("name", ["v5p:2x2x2", "v5e:2x4"])
def test_a_tpu(name):
    check(compiled(topology.parse(name).devices))


@aot.needs_cuda
def test_gpus():
    mesh = topology.parse("h100:1x8").devices
    check(compiled(mesh))


@pytest.mark.parametrize(
    "groups, first",
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", [0, 4]),
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=[2,4]<=[2,2,2]T(2,0,1)", [0, 2, 4, 6]),
        ("source_target_pairs={{0,1},{1,0}}", [0, 1]),
        ("channel_id=1", list(range(8))),
    ],
)
def test_groups_in_every_notation(groups, first):
    assert list(hlo._group(groups, 8)) == first


def test_axes_of_a_group():
    mesh = {"data": 1, "fsdp": 2, "expert": 2, "sequence": 2, "tensor": 1}
    assert hlo._axes([0, 4], mesh) == ("fsdp",)
    assert hlo._axes([0, 1, 2, 3], mesh) == ("expert", "sequence")


@pytest.mark.parametrize(
    "shape, size",
    [
        ("bf16[1024,2,512]{2,1,0:T(2,128)(2,1)}", 2 * 1024 * 1024),
        ("(f32[8]{0}, u8[3,5]{1,0})", 32 + 15),
        ("f8e4m3fn[128,128]", 128 * 128),
        ("s4[64]", 32),
        ("pred[]", 1),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert hlo._bytes(shape) == size


@aot.needs_libtpu
def test_a_loop_of_unknown_length_is_told():
    def run(x, n):
        return lax.fori_loop(0, n, lambda _, x: lax.psum(x, "x"), x)

    mesh = jax.sharding.Mesh(np.array(topology.parse("v5p:2x2x1").devices), ("x",))
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
        for shape, dtype in (((128,), jnp.float32), ((), jnp.int32))
    ]
    mapped = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    text = jax.jit(mapped).lower(*arguments).compile().as_text()
    found, unknown = hlo.collectives(text, {"x": 4})
    assert unknown == 1 and [c.count for c in found] == [1]
