"""Block sizes of the Pallas kernels: one frozen dataclass per operation, one table per chip.

`v4jax tune` measures candidates and writes such a table as JSON; the environment variable
V4JAX_BLOCKS names the file that is in force.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from v4jax import chips
from v4jax.files.json_reader import read_fields

MAX_TABLE = 1 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class SparseAttention:
    """Queries of a tile (TPU: all heads each) or heads of one query (GPU), and keys of a tile.

    rows: chosen rows that the TPU's decode path fetches ahead; gather_above: entries beyond which
    it serves prefill too. backward_*: of the gradients, stored_*: of stored rows, whose words take
    registers of their own; GPU only (the TPU uses the same tiles).
    """

    queries: int = 8
    keys: int = 256
    rows: int = 128
    gather_above: int = 32768
    heads: int = 32
    warps: int = 8
    stages: int = 2
    stored_keys: int = 32
    stored_stages: int = 1
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


def chip(platform: str) -> str:
    """The table's row for the chip that is compiled for: "tpu" or "cuda".

    The abstract mesh of an ahead-of-time compilation names its chip; else the process's own device
    does. Where neither is of the platform (interpret mode): v5p, h100.
    """
    kind = _device_kind(platform)
    if platform == "cuda":
        return "h100"
    return chips.named(kind) or "v5p"


def _device_kind(platform):
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return str(device.device_kind)
    devices = jax.local_devices()
    return devices[0].device_kind if devices[0].platform == platform else ""


def blocks(platform: str) -> Blocks:
    """The block sizes in force on the platform's chip."""
    name = chip(platform)
    path = os.environ.get("V4JAX_BLOCKS")
    tuned = read(Path(path)) if path else {}
    return _trial.get(name) or tuned.get(name, TABLE[name])


_trial: dict[str, Blocks] = {}


@contextlib.contextmanager
def on_trial(name: str, table: Blocks) -> Iterator[None]:
    """Puts block sizes in force on a chip for a while: what the tuner measures under."""
    before = dict(_trial)
    _trial[name] = table
    try:
        yield
    finally:
        _trial.clear()
        _trial.update(before)


@functools.cache
def read(path: Path) -> dict[str, Blocks]:
    """A table written by `v4jax tune`.

    Raises:
      ValueError: not such a table; the message names what is wrong.
    """
    try:
        rows = read_fields(path, MAX_TABLE).of_objects()
        return {_known_chip(name): _row(row) for name, row in rows.items()}
    except ValueError as error:
        raise ValueError(
            f"{path} is no table of block sizes ({error}); write one with v4jax tune --out {path}"
        ) from error


def _known_chip(name):
    if name not in TABLE:
        raise ValueError(f"unknown chip {name[:60]!r}, expected one of {sorted(TABLE)}")
    return name


def _row(row):
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Blocks)}
    unknown = sorted(set(row) - set(kinds))
    if unknown:
        found = unknown[0][:60]
        raise ValueError(f"unknown operation {found!r}, expected one of {sorted(kinds)}")
    return Blocks(**{op: _sizes(kinds[op], sizes) for op, sizes in row.of_objects().items()})


def _sizes(kind, sizes):
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(sizes) - set(known))
    if unknown:
        raise ValueError(f"unknown size {unknown[0][:60]!r}, expected some of {known}")
    return kind(**{name: sizes.integer(name, low=0, high=1 << 30) for name in sizes})
