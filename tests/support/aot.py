"""Ahead-of-time compilation for chips that are not there: TPUs by libtpu, an H100 by XLA:GPU.

Quick tests compile one forward and one backward pass of each operation for the first TPU and the
H100, and lower the others: what Pallas refuses, it refuses there. tools/run_slow_tests.sh compiles
every case for every chip.
"""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from v4jax.plan import environment, topology

environment.prepare()  # libtpu reads it when it is first asked for a slice

SLICES = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
    "h100": "h100:1x8",
}
TPU_CHIPS = ("v5p", "v6e", "tpu7x")

CHIPS = (*TPU_CHIPS, "h100")


needs_libtpu = pytest.mark.skipif(
    not topology.has_compiler("tpu"), reason="libtpu is not installed (extra 'aot')"
)
needs_cuda = pytest.mark.skipif(
    not topology.has_compiler("cuda"), reason="JAX's CUDA plugin is not installed (extra 'aot')"
)


def rows(*found):
    """Rows of parameters that begin with a chip; one is skipped where its compiler is missing."""
    return [
        pytest.param(*row, marks=needs_cuda if row[0] == "h100" else needs_libtpu) for row in found
    ]


@functools.cache
def one_device(chip: str) -> Mesh:
    """A mesh of one described device."""
    return Mesh(np.array(topology.parse(SLICES[chip]).devices[:1]), ("x",))


def _spec(mesh, leaf):
    if isinstance(leaf, tuple):
        leaf = jax.ShapeDtypeStruct(*leaf)
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec())
    )


def _is_leaf(x):
    """Whether x is (shape, dtype)."""
    shape = x[0] if isinstance(x, tuple) and len(x) == 2 else None
    return isinstance(shape, tuple) and all(isinstance(n, int) for n in shape)


def _lower(mesh, f, specs):
    specs = jax.tree.map(lambda leaf: _spec(mesh, leaf), specs, is_leaf=_is_leaf)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(f).lower(*specs)


def lowers_to_kernels(chip: str, f, *specs) -> bool:
    """Whether `f` lowered for a chip calls a Pallas kernel; nothing is compiled."""
    kernel = "triton" if chip == "h100" else "tpu_custom_call"
    return kernel in _lower(one_device(chip), f, specs).as_text()


def compile_tpu(chip: str, f, *specs, options=None):
    """`f` compiled for one chip; specs are pytrees of (shape, dtype) or ShapeDtypeStruct."""
    return _lower(one_device(chip), f, specs).compile(compiler_options=options)


def compile_h100(f, *specs):
    """`f` compiled for an H100; a register spill in any kernel is an error."""
    options = {
        "xla_gpu_fail_ptx_compilation_on_register_spilling": True,
        "xla_backend_optimization_level": 3,  # tests of programs that run here ask for less
    }
    return _lower(one_device("h100"), f, specs).compile(compiler_options=options)
