"""What a run notes down: DIR/metrics.jsonl, a TensorBoard file, and how fast the device is used."""

import concurrent.futures
import dataclasses
import functools
import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import accounting, chips
from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.files.atomic import write_atomically
from v4jax.files.writing import append, writing
from v4jax.train.lora import SUBTREE
from v4jax.train.optimizer import joined, matches

FILE = "metrics.jsonl"


class Metrics:
    """Appends a line a logged step to metrics.jsonl and to a TensorBoard event file.

    Args:
      step: the step that the run goes on from; lines of later ones, from a run that was killed
        after its last checkpoint, are dropped: they will be written again. Damaged lines are too.

    Attributes:
      damaged: how many those were.

    Raises:
      InputError: files that cannot be read or made, a full disk.
    """

    def __init__(self, workdir: Path, step: int):
        path = workdir / FILE
        before = _content(path)
        found = list(_lines(before))
        # A kill may have cut off the last line; any other that is no line is damage.
        self.damaged = sum(line is None for _, line in found[:-1])
        self.damaged += bool(found) and found[-1][1] is None and before.endswith(b"\n")
        kept = b"".join(raw + b"\n" for raw, line in found if line and line["step"] <= step)
        with writing(path):
            if kept != before:
                write_atomically(path, kept)
            self._file = path.open("ab", buffering=0)
        self._events = EventFile(workdir / f"events.out.tfevents.{int(time.time())}.v4jax")

    def write(self, line: dict[str, Any]) -> None:
        append(self._file, json.dumps(line).encode() + b"\n")
        self._events.write(line["step"], {k: v for k, v in line.items() if k != "step"})

    def close(self) -> None:
        self._file.close()
        self._events.close()


