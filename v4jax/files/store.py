"""A folder of results that can be made again: whole entries or none, the least used ones go first.

An entry is a file `KEY.entry`: eight bytes that name the format, the SHA-256 of key and content,
and the content. An entry that is damaged, that lies under another one's name, or that another user
could have written is not read, and the next one takes its place.
"""

import contextlib
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from v4jax.files.atomic import write_atomically

SUFFIX = ".entry"
_MAGIC = b"v4jax-1\n"
_HEAD = len(_MAGIC) + hashlib.sha256().digest_size
_LOCK = "lock"
_WAIT = 5.0  # seconds for another process's entry to be written


class Store:
    """Entries by key.

    Args:
      path: the folder; made, for its owner alone, when the first entry is written.
      limit: bytes that all entries may have together.
    """

    def __init__(self, path: str | os.PathLike, limit: int):
        self._path, self._limit = Path(path), limit

    def read(self, key: str) -> bytes | None:
        """The content; None where there is none, or none to be trusted."""
        path = self._file(key)
        try:
            entry = _read_own(path)
            os.utime(path)  # entries that are used go last
        except OSError:
            return None
        content = entry[_HEAD:]
        return content if entry[:_HEAD] == _head(key, content) else None

    def has(self, key: str) -> bool:
        """Whether there is an entry of that name, to be trusted or not."""
        return self._file(key).exists()

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Each entry's key and the bytes of its file."""
        with contextlib.suppress(OSError), os.scandir(self._path) as found:
            for entry in found:
                if entry.name.endswith(SUFFIX):
                    with contextlib.suppress(OSError):  # another process has removed it
                        yield entry.name.removesuffix(SUFFIX), entry.stat().st_size

    def write(self, key: str, content: bytes) -> bool:
        """Keeps the content; False where the system does not let it, which costs only time."""
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self._path / _LOCK):
                write_atomically(self._file(key), _head(key, content) + content)
                remove_oldest(self._path.glob(f"*{SUFFIX}"), self._limit)
        except OSError:
            return False
        return True

    def _file(self, key):
        return self._path / f"{key}{SUFFIX}"


def remove_oldest(files: Iterable[Path], limit: int) -> None:
    """Removes files, the longest unchanged first, until those that stay have `limit` bytes."""
    found = []
    for path in files:
        with contextlib.suppress(OSError):  # another process has removed it
            about = path.stat()
            found.append((about.st_mtime, about.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


def is_private(about: os.stat_result) -> bool:
    """Whether only this process's user could have written what has this status."""
    return about.st_uid == os.geteuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _head(key, content):
    return _MAGIC + hashlib.sha256(key.encode() + b"\0" + content).digest()


def _read_own(path):
    """All bytes of a regular file that nobody else can write.

    Raises:
      OSError: there is none.
    """
    # A pipe of that name would keep a reader waiting.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        about = os.fstat(file.fileno())
        if not (stat.S_ISREG(about.st_mode) and is_private(about)):
            raise PermissionError(f"{path} is not this user's own file")
        return file.read()


@contextlib.contextmanager
def _locked(path):
    """Held by one process at a time.

    Raises:
      OSError: another has held it for too long.
    """
    with open(path, "ab") as file:
        end = time.monotonic() + _WAIT
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.02)
        yield
