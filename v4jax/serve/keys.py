"""Who may ask: a file of keys, of which it holds the SHA-256 and never the key.

The file is JSON: {"keys": [{"id", "sha256", "name", "models", "endpoints", ...}]}; see `Key`. It is
written whole or not at all, and read again whenever it changes.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import stat
import time
from pathlib import Path
from typing import Any

from v4jax.errors import InputError
from v4jax.files.atomic import replacing, write_at
from v4jax.files.writing import writing

ENDPOINTS = (
    *("chat", "completions", "responses", "messages", "models", "tokenize", "metrics", "lens"),
)
DEFAULT_ENDPOINTS = ENDPOINTS[:6]  # the operator's are given by name
_PREFIX = "v4jax-"
_MAX_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Key:
    """What the file says of one key.

    Attributes:
      id: names it in the audit log, and separates its prefixes from others'.
      sha256: of the key, in hexadecimal.
      name: for people.
      models: names that it may ask; none: all. endpoints: some of `ENDPOINTS`.
      requests_per_minute, tokens_per_minute, concurrent, max_context: limits, or None. Tokens are
        those of prompts and answers, max_context those of one prompt with its answer.
      created, expires: seconds since the epoch; None: it does not expire.
    """

    id: str
    sha256: str
    name: str
    models: tuple[str, ...] = ()
    endpoints: tuple[str, ...] = DEFAULT_ENDPOINTS
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    max_context: int | None = None
    created: float = 0.0
    expires: float | None = None

    def __post_init__(self):
        unknown = set(self.endpoints) - set(ENDPOINTS)
        if unknown:
            raise InputError(
                f"the endpoint {sorted(unknown)[0]!r} is not one of {', '.join(ENDPOINTS)}"
            )
        for name in ("requests_per_minute", "tokens_per_minute", "concurrent", "max_context"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name} is {value!r}; expected a whole number, 1 or more")

    def expired(self, now: float) -> bool:
        return self.expires is not None and now >= self.expires


class KeyFile:
    """A key file that a server reads; `find` reads it again when it has changed.

    Raises:
      InputError: it cannot be read, others can write it, or it is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = Path(path)
        self._seen: tuple | None = None
        self._keys: list[Key] = []
        self._read_again()

    def find(self, presented: str) -> Key | None:
        """The key that was presented, compared in a time that tells nothing of the others.

        Raises:
          InputError: the file has become unusable: nobody may ask then.
        """
        self._read_again()
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _read_again(self):
        try:
            about = os.stat(self._path)
        except (OSError, ValueError) as error:
            self._seen = None
            raise _unreadable(self._path, error) from error
        seen = (about.st_mtime_ns, about.st_size, about.st_ino, about.st_mode)
        if seen != self._seen:
            self._seen = None  # until it was read
            self._keys = read_keys(self._path)
            self._seen = seen


def read_keys(path: str | os.PathLike) -> list[Key]:
    """The keys of a file.

    Raises:
      InputError: it cannot be read, others can write it, or it is damaged.
    """
    path = Path(path)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise OSError("it is no regular file")
            if about.st_mode & stat.S_IWOTH:
                raise InputError(
                    f"{path}: every user can write it; expected a key file that only its owner "
                    f"can write: chmod 600 {path}, and look for keys that are not yours"
                )
            content = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _unreadable(path, error) from error
    if len(content) > _MAX_BYTES:
        raise InputError(f"{path}: has more than {_MAX_BYTES} bytes; expected a file of keys")
    return _parsed(path, content)


def create(path: str | os.PathLike, name: str, **options: Any) -> tuple[str, Key]:
    """Adds a key to a file, which is made if need be; the key itself, shown once, and its entry.

    Args:
      options: further fields of `Key`.
    """
    secret = _PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    key = Key(secrets.token_hex(8), digest, name, created=time.time(), **options)
    with _changing(Path(path), make=True) as keys:
        keys.append(key)
    return secret, key


def revoke(path: str | os.PathLike, which: str) -> list[Key]:
    """Removes the keys with this id or name; those that were removed.

    Raises:
      InputError: there is none.
    """
    with _changing(Path(path)) as keys:
        gone = [key for key in keys if which in (key.id, key.name)]
        if not gone:
            raise InputError(
                f"{path}: there is no key with the id or name {which[:80]!r}; v4jax keys list "
                "shows those that there are"
            )
        keys[:] = [key for key in keys if key not in gone]
    return gone


@contextlib.contextmanager
def _changing(path: Path, make: bool = False):
    """The keys of a file as a list, which is written back; one process at a time."""
    with writing(path):
        lock = open(path.with_name(f".{path.name}.lock"), "ab")  # noqa: SIM115
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = [] if make and not path.exists() else read_keys(path)
        yield keys
        entries = [dataclasses.asdict(key) for key in keys]
        content = json.dumps({"keys": entries}, indent=1).encode() + b"\n"
        with writing(path), replacing(path) as file:
            os.fchmod(file, 0o600)
            write_at(file, content, 0)


def _parsed(path, content) -> list[Key]:
    try:
        entries = json.loads(content)["keys"]
        keys = [_key(entry) for entry in entries]
    except InputError as error:
        raise InputError(f"{path}: {error}; correct the file, or make a new one") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: is not a key file ({type(error).__name__}); expected what v4jax keys create "
            "writes: restore it, or make a new one"
        ) from None
    if len({key.id for key in keys}) < len(keys):
        raise InputError(f"{path}: two keys have the same id; remove one of them")
    return keys


def _key(entry) -> Key:
    known = {field.name for field in dataclasses.fields(Key)}
    if unknown := set(entry) - known:
        raise InputError(f"a key has the field {sorted(unknown)[0][:80]!r}, which there is not")
    texts = {name: entry[name] for name in ("id", "sha256", "name")}
    lists = {name: tuple(entry.get(name, ())) for name in ("models", "endpoints") if name in entry}
    for value in (*texts.values(), *(text for each in lists.values() for text in each)):
        if not isinstance(value, str):
            raise InputError("a key has a value that is no text where text is expected")
    for name in ("created", "expires"):
        if not isinstance(entry.get(name), int | float | None) or entry.get(name) is True:
            raise InputError(f"a key has a value of {name} that is no number")
    if len(texts["sha256"]) != 64 or not texts["sha256"].isascii():
        raise InputError("a key's sha256 has not 64 characters")
    return Key(**(entry | texts | lists))


def _unreadable(path, error):
    reason = getattr(error, "strerror", None) or str(error)[:200]
    return InputError(
        f"the key file {str(path)[:200]} cannot be read ({reason}); expected a file that this "
        "user can read: v4jax keys create makes one"
    )
