"""Ahead-of-time compilation for chips that are not there: TPUs by libtpu, an H100 by XLA:GPU."""

import importlib.util
import os

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TPU_LOG_DIR", "disabled")

import functools

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TPU_TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
TPU_CHIPS = ("v5p", "v6e", "tpu7x")

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def have_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def have_cuda_plugin() -> bool:
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


needs_libtpu = pytest.mark.skipif(not have_libtpu(), reason="libtpu is not installed (extra 'aot')")
needs_cuda = pytest.mark.skipif(
    not have_cuda_plugin(), reason="the jax-cuda13 plugin is not installed (extra 'aot')"
)


@functools.cache
def tpu_mesh(chip: str) -> Mesh:
    """One device of a described TPU topology."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TPU_TOPOLOGIES[chip])
    return Mesh(np.array(topology.devices[:1]), ("x",))


@functools.cache
def h100_mesh() -> Mesh:
    """One described H100."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=H100.strip()
    )
    return Mesh(np.array(topology.devices[:1]), ("x",))


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


def _compile(mesh, f, specs, options=None):
    specs = jax.tree.map(lambda leaf: _spec(mesh, leaf), specs, is_leaf=_is_leaf)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(f).lower(*specs).compile(compiler_options=options)


def compile_tpu(chip: str, f, *specs):
    """`f` compiled for one chip; specs are pytrees of (shape, dtype) or ShapeDtypeStruct."""
    return _compile(tpu_mesh(chip), f, specs)


def compile_h100(f, *specs):
    """`f` compiled for an H100; a register spill in any kernel is an error."""
    options = {
        "xla_gpu_fail_ptx_compilation_on_register_spilling": True,
        "xla_backend_optimization_level": 3,  # tests of programs that run here ask for less
    }
    return _compile(h100_mesh(), f, specs, options)
