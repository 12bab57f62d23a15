"""Directories and files that a command is to write: what the system refuses becomes a sentence."""

import contextlib
import os
import tempfile
from pathlib import Path

from v4jax.errors import InputError

_CURE = "free space or mend what is in the way, and run the same command again"


def writable_directory(path: str | os.PathLike, flag: str) -> Path:
    """Makes a directory where there is none, and tries to write in it.

    Args:
      flag: what named it, for the message.

    Raises:
      InputError: a file is in the way, or the system lets nothing be written there.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(
            f"{flag} {str(path)[:200]}: cannot be used ({_reason(error)}); expected a directory "
            "that may be written, or a place for a new one: give another"
        ) from error
    return path


def writable_file(path: str | os.PathLike, flag: str, suffix: str = "") -> None:
    """Tries the place of a file before the work whose result it is to hold; leaves nothing there.

    Args:
      flag: what named it, for the message.
      suffix: how its name has to end.

    Raises:
      InputError: no such directory, one that may not be written, or something else in the way.
    """
    path = Path(path)
    if not path.name.lower().endswith(suffix):
        raise InputError(f"{flag} is {str(path)[:200]!r}; expected a file's name with {suffix}")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
        _check_name(path)
        if path.exists() and not path.is_file():
            raise OSError("a directory is in the way" if path.is_dir() else "it is no regular file")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(
            f"{flag} {str(path)[:200]}: cannot be written ({_reason(error)}); expected a file in a "
            "directory that is there and may be written: give another"
        ) from error


def possible_directory(path: str | os.PathLike, flag: str) -> None:
    """Tries whether a directory could be made, or written where it is there; makes nothing.

    Raises:
      InputError: a file is in the way, or the system lets nothing be written there.
    """
    above = Path(path).absolute()
    try:
        _check_name(above)
        while not os.path.lexists(above):
            above = above.parent
        tempfile.TemporaryFile(dir=above).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{flag} {str(path)[:200]}: cannot be written ({str(above)[:200]}: {_reason(error)}); "
            "expected a directory that may be written, or a place for a new one: give another"
        ) from error


def refused(path: str | os.PathLike, error: OSError, also: str = "") -> InputError:
    """The error for a file that could not be written, to be raised from `error`.

    Args:
      also: what the reader should know besides, such as what is safe.
    """
    also = f"{also}, so " if also else ""
    return InputError(f"{str(path)[:200]}: cannot be written ({_reason(error)}); {also}{_CURE}")


@contextlib.contextmanager
def writing(path: str | os.PathLike):
    """Its body writes the file; an OSError (a full disk, a directory in the way) becomes `refused`.

    The body should do nothing else that may raise one.
    """
    try:
        yield
    except OSError as error:
        raise refused(path, error) from error


def append(file, content: bytes) -> None:
    """Writes all of the bytes to an unbuffered file, which may take fewer at a time.

    Nothing is left in a buffer that would fail once more when the file is closed.
    """
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def _check_name(path):
    """Raises where a name cannot be any file's (a NUL, too long), there or not."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(path)


def _reason(error):
    if isinstance(error, FileExistsError):
        return "a file is in the way"
    return getattr(error, "strerror", None) or str(error)[:200]
