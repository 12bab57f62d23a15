"""Deletes what is kept of a key, of a request, or from before some day: log and prefixes.

Prefixes carry the key's id as their salt. Requests of one key share pages, so that forgetting one
request forgets all prefixes of its key, which costs only that they are read again.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from v4jax.engine.prefix_files import forget_files, tag_of
from v4jax.errors import InputError
from v4jax.files.atomic import replacing, write_at
from v4jax.serve.audit import DAY, FORGOTTEN, files, locked, mend


class Forgotten(NamedTuple):
    """How many lines and prefix files were deleted."""

    lines: int
    files: int


def forget(
    audit: str | os.PathLike | None,
    prefixes: str | os.PathLike | None,
    *,
    key: str | None = None,
    request: str | None = None,
    older_than_days: float | None = None,
) -> Forgotten:
    """Deletes lines of the log in `audit` and files of the prefix cache in `prefixes`.

    Args:
      key, request: its id. older_than_days: what is older goes; of prefixes what nobody has used
        since. Exactly one of the three.

    Raises:
      InputError: none or several of them, or a request that the log does not know.
    """
    if sum(each is not None for each in (key, request, older_than_days)) != 1:
        raise InputError("expected one of --key, --request and --older_than_days: what to delete")
    for directory in (audit, prefixes):
        if directory is not None and not Path(directory).is_dir():
            raise InputError(
                f"there is no directory {str(directory)[:200]}; give one that is there"
            )
    if request is not None and audit is None:
        raise InputError("--request needs --audit: the log says whose request it was")
    lines, salts = 0, {key} - {None}
    if audit is not None:
        before = None if older_than_days is None else time.time() - older_than_days * DAY
        with locked(audit):
            for path in files(audit):
                gone = _cut(path, key, request, before)
                lines += len(gone)
                if request is not None:
                    salts |= {line["key"] or "" for line in gone}
            if request is not None and not lines:
                raise InputError(
                    f"{audit}: there is no request {request[:80]!r} in the log; expected an id as "
                    "the response's header x-request-id gave it"
                )
            _tell(Path(audit), salts, request, older_than_days)
    removed = 0
    if prefixes is not None:
        for salt in salts:
            removed += forget_files(prefixes, tag=tag_of(salt))
        if older_than_days is not None:
            removed += forget_files(prefixes, unused_seconds=older_than_days * DAY)
    return Forgotten(lines, removed)


def _cut(path, key, request, before) -> list[dict[str, Any]]:
    """Takes lines out of a file; those that were taken."""
    mend(path)
    kept, gone = [], []
    for line in path.read_bytes().splitlines(keepends=True):
        said = json.loads(line)
        drop = (
            (key is not None and said["key"] == key)
            or (request is not None and said["request"] == request)
            or (before is not None and said["time"] < before)
        )
        if drop:
            gone.append(said)
        else:
            kept.append(line)
    if gone:
        with replacing(path) as file:
            os.fchmod(file, 0o600)
            write_at(file, b"".join(kept), 0)
    return gone


def _tell(directory, salts, request, older_than_days):
    """Leaves word for a server that runs, which has prefixes in memory."""
    entry = {
        "time": time.time(),
        "salts": sorted(salts),
        "request": request,
        "older_than_days": older_than_days,
    }
    path = directory / FORGOTTEN
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(file, json.dumps(entry).encode() + b"\n")
    finally:
        os.close(file)


class Watch:
    """What `forget` has asked of this server since it began; for one thread at a time.

    Args:
      audit: the log's directory.
    """

    def __init__(self, audit: str | os.PathLike):
        self._path = Path(audit) / FORGOTTEN
        with locked(audit):
            self._path.unlink(missing_ok=True)  # what was asked before there was anything in memory
        self._seen = 0

    def news(self) -> list[dict[str, Any]]:
        """What was asked since the last call."""
        try:
            content = self._path.read_bytes()[self._seen :]
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._seen += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
