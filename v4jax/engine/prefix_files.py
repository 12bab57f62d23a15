"""Files of stored prefixes: one identity's in a directory, written by a thread behind the loop.

A file's name says whose it is by a tag of the salt, so that a tenant's files are found without
being read.
"""

import contextlib
import hashlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load, save

from v4jax.files.store import SUFFIX, Store

FORMAT = "v4jax-prefix-1"
_WAITING = 256 << 20  # bytes that may wait to be written; beyond it prefixes stay out of the disk
Arrays = Mapping[str, np.ndarray]


def tag_of(salt: str) -> str:
    """What stands for a salt in a file's name; nothing for the empty salt."""
    return hashlib.sha256(salt.encode()).hexdigest()[:16] if salt else ""


def file_name(kind: str, tag: str, digest: bytes) -> str:
    """The key of a page's or a unit's file in its store."""
    return "-".join(part for part in (kind, tag, digest.hex()) if part)


def bytes_of(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())


def forget_files(
    directory: str | os.PathLike, tag: str | None = None, unused_seconds: float | None = None
) -> int:
    """Removes the files of a directory, of whatever model; how many there were.

    Args:
      tag: only those of this tag; see `tag_of`. unused_seconds: only those that nobody has used
        for so long.
    """
    removed, now = 0, time.time()
    for path in Path(directory).glob(f"*/*{SUFFIX}"):
        parts = path.name.removesuffix(SUFFIX).split("-")
        if tag is not None and (parts[1] if len(parts) == 3 else "") != tag:
            continue
        with contextlib.suppress(OSError):  # another process has removed it
            if unused_seconds is None or now - path.stat().st_mtime > unused_seconds:
                path.unlink()
                removed += 1
    return removed


class PrefixFiles:
    """The files of one identity; see the module.

    Args:
      directory: the folder of all identities. limit: bytes of the identity's files.
    """

    def __init__(self, directory: Path, limit: int):
        self._root, self._limit = directory, limit
        self._store: Store | None = None
        self._queue: queue.Queue = queue.Queue()
        self._waiting = 0
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(("disk_unread", "disk_dropped", "disk_foreign"), 0)
        self._bad: set[str] = set()  # names of files that could not be read
        self._said = False
        self._thread: threading.Thread | None = None

    def open(self, identity: str) -> None:
        """Takes the files of an identity, and counts those of others."""
        own = self._root / identity[:32]
        with contextlib.suppress(OSError):
            others = [each for each in self._root.iterdir() if each.is_dir() and each != own]
            self._counts["disk_foreign"] = len(others)
            if others:
                logging.info(
                    "%s holds prefixes of %d other models, versions or settings, which are not "
                    "used",
                    self._root,
                    len(others),
                )
        self._store = Store(own, self._limit)

    def read(self, name):
        """Arrays and what was said of them, or None."""
        if name in self._bad or not self._store.has(name):
            return None
        content = self._store.read(name)
        # Whatever other bytes lead the reader to: a damaged file is no prefix, and no error.
        with contextlib.suppress(Exception):
            if content is not None:
                return _decoded(content)
        self._counts["disk_unread"] += 1
        self._bad.add(name)
        return None

    def write(self, name, arrays, about):
        """Writes a file later; drops it where too much waits."""
        size = bytes_of(arrays)
        with self._lock:
            if self._store.has(name) and name not in self._bad:
                return
            if self._waiting + size > _WAITING:
                self._counts["disk_dropped"] += 1
                return
            self._waiting += size
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="v4jax-prefix")
                self._thread.start()
        self._queue.put((name, arrays, about, size))

    def flush(self):
        self._queue.join()

    def forget(self, tag: str | None, unused_seconds: float | None) -> None:
        """As `forget_files`, of every identity, and of what still waits to be written."""
        self.flush()
        forget_files(self._root, tag, unused_seconds)

    def stats(self):
        units, size = 0, 0
        for name, each in self._store.sizes() if self._store is not None else ():
            units, size = units + name.startswith("unit-"), size + each
        waits = {"disk_waiting_bytes": self._waiting}
        return dict(self._counts) | waits | {"disk_bytes": size, "disk_units": units}

    def _run(self):
        while True:
            name, arrays, about, size = self._queue.get()
            try:
                self._write_now(name, arrays, about)
            finally:
                with self._lock:
                    self._waiting -= size
                self._queue.task_done()

    def _write_now(self, name, arrays, about):
        if self._store.write(name, _encoded(arrays, about)):
            self._bad.discard(name)
            return
        self._counts["disk_dropped"] += 1
        if not self._said:
            self._said = True
            logging.warning(
                "%s cannot be written (full, or not this user's): prefixes are kept in memory only",
                self._root,
            )


def _encoded(arrays, about) -> bytes:
    """Safetensors bytes; types that numpy does not know are kept as whole numbers."""
    types = {name: array.dtype.name for name, array in arrays.items()}
    plain = {name: _as_integers(array) for name, array in arrays.items()}
    said = {
        name: value.hex() if isinstance(value, bytes) else str(bool(value))
        for name, value in about.items()
    }
    return save(plain, metadata={"format": FORMAT, "types": json.dumps(types)} | said)


def _decoded(content):
    size = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + size])["__metadata__"]
    if about["format"] != FORMAT:
        raise ValueError("of another version")
    types = json.loads(about["types"])
    arrays = {name: array.view(_type(types[name])) for name, array in load(content).items()}
    return arrays, about


def _as_integers(array):
    array = np.ascontiguousarray(array)
    return array if array.dtype.kind in "iufb" else array.view(f"u{array.dtype.itemsize}")


def _type(name):
    return np.dtype(getattr(ml_dtypes, name, name))
