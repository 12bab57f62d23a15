"""Files that are whole or not there: written under a temporary name, synced, renamed."""

import contextlib
import os


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Writes a whole small file, or leaves what was there."""
    with replacing(path) as fd:
        write_at(fd, content, 0)


@contextlib.contextmanager
def replacing(path: str | os.PathLike):
    """A file descriptor whose file gets the name `path` once the body is done and on disk."""
    directory, name = os.path.split(os.fspath(path))
    temporary = os.path.join(directory, f".{name}.tmp")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(directory)


def sync_directory(path: str | os.PathLike) -> None:
    """Makes names created or renamed in a directory survive a power cut."""
    fd = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_at(fd: int, raw, offset: int) -> None:
    """Writes all of the bytes at an offset; `os.pwrite` may write fewer."""
    view = memoryview(raw)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