def read(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run so far: objects of numbers (or null: no such figure) with a "step".

    What a kill cut off or damage made of a line does not count.

    Raises:
      InputError: the file cannot be read.
    """
    return [line for _, line in _lines(_content(workdir / FILE)) if line]


def _content(path):
    name = str(path)[:200]
    try:
        if not path.exists():
            return b""
        if not path.is_file():
            raise InputError(f"{name}: is no regular file; expected the metrics of a run")
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{name}: cannot be read ({error.strerror}); mend that, or give another directory"
        ) from error


def _lines(content):
    """Pairs of a line's bytes and what it says, None where that is not what `write` writes."""
    for raw in content.split(b"\n"):
        if not raw:
            continue
        try:
            line = json.loads(raw.decode())
        except (ValueError, RecursionError):  # no UTF-8, no JSON, or nested without end
            line = None
        yield raw, line if _is_line(line) else None


def _is_line(line):
    if not isinstance(line, dict) or not all(map(_is_figure, line.values())):
        return False
    return isinstance(line.get("step"), int) and line["step"] > 0


def _is_figure(value):
    if value is None or isinstance(value, float):
        return True
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


class EventFile:
    """TensorBoard scalars: records of a length, a protobuf `Event` and their CRCs, written here.

    Every package that writes these brings TensorFlow, torch or a server along; the format of a
    scalar is thirty lines.
    """

    def __init__(self, path: Path):
        with writing(path):
            self._file = path.open("ab", buffering=0)
            self._record(_field(1, 1, struct.pack("<d", time.time())) + _bytes(3, b"brain.Event:2"))

    def write(self, step: int, values: dict[str, Any]) -> None:
        scalars = {k: v for k, v in values.items() if isinstance(v, int | float)}
        summary = b"".join(
            _bytes(1, _bytes(1, name.encode()) + _field(2, 5, struct.pack("<f", value)))
            for name, value in scalars.items()
        )
        event = _field(1, 1, struct.pack("<d", time.time())) + _field(2, 0, _varint(step))
        self._record(event + _bytes(5, summary))

    def close(self) -> None:
        self._file.close()

    def _record(self, data):
        length = struct.pack("<Q", len(data))
        append(self._file, length + _masked_crc(length) + data + _masked_crc(data))


def _field(number, kind, payload):
    return _varint(number << 3 | kind) + payload


def _bytes(number, payload):
    return _field(number, 2, _varint(len(payload)) + payload)


def _varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _masked_crc(data):
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(data: bytes) -> int:
    """The Castagnoli CRC."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _crc_table()[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


@functools.cache
def _crc_table():
    table = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    return table


class Clock:
    """How fast steps of one size follow one another.

    A step ends when its figures are computed, not when they are read: a thread waits for each. It
    begins where the one before ended or, after a pause for an evaluation, a checkpoint or the
    compiler, where `start` says.

    Args:
      tokens: of a step, in rows of `length`. flops: operations of a step (`step_flops`).
    """

    def __init__(self, tokens: int, length: int, flops: float):
        self._tokens, self._length = tokens, length
        with jax.transfer_guard("allow"):
            self._at_peak = flops / peak_flops()[0]
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self.start()

    def start(self) -> None:
        """The next step begins now: a pause has ended."""
        self._begin = time.perf_counter()

    def watch(self, noted: Any) -> concurrent.futures.Future:
        """When the step ends that computes these arrays, for `tick`."""
        return self._thread.submit(_time_of, noted)

    def tick(self, ended: concurrent.futures.Future) -> dict[str, float]:
        """Figures of the next step; every step is to be asked for, in order."""
        end = ended.result()
        seconds, self._begin = end - self._begin, end
        speed = {"tokens_per_second": self._tokens / seconds, "mfu": self._at_peak / seconds}
        return speed | {"seconds": seconds, "length": self._length}

    def close(self) -> None:
        self._thread.shutdown(wait=False)


def _time_of(noted):
    jax.block_until_ready(noted)
    return time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often a step computes what one forward pass does: the indexer's share, and the rest's."""

    indexer: float = 3.0
    rest: float = 3.0


def passes(params: Any, trained: str | None) -> Passes:
    """The passes of a step that trains some of the parameters.

    One is forward. Where anything is trained there is one more for the gradients of activations,
    and for those of weights the trained ones' share of one (adapters of LoRA, thin, count for
    none). The indexer counts apart: it has a loss of its own, through which nothing else learns.

    Args:
      params: a tree of arrays or shapes. trained: as `StepConfig.trained`.
    """
    leaves = [
        (joined(path), math.prod(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]

    def of(group):
        learns = any(trained is None or matches(trained, name) for name, _ in group)
        own = [(name, size) for name, size in group if not name.startswith(SUBTREE + "/")]
        whole = sum(size for _, size in own)
        part = sum(size for name, size in own if trained is None or matches(trained, name))
        return 1.0 + learns + (part / whole if whole else 0.0)

    indexer = [leaf for leaf in leaves if "/indexer/" in leaf[0]]
    return Passes(of(indexer), of([leaf for leaf in leaves if leaf not in indexer]))


def step_flops(
    config: ModelConfig, tokens: int, length: int, passes: Passes, dense: bool = False
) -> float:
    """Operations of a training step, of the main model; nothing computed again counts.

    Args:
      dense: CSA layers attend to every visible entry.
    """
    if dense:
        config = dataclasses.replace(config, index_topk=None)
    parts = accounting.flops_per_token(config, length // 2, accounting.ONE_EACH)
    indexer = parts.pop("indexer")
    return tokens * (passes.indexer * indexer + passes.rest * sum(parts.values()))


@functools.cache
def peak_flops() -> tuple[float, str]:
    """Operations a second of all devices, and where the figure is from.

    A device of unknown kind is timed on a float32 matrix product.
    """
    device = jax.devices()[0]
    known = chips.peak_flops(device.device_kind)
    if known is not None:
        return known * jax.device_count(), "data sheet"
    n = 1024
    x = jax.device_put(np.ones((n, n), np.float32))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    # A CPU's fake devices share its cores.
    count = 1 if device.platform == "cpu" else jax.device_count()
    return 2 * n**3 / best * count, "a measured matrix product"
