"""A checkpoint whose layers are read when a call needs them, for `stream.StreamedTransformer`.

Tensors are read with `pread` into memory that the device takes over; FP8 and FP4 stay as stored.
The operating system keeps in its page cache what it has room for.
"""

import dataclasses
import functools
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from v4jax.checkpoints.leaves import aligned, path_of, planned, variables_of
from v4jax.checkpoints.source import converting
from v4jax.config import ModelConfig, segments
from v4jax.errors import InputError
from v4jax.files.threads import run_all
from v4jax.hf.tensors import TensorSpec, scale_key

THREADS = 8
_WHOLE = ("embed", "head")  # whose table is read by rows


class Meter:
    """What has been read so far.

    Attributes:
      bytes: of tensors, as they are stored.
      seconds: during which at least one read was under way.
    """

    def __init__(self):
        self.bytes, self.seconds = 0, 0.0
        self._lock, self._active, self._since = threading.Lock(), 0, 0.0

    def __enter__(self):
        with self._lock:
            if not self._active:
                self._since = time.perf_counter()
            self._active += 1

    def __exit__(self, *_):
        with self._lock:
            self._active -= 1
            if not self._active:
                self.seconds += time.perf_counter() - self._since

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.bytes += nbytes


class StreamedWeights:
    """Reads a checkpoint's weights item by item; see `stream.source.LayerSource`.

    Attributes:
      config: of the layers that are read.
      meter: what has been read.
      total_bytes: of all tensors of these layers, embedding and head, as they are stored.

    Args:
      source: an open checkpoint, which this one closes.
      items: its items as they are to be loaded, as `source.planned_items` makes them.
      layers: how many of the layers are read; None for all.
    """

    def __init__(self, source, items: Mapping[str, list[TensorSpec]], layers: int | None = None):
        self.config = cut_config(source.config, layers)
        self.meter = Meter()
        self._source, self._closed = source, False
        count = len(self.config.layers)
        wanted = ["embed", *(f"layer_{i:03d}" for i in range(count)), "head"]
        self._items = {name: items[name] for name in wanted}
        # No layer is scanned, so each is of leaves of its own.
        cut = segments(self.config.layers, count + 1)
        self._leaves, self._places = planned(source.path, self._items, cut)
        self._pool = ThreadPoolExecutor(THREADS)
        self._stored = _stored_bytes(self._items, source.items)
        self.total_bytes = sum(self._stored.values())
        first = [spec for spec in self._items["layer_000"] if spec.expert == 0]
        self.expert_bytes = sum(self._leaf(spec).nbytes for spec in first)
        self.head_row_bytes = self._leaf(self._table("head"))[0].nbytes

    def embedding(self, ids: np.ndarray) -> jax.Array:
        """Rows of the embedding, [*ids.shape, D]."""
        spec = self._table("embed")
        rows, place = np.unique(ids, return_inverse=True)
        table = aligned((len(rows), *spec.shape[1:]), spec.loaded_dtype)
        reads = [(spec, table[i : i + 1], (row, row + 1)) for i, row in enumerate(rows.tolist())]
        self._fill("embed", reads)
        return jax.device_put(table[place.reshape(ids.shape)])

    def head_rows(self, first: int, end: int) -> jax.Array:
        """Rows of the output head, [end - first, D]."""
        spec = self._table("head")
        out = aligned((end - first, *spec.shape[1:]), spec.loaded_dtype)
        cuts = np.linspace(first, end, min(THREADS, end - first) + 1).astype(int).tolist()
        parts = zip(cuts[:-1], cuts[1:], strict=True)
        self._fill("head", [(spec, out[a - first : b - first], (a, b)) for a, b in parts])
        return jax.device_put(out)

    def dense(self, item: str) -> dict[str, Any]:
        """An item's variables without routed experts, embedding and output head."""
        tables = {self._table(item).key} if item in _WHOLE else set()
        specs = [s for s in self._items[item] if s.expert is None and s.key not in tables]
        found = {spec.key: self._empty(spec) for spec in specs}
        self._fill(item, [(spec, found[spec.key], None) for spec in specs])
        leaves = {path_of(spec, spec.path): jax.device_put(found[spec.key]) for spec in specs}
        return variables_of(leaves)

    def experts(self, item: str, chosen: np.ndarray, room: int) -> dict[str, Any]:
        """w1, w2 and w3 of the chosen experts, stacked to `room`, zeros behind them."""
        place = {int(expert): i for i, expert in enumerate(chosen)}
        specs = [spec for spec in self._items[item] if spec.expert in place]
        stacks = {}
        for spec in specs:
            where = path_of(spec, spec.path)
            if where not in stacks:
                stacks[where] = self._empty(spec, room)
        reads = [(s, stacks[path_of(s, s.path)][place[s.expert]], None) for s in specs]
        self._fill(item, reads)
        leaves = {where: jax.device_put(stack) for where, stack in stacks.items()}
        return variables_of(leaves)["params"]["ffn"]["experts"]

    def close(self) -> None:
        """Closes the checkpoint's files; nothing can be read afterwards."""
        self._closed = True
        self._pool.shutdown()
        self._source.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _table(self, item) -> TensorSpec:
        """The embedding or the output head."""
        return next(s for s in self._items[item] if s.path == ("params", item, "weight"))

    def _leaf(self, spec):
        """The shape and dtype of a tensor in memory, as an array that takes none."""
        leaf = self._leaves[self._places[spec.key][0]]
        return np.broadcast_to(np.empty((), leaf.form()[1]), spec.shape)

    def _empty(self, spec, room=None):
        lead = () if room is None else (room,)
        return aligned((*lead, *spec.shape), self._leaf(spec).dtype)

    def _fill(self, item, reads: list[tuple[TensorSpec, np.ndarray, tuple[int, int] | None]]):
        """Reads tensors, or the given rows of them, into arrays."""
        if self._closed:
            raise InputError(f"{self._source.path}: was closed; load it again to read from it")
        with self.meter, self._source.open_parts(item) as read:
            convert = converting(self._source, item, read)
            run_all(self._pool, functools.partial(self._read_one, convert), reads)

    def _read_one(self, convert, one):
        spec, out, rows = one
        if rows is None:
            convert(spec.key, out)
            self.meter.add(self._stored[spec.key])
            return
        region = (rows, *((0, size) for size in spec.shape[1:]))
        convert(spec.key, out, region)
        self.meter.add(self._stored[spec.key] * (rows[1] - rows[0]) // spec.shape[0])


def _stored_bytes(items, stored_items):
    """For each tensor the bytes that reading it takes: where it is expanded, its scales' too."""
    stored = {spec.key: spec.nbytes for name in items for spec in stored_items[name]}
    found = {}
    for specs in items.values():
        keys = {spec.key for spec in specs}
        for key in keys:
            scales = scale_key(key)
            own = scales in keys or scales == key
            found[key] = stored[key] + (0 if own else stored.get(scales, 0))
    return found


def cut_config(config: ModelConfig, layers: int | None) -> ModelConfig:
    """The config of the first `layers` layers, without draft blocks.

    Raises:
      InputError: none, or more than there are.
    """
    count = len(config.layers)
    number = count if layers is None else layers
    whole = isinstance(number, int | np.integer) and not isinstance(number, bool)
    if not whole or not 1 <= number <= count:
        raise InputError(f"layers is {layers}; expected 1 to {count}, the layers of the model")
    return dataclasses.replace(
        config, layers=config.layers[: int(number)], mtp_layers=(), draft_layers=0, dspark=None
    )
