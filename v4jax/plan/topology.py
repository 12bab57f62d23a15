"""Slices of accelerators by name, described without having them."""

import dataclasses
import functools
import importlib.util
import math
from typing import Any

from v4jax.chips import CHIPS, Chip
from v4jax.errors import InputError
from v4jax.extras import how_to_install

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


def has_compiler(platform: str) -> bool:
    """Whether what compiles for "tpu" or "cuda" is installed."""
    return any(importlib.util.find_spec(module) for module in _COMPILERS[platform][1])


def _check_compiler(name, platform):
    if not has_compiler(platform):
        raise InputError(
            f"topology {name} needs {_COMPILERS[platform][0]} to compile for it, which is not "
            f"installed: {how_to_install('aot')}"
        )
