"""The audit log: one JSON line a request, in files of a day that are deleted after some days.

A line is appended with one write and is on the file when the request's answer has gone out. A
reserve of disk space lets the requests that run be recorded when the disk is full; new ones are
refused until there is room again.
"""

import contextlib
import errno
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from v4jax.errors import InputError
from v4jax.files.atomic import replacing, write_at
from v4jax.files.writing import writable_directory

DAY = 86400.0
_NAME = re.compile(r"audit-(\d{4}-\d\d-\d\d)\.jsonl")
_RESERVE_BYTES = 4 << 20
_RETRY_SECONDS = 1.0
FORGOTTEN = "forgotten.jsonl"  # what `v4jax forget` asks of a server that runs


class AuditLog:
    """The log of one directory; for one thread at a time, and one process beside `forget`.

    Args:
      directory: made for this user alone. full: whether texts are kept.
      keep_days: files of days before are deleted. clock: seconds since the epoch.

    Raises:
      InputError: the directory cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        full: bool = False,
        keep_days: int = 30,
        clock: Callable[[], float] = time.time,
    ):
        new = not Path(directory).exists()
        self._directory = writable_directory(directory, "--audit")
        if new:
            os.chmod(self._directory, 0o700)
        self.full, self._keep_days, self._clock = full, keep_days, clock
        self._reserve = self._directory / "reserve"
        self._tried = -_RETRY_SECONDS
        try:
            self._secret = self._read_secret()
            self._reserved = self._make_reserve()
            for path in files(self._directory):
                mend(path)
        except OSError as error:
            raise InputError(
                f"--audit {self._directory}: cannot be used ({error.strerror or error}); free "
                "space, or give another directory"
            ) from error
        self.delete_old()

    def writable(self) -> bool:
        """Whether a request that begins now can be recorded."""
        if not self._reserved and time.monotonic() - self._tried > _RETRY_SECONDS:
            self._tried = time.monotonic()
            with contextlib.suppress(OSError):
                self._reserved = self._make_reserve()
        return self._reserved

    def append(self, line: dict[str, Any]) -> bool:
        """Writes a request's line; False where the system does not let it."""
        texts = {name: line.pop(name) for name in ("prompt", "answer") if name in line}
        lines = [line | texts, line | {"text_lost": True}] if self.full and texts else [line]
        for each in lines:
            if self._append(json.dumps(each, separators=(",", ":")).encode() + b"\n"):
                return True
        return False

    def hash_of(self, prompt: bytes) -> str:
        """What stands for a prompt; without the directory's secret nobody can try texts on it."""
        return hmac.new(self._secret, prompt, hashlib.sha256).hexdigest()

    def delete_old(self) -> None:
        """Deletes the files of days that are no longer kept."""
        oldest = _day(self._clock() - self._keep_days * DAY)
        for path in files(self._directory):
            if _NAME.fullmatch(path.name)[1] < oldest:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _append(self, content):
        path = self._directory / f"audit-{_day(self._clock())}.jsonl"
        for _ in range(2):
            try:
                with locked(self._directory):
                    new = not path.exists()
                    _append(path, content)
                if new:
                    self.delete_old()
                return True
            except OSError:
                # The reserve is for the requests that have begun.
                self._reserved = False
                with contextlib.suppress(OSError):
                    self._reserve.unlink()
        return False

    def _make_reserve(self):
        file = os.open(self._reserve, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(file, 0, _RESERVE_BYTES)
        except OSError as error:
            os.unlink(self._reserve)
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        finally:
            os.close(file)
        return True

    def _read_secret(self):
        path = self._directory / "secret"
        if not path.exists():
            with replacing(path) as file:
                os.fchmod(file, 0o600)
                write_at(file, secrets.token_bytes(32), 0)
        return path.read_bytes()


def files(directory: str | os.PathLike) -> list[Path]:
    """The log's files, oldest first."""
    return sorted(path for path in Path(directory).iterdir() if _NAME.fullmatch(path.name))


def read(directory: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """All lines, oldest first."""
    for path in files(directory):
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)


def mend(path: Path) -> None:
    """Cuts off a last line that a process died on; its request has had no answer."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            begin = max(0, end - 65536)
            file.seek(begin)
            found = file.read(end - begin).rfind(b"\n")
            if found >= 0:
                end = begin + found + 1
                break
            end = begin
        if end < size:
            file.truncate(end)


@contextlib.contextmanager
def locked(directory: str | os.PathLike):
    """Held by whoever appends or deletes."""
    with open(os.open(Path(directory) / "lock", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _append(path, content):
    """Appends all of it or nothing."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(file).st_size
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(file, view) :]
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def _day(seconds):
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
