"""Safetensors files: a reader that checks a file before it trusts it, and an atomic writer.

A file is 8 bytes of little-endian header length, a JSON header `{key: {dtype, shape,
data_offsets}}` and the tensors' bytes. A checkpoint is one `model.safetensors`, or several files
with `model.safetensors.index.json`, whose `weight_map` names the file of each key.
"""

import json
import math
import mmap
import os
import re
import struct
import weakref
import zlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from v4jax.errors import InputError
from v4jax.files.atomic import replacing, write_at, write_atomically
from v4jax.files.json_reader import Fields, parse_json, quote, read_fields, word
from v4jax.files.regions import Region, read_region, whole
from v4jax.files.regular import open_regular
from v4jax.files.threads import run_all

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

NUMPY_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
STORED_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}

_FILE_NAME = re.compile(r"[^/\\\0]+\.safetensors")
_MAX_HEADER = 100 << 20  # the format's own limit


class Entry(NamedTuple):
    """One tensor of a file; `start` and `stop` count from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class SafetensorsFile:
    """One file, opened and checked; tensors are read one at a time, from any thread.

    Attributes:
      path: the file.
      entries: key -> `Entry`, in the header's order.
      header: the header's bytes.
      close: closes the file; so does the end of the object's life.

    Raises:
      InputError: no such file, truncated, or a header that is not a safetensors header.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._map = None
        self._fd = open_regular(self.path)
        self.close = weakref.finalize(self, os.close, self._fd)
        try:
            self.header, self.entries = _read_header(self._fd, self.path)
        except BaseException:
            self.close()
            raise

    def read_into(self, key: str, out: np.ndarray, region: Region | None = None) -> None:
        """Reads the bytes of a tensor, or of a region, into a C-contiguous array of as many."""
        entry = self.entries[key]
        if region is None:
            if out.nbytes != entry.nbytes:
                raise ValueError(f"{key} has {entry.nbytes} bytes, the buffer {out.nbytes}")
            region = whole(entry.shape)
        try:
            read_region(self._fd, entry.start, entry.shape, region, out)
        except EOFError:
            raise InputError(f"{self.path}: ended while {key} was read; it was cut short") from None

    def read(self, key: str) -> np.ndarray:
        """A tensor as a new array of the dtype that the file states."""
        entry = self.entries[key]
        out = np.empty(entry.shape, NUMPY_DTYPES[entry.dtype])
        self.read_into(key, out)
        return out

    def __getitem__(self, key: str) -> np.ndarray:
        """A tensor as a read-only view of the mapped file: no copy."""
        entry = self.entries[key]
        if self._map is None:
            self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        raw = np.frombuffer(self._map, np.uint8, entry.nbytes, entry.start)
        return raw.view(NUMPY_DTYPES[entry.dtype]).reshape(entry.shape)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class SafetensorsFolder:
    """All the safetensors files of one checkpoint directory.

    Attributes:
      path: the directory.
      files: file name -> `SafetensorsFile`.
      entries: key -> `Entry`, of all files.

    Raises:
      InputError: no checkpoint there, a missing or damaged file, or files and index disagree.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        weight_map = _weight_map(self.path)
        names = [SINGLE_NAME] if weight_map is None else sorted(set(weight_map.values()))
        absent = [name for name in names if not os.path.exists(os.path.join(self.path, name))]
        if absent:
            raise InputError(
                f"{self.path}: {len(absent)} of {len(names)} files named by {INDEX_NAME} are "
                f"missing, first {absent[0]}; download or copy them again"
            )
        self.files = {}
        self.entries = {}
        self._file_of = {}
        for name in names:
            file = self.files[name] = SafetensorsFile(os.path.join(self.path, name))
            for key, entry in file.entries.items():
                if key in self.entries:
                    raise InputError(f"{self.path}: {word(key)} is in more than one file; drop one")
                self.entries[key] = entry
                self._file_of[key] = file
        if weight_map is not None:
            self._check_index(weight_map)

    def read_into(self, key: str, out: np.ndarray, region: Region | None = None) -> None:
        self._file_of[key].read_into(key, out, region)

    def read(self, key: str) -> np.ndarray:
        return self._file_of[key].read(key)

    def __getitem__(self, key: str) -> np.ndarray:
        return self._file_of[key][key]

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def _check_index(self, weight_map):
        for key, name in weight_map.items():
            if key not in self.files[name].entries:
                raise InputError(
                    f"{self.path}: {INDEX_NAME} says that {word(key)} is in {name}, which does not "
                    "hold it; the index and the files are of different checkpoints"
                )
        for key in self.entries:
            if key not in weight_map:
                raise InputError(
                    f"{self.path}: {os.path.basename(self._file_of[key].path)} holds {word(key)}, "
                    f"which {INDEX_NAME} does not name; index and files do not belong together"
                )


class NewTensor(NamedTuple):
    """A tensor to be written: its key, the dtype's safetensors name, its shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


