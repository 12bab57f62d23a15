"""Accelerators by name: what one device can do.

Sources of the figures: cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x: peak compute, memory,
bidirectional interconnect and its ports) and NVIDIA's H100 SXM5 data sheet. A TPU's memory is what
libtpu says a program may use; a tpu7x chip is two devices, each with half of it. No latency is
published: those here are assumptions, small compared with the bytes in all but a decode step.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator; every figure is of one JAX device.

    Attributes:
      memory: bytes that a program may use.
      flops: dense bf16 operations per second.
      bandwidth: bytes per second of its memory.
      link: bytes per second that leave it along one dimension of its torus, both ways together; of
        a GPU, to the others of its node.
      latency: seconds that a hop to a neighbour takes.
      torus: dimensions of the torus; 0 for a switch.
      per_chip: devices of one chip.
      node: devices joined by `link`, and `outside`: bytes per second to other nodes (0: no nodes).
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

# What JAX calls their devices (`device_kind`).
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
}

# Dense bf16 operations per second of further devices, of which no slices are described.
_OTHERS = {"TPU v4": 275e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}


def named(kind: str) -> str | None:
    """The chip whose devices JAX calls so."""
    return _KINDS.get(kind)


def peak_flops(kind: str) -> float | None:
    """Dense bf16 operations per second of a device that JAX calls so, where they are known."""
    return CHIPS[_KINDS[kind]].flops if kind in _KINDS else _OTHERS.get(kind)
