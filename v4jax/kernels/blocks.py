"""Block sizes of the Pallas kernels: one frozen dataclass an operation, one table a chip.

`v4jax tune` measures candidates and writes such a table as JSON; `use(path)` or the environment
variable V4JAX_BLOCKS puts it in force.
"""

import dataclasses
import json
import os
from pathlib import Path

import jax


@dataclasses.dataclass(frozen=True)
class SparseAttention:
    """Queries of a tile (TPU: all heads each) or heads of one query (GPU), and keys of a tile.

    rows: chosen rows that the TPU's decode path fetches ahead; gather_above: entries beyond which
    it serves prefill too. backward_*: of the gradients, GPU only (the TPU uses the same tiles).
    """

    queries: int = 8
    keys: int = 256
    rows: int = 128
    gather_above: int = 32768
    heads: int = 32
    warps: int = 8
    stages: int = 2
    backward_heads: int = 32
    backward_keys: int = 32
    backward_warps: int = 8
    backward_stages: int = 2


@dataclasses.dataclass(frozen=True)
class IndexerTopk:
    """Queries and keys of a tile of scores.

    `stream`: keys that a step brings from HBM, TPU only.
    """

    queries: int = 16
    keys: int = 512
    stream: int = 16384
    warps: int = 4
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class GroupedMatmul:
    """Rows, output columns and contracted columns of a tile.

    The kernels take fewer rows where the groups are small, and fewer columns where memory is.
    """

    rows: int = 256
    columns: int = 512
    depth: int = 512
    warps: int = 8
    stages: int = 3


@dataclasses.dataclass(frozen=True)
class HyperConnections:
    """Tokens of a tile at most (halved until a TPU's VMEM holds them), and channels of a step."""

    tokens: int = 128
    channels: int = 512
    warps: int = 4
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The block sizes of all operations on one chip."""

    sparse_attention: SparseAttention = SparseAttention()
    indexer_topk: IndexerTopk = IndexerTopk()
    grouped_matmul: GroupedMatmul = GroupedMatmul()
    hyper_connections: HyperConnections = HyperConnections()


# VMEM (TPU) or shared memory a block (GPU) that a kernel may plan with, in bytes.
MEMORY = {
    "v5e": 128 << 20,
    "v5p": 63 << 20,
    "v6e": 128 << 20,
    "tpu7x": 64 << 20,
    "h100": 227 << 10,
}

TABLE: dict[str, Blocks] = {
    "v5e": Blocks(),
    "v5p": Blocks(),
    "v6e": Blocks(),
    "tpu7x": Blocks(),
    "h100": Blocks(
        sparse_attention=SparseAttention(queries=1, keys=64),
        indexer_topk=IndexerTopk(queries=16, keys=256, warps=8, stages=3),
        grouped_matmul=GroupedMatmul(rows=128, columns=128, depth=64),
        hyper_connections=HyperConnections(tokens=64, channels=64, stages=3),
    ),
}

_KINDS = {"v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v6": "v6e", "7x": "tpu7x", "TPU7": "tpu7x"}


def chip(platform: str) -> str:
    """The table's row for the chip that is compiled for: "tpu" or "cuda".

    The abstract mesh of an ahead-of-time compilation names its chip; else the process's own device
    does. Where neither is of the platform (interpret mode): v5p, h100.
    """
    kind = _device_kind(platform)
    if platform == "cuda":
        return "h100"
    return next((name for part, name in _KINDS.items() if part in kind), "v5p")


def _device_kind(platform):
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return str(device.device_kind)
    devices = jax.local_devices()
    return devices[0].device_kind if devices[0].platform == platform else ""


def blocks(platform: str) -> Blocks:
    """The block sizes in force on the platform's chip."""
    tuned = _tuned(os.environ.get("V4JAX_BLOCKS"))
    name = chip(platform)
    return tuned.get(name, TABLE[name])


def _tuned(path):
    return {} if not path else read(Path(path))


def read(path: Path) -> dict[str, Blocks]:
    """A table written by `v4jax tune`.

    Raises:
      ValueError: not such a table; the message names what is wrong.
    """
    kinds = {field.name: field.default.__class__ for field in dataclasses.fields(Blocks)}
    table = {}
    for name, row in json.loads(path.read_text()).items():
        unknown = set(row) - set(kinds)
        if name not in TABLE or unknown:
            raise ValueError(f"{path}: unknown chip or operation: {name} {sorted(unknown)}")
        table[name] = Blocks(**{op: kinds[op](**sizes) for op, sizes in row.items()})
    return table