def write_safetensors(
    path: str | os.PathLike,
    tensors: Iterable[NewTensor],
    fill: Callable[[str, np.ndarray], None],
    pool=None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Writes one file: complete under its name, or not at all.

    Tensors are produced one by one (by the pool's threads in parallel), so memory is bounded by
    the largest ones in flight. The bytes do not depend on the threads.

    Args:
      path: the file; a hidden temporary file next to it is renamed to it at the end.
      tensors: what to write. Wider dtypes come first, so that every tensor is aligned.
      fill: `fill(key, out)` writes a tensor into the C-contiguous array `out`.
      pool: a `ThreadPoolExecutor`, or None to work in this thread.
      progress: called with a number of bytes as they are written.

    Returns:
      key -> CRC-32 of the tensor's bytes.
    """
    tensors = sorted(tensors, key=lambda t: (-NUMPY_DTYPES[t.dtype].itemsize, t.dtype, t.key))
    header, offsets = _new_header(tensors)

    def write_one(fd, tensor):
        out = np.empty(tensor.shape, NUMPY_DTYPES[tensor.dtype])
        fill(tensor.key, out)
        raw = bytes_of(out)
        write_at(fd, raw, offsets[tensor.key])
        if progress is not None:
            progress(raw.nbytes)
        return tensor.key, zlib.crc32(raw)

    with replacing(path) as fd:
        write_at(fd, np.frombuffer(header, np.uint8), 0)
        return dict(run_all(pool, lambda tensor: write_one(fd, tensor), tensors))


def write_index(directory: str | os.PathLike, weight_map: dict[str, str], total_size: int) -> None:
    """Writes `model.safetensors.index.json`, atomically."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomically(
        os.path.join(directory, INDEX_NAME), json.dumps(index, indent=2).encode() + b"\n"
    )


def bytes_of(array: np.ndarray) -> np.ndarray:
    """The same memory as a flat uint8 array."""
    if not array.flags.c_contiguous:
        raise ValueError("expected a C-contiguous array")
    return array.reshape(-1).view(np.uint8)


def _read_header(fd, path):
    size = os.fstat(fd).st_size
    prefix = os.pread(fd, 8, 0)
    if len(prefix) < 8:
        raise InputError(f"{path}: has {size} bytes, too few for a safetensors file; get it again")
    length = struct.unpack("<Q", prefix)[0]
    if length > _MAX_HEADER:
        raise InputError(f"{path}: not a safetensors file (its header would have {length} bytes)")
    if 8 + length > size:
        raise InputError(
            f"{path}: truncated: the header alone needs {8 + length} bytes, the file has {size}; "
            "download or copy it again"
        )
    header = os.pread(fd, length, 8)
    try:
        fields = Fields(parse_json(header, path), path)
        entries = {
            key: _entry(key, fields.object(key), 8 + length)
            for key in fields
            if key != "__metadata__"
        }
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise InputError(f"{path}: corrupt safetensors header ({reason}); get it again") from None
    _check_layout(path, entries, 8 + length, size)
    return header, entries


def _entry(key, field, base):
    dtype, shape, offsets = field.string("dtype"), field.array("shape"), field.array("data_offsets")
    if dtype not in NUMPY_DTYPES:
        raise InputError(f"{quote(key, 100)} has the unknown dtype {dtype[:60]!r}")
    numbers = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *offsets))
    if not numbers or len(offsets) != 2:
        found = f"bad shape {quote(shape, 60)} or bad offsets {quote(offsets, 60)}"
        raise InputError(f"{quote(key, 100)} has a {found}")
    start, stop = offsets
    if stop - start != math.prod(shape) * NUMPY_DTYPES[dtype].itemsize:
        found = f"{dtype} {quote(shape, 60)} does not take {stop - start} bytes"
        raise InputError(f"{quote(key, 100)}: {found}")
    return Entry(dtype, tuple(shape), base + start, base + stop)


def _check_layout(path, entries, base, size):
    end = base
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise InputError(
                f"{path}: corrupt safetensors header ({word(key)} does not start at {end})"
            )
        end = entry.stop
    if size < end:
        raise InputError(
            f"{path}: truncated: its header promises {end} bytes, the file has {size}; download "
            "or copy it again"
        )
    if size > end:
        raise InputError(
            f"{path}: corrupt: its header promises {end} bytes, the file has {size}; get it again"
        )


def _weight_map(directory):
    """The index's weight_map, or None where there is a single file."""
    path = os.path.join(directory, INDEX_NAME)
    if not os.path.isdir(directory):
        raise InputError(f"{directory}: no such directory; expected a checkpoint's directory")
    if not os.path.exists(path):
        if os.path.exists(os.path.join(directory, SINGLE_NAME)):
            return None
        raise InputError(
            f"{directory}: no checkpoint: neither {INDEX_NAME}, {SINGLE_NAME} nor v4jax.json there"
        )
    return read_index(path)


def read_index(path: str | os.PathLike) -> dict[str, str]:
    """The weight_map of an index: which file next to it holds each tensor.

    Raises:
      InputError: no such file, no index, or it names files elsewhere.
    """
    weight_map = read_fields(path).object("weight_map").of_strings()
    bad = [name for name in weight_map.values() if not _FILE_NAME.fullmatch(name)]
    if bad or not weight_map:
        found = f"names {quote(bad[0])}" if bad else "is empty"
        raise InputError(
            f"{path}: its weight_map {found}; expected .safetensors files next to it: get it again"
        )
    return weight_map


def _new_header(tensors):
    fields = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        stop = position + tensor.nbytes
        fields[tensor.key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    offsets = {t.key: base + fields[t.key]["data_offsets"][0] for t in tensors}
    return struct.pack("<Q", len(text)) + text, offsets
