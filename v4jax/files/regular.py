"""Opens files to be read, and nothing else: a pipe would block for ever, a device never end."""

import errno
import os
import stat

from v4jax.errors import InputError

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_GET_AGAIN = "download or copy it again"


def open_regular(path: str | os.PathLike, cure: str = _GET_AGAIN) -> int:
    """Opens a regular file, or a link to one, for reading.

    Args:
      cure: what to do where there is no such file.

    Returns:
      The file descriptor, which the caller closes.

    Raises:
      InputError: no such file, it may not be read, or it is a pipe, socket, device or directory.
    """
    path = os.fspath(path)
    # Opening a pipe waits for somebody who writes, unless it is told not to; nothing else cares.
    flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
    try:
        fd = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise InputError(_why_not(path, error, cure)) from None
    try:
        _check_mode(path, os.fstat(fd).st_mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_regular(path: str | os.PathLike, cure: str = _GET_AGAIN) -> None:
    """What `open_regular` checks, for a library that opens the file itself."""
    os.close(open_regular(path, cure))


def check_regular_below(folder: str | os.PathLike) -> None:
    """Refuses a pipe, socket or device anywhere in a folder, without opening a file."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    check_regular_below(entry.path)
                elif not entry.is_file():
                    _check_mode(entry.path, entry.stat().st_mode)
    except OSError as error:
        raise InputError(_why_not(error.filename or folder, error, _GET_AGAIN)) from None


def read_regular(
    path: str | os.PathLike, limit: int | None = None, cure: str = _GET_AGAIN
) -> bytes:
    """A regular file's content.

    Args:
      limit: the most bytes that such a file may have.
      cure: what to do where there is no such file.

    Raises:
      InputError: as `open_regular`; or the file is larger.
    """
    with os.fdopen(open_regular(path, cure), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise InputError(
                f"{os.fspath(path)}: has {size:,} bytes; expected at most {limit:,}, so this is "
                "not such a file: get the right one"
            )
        try:
            # Files of /proc say that they have no bytes, and some of them do not end.
            content = file.read() if limit is None else file.read(limit + 1)
        except OSError as error:
            raise InputError(_why_not(os.fspath(path), error, cure)) from None
    if limit is not None and len(content) > limit:
        raise InputError(f"{os.fspath(path)}: has over {limit:,} bytes; get the right file")
    return content


def _check_mode(path, mode):
    if stat.S_ISREG(mode):
        return
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no file")
    raise InputError(f"{path}: is {kind}; expected a regular file, so put the file there")


def _why_not(path, error, cure):
    if isinstance(error, ValueError):  # a name with a NUL
        return f"{path!r} cannot name a file ({error}); give another name"
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file; {cure}"
    if error.errno == errno.ENXIO:  # what opening a socket says
        return f"{path}: is a socket or a device; expected a regular file, so put the file there"
    return f"{path}: cannot be read ({error.strerror}); mend its permissions or give another"
