"""Records of a run: one JSON line a sample, appended and flushed, whole or not there.

`run.json` beside them says whose they are: those of another run are refused.
"""

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from v4jax.errors import InputError
from v4jax.files.atomic import write_atomically
from v4jax.files.writing import append, refused, writable_directory, writing

FORMAT = "v4jax-eval-1"
RECORDS, RUN = "records.jsonl", "run.json"
Key = tuple[str, int, int]  # task, length, number of the sample


def key_of(record: Mapping[str, Any]) -> Key:
    """Of a sample's record."""
    return record["task"], record["length"], record["sample"]


class Records:
    """The records of one directory, open for more; for one process at a time.

    Args:
      directory: made where it is not there. identity: what makes the run this one and no other.
      name: of the file. key: record -> what no two of them share.

    Attributes:
      done: the records that are there, by their keys.

    Raises:
      InputError: the directory has another run's records, is in use or cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        identity: Mapping[str, Any],
        name: str = RECORDS,
        key: Callable[[Mapping[str, Any]], tuple] = key_of,
    ):
        self.directory = writable_directory(directory, "--out")
        self._path, self._key = self.directory / name, key
        try:
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise refused(self._path, error) from error
        try:
            self._lock()
            self._check(dict(identity) | {"format": FORMAT})
            self.done = {key(each): each for each in self._recover(self._path)}
        except BaseException:
            self._file.close()
            raise

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends one; it is on its way to the disk when this returns.

        Raises:
          InputError: the disk is full.
        """
        try:
            append(self._file, (json.dumps(record) + "\n").encode())
        except OSError as error:
            raise refused(self._path, error, "the records before it are safe") from error
        self.done[self._key(record)] = dict(record)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _lock(self):
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{self.directory}: another process writes records there; wait for it, or give "
                "another --out"
            ) from error

    def _check(self, identity):
        path = self.directory / RUN
        if not path.exists():
            if self._path.stat().st_size:
                raise InputError(
                    f"{self.directory} has records and no {RUN}, so nobody knows whose they are; "
                    "give another --out"
                )
            with writing(path):
                write_atomically(path, (json.dumps(identity, indent=1) + "\n").encode())
            return
        found = read_run(self.directory)
        names = sorted(found.keys() | identity.keys())
        if other := [name for name in names if found.get(name) != identity.get(name)]:
            name = other[0]
            raise InputError(
                f"{self.directory} has the records of another run: its {name} is "
                f"{_quoted(found.get(name))}, and this one's is {_quoted(identity.get(name))}; "
                "give another --out, or run the first one's command again"
            )

    def _recover(self, path):
        """The whole lines; a last one that was cut off by a kill is taken away."""
        raw = path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            os.truncate(path, whole)
        return _parsed(path, raw[:whole], self._key)


def read_run(directory: str | os.PathLike) -> dict[str, Any]:
    """Whose records a directory has.

    Raises:
      InputError: none, or a file that is no run's.
    """
    path = Path(directory) / RUN
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(
            f"{directory}: there is no {RUN}; expected a directory that v4jax eval has written"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON; the run's records are lost") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: is no JSON object; expected what v4jax eval writes")
    return found


def read_records(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The whole records of a directory.

    Raises:
      InputError: no records, or a line that is no record.
    """
    path = Path(directory) / RECORDS
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read; expected what v4jax eval writes") from error
    return _parsed(path, raw[: raw.rfind(b"\n") + 1], key_of)


def _parsed(path, raw, key):
    found = []
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            record = json.loads(line)
            key(record)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}:{number}: is no record of a sample; take the line away, and its sample is "
                "run again"
            ) from error
        found.append(record)
    return found


def _quoted(value):
    return json.dumps(value)[:100]
