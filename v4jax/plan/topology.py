"""Accelerators by name: what one device can do, and slices described without having them.

Sources of the figures: cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x: peak compute, memory,
bidirectional interconnect and its ports) and NVIDIA's H100 SXM5 data sheet. A TPU's memory is what
libtpu says a program may use; a tpu7x chip is two devices, each with half of it. No latency is
published: those here are assumptions, small beside the bytes in all but a decode step.
"""

import dataclasses
import functools
import importlib.util
import math
from typing import Any

from v4jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator; every figure is of one JAX device.

    Attributes:
      memory: bytes that a program may use.
      flops: dense bf16 operations a second.
      bandwidth: bytes a second of its memory.
      link: bytes a second that leave it along one dimension of its torus, both ways together; of a
        GPU, to the others of its node.
      latency: seconds that a hop to a neighbour takes.
      torus: dimensions of the torus; 0 for a switch.
      per_chip: devices of one chip.
      node: devices joined by `link`, and `outside`: bytes a second to other nodes (0: no nodes).
      slices: shapes that can be had.
    """

    platform: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    latency: float
    torus: int
    slices: tuple[str, ...]
    per_chip: int = 1
    node: int = 0
    outside: float = 0.0


def _slices(text):
    return tuple(text.split())


_SQUARES = _slices("2x2 2x4 4x4 4x8 8x8 8x16 16x16")
_CUBES = _slices("2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24")
_NODES = tuple(f"{n}x8" for n in (1, 2, 4, 8, 16, 32, 64, 128, 256))
_HOP = 1e-6

CHIPS = {
    "v5e": Chip("tpu", int(15.75 * GIB), 197e12, 859e9, 100e9, _HOP, 2, _SQUARES),
    "v5p": Chip("tpu", int(95.74 * GIB), 459e12, 2765e9, 200e9, _HOP, 3, _CUBES),
    "v6e": Chip("tpu", int(31.25 * GIB), 918e12, 1638e9, 200e9, _HOP, 2, _SQUARES),
    "tpu7x": Chip(
        "tpu", int(94.75 * GIB), 2307e12 / 2, 7380e9 / 2, 100e9, _HOP, 3, _CUBES, per_chip=2
    ),
    # NVLink 900 GB/s both ways; one 400 Gb/s adapter a GPU to other nodes.
    "h100": Chip("cuda", 84929347584, 989e12, 3352e9, 450e9, 5e-6, 0, _NODES, node=8, outside=50e9),
}

# What XLA:GPU and ptxas ask of a device, for an H100 SXM5.
_H100 = """
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

_COMPILERS = {
    "tpu": ("libtpu", ("libtpu",)),
    "cuda": ("JAX's CUDA plugin", ("jax_cuda13_plugin", "jax_cuda12_plugin")),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its name as on the command line, kind of chip and number of devices.

    A smaller count stands for its first devices.
    """

    name: str
    chip: Chip
    count: int

    @functools.cached_property
    def devices(self) -> list[Any]:
        """Described devices, which programs can be compiled for and not run on.

        Raises:
          InputError: the platform's compiler is not installed.
        """
        _check_compiler(self.name, self.chip.platform)
        from jax.experimental import topologies

        shape = self.name.partition(":")[2]
        if self.chip.platform == "tpu":
            found = topologies.get_topology_desc(platform="tpu", topology_name=self.name)
            return found.devices[: self.count]
        return topologies.get_topology_desc(
            platform="cuda", topology=f"1x{shape}", target_config=_H100.strip()
        ).devices


def parse(name: str) -> Topology:
    """`v5p:4x4x4` as a topology.

    Raises:
      InputError: not one that we know; the message lists those.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or shape not in CHIPS[kind].slices:
        known = "; ".join(f"{kind}: {' '.join(chip.slices)}" for kind, chip in CHIPS.items())
        raise InputError(
            f"topology {name!r} is unknown; expected CHIP:SHAPE (such as v5p:4x4x4), of {known}"
        )
    chip = CHIPS[kind]
    return Topology(name, chip, chip.per_chip * math.prod(map(int, shape.split("x"))))


def slices(kind: str) -> list[Topology]:
    """All slices of a kind of chip, the smallest first."""
    return [parse(f"{kind}:{shape}") for shape in CHIPS[kind].slices]


def _check_compiler(name, platform):
    package, modules = _COMPILERS[platform]
    if not any(importlib.util.find_spec(module) for module in modules):
        raise InputError(
            f"topology {name} needs {package} to compile for it, which is not installed; "
            "pip install 'v4jax[aot]'"
        )
