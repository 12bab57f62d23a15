"""What a conversion has finished so far, kept in its target so that it can go on after a crash.

`.incomplete` holds JSON lines: the first says what is converted into what, each further one names
a finished item and the CRC-32 of its tensors. A line is on disk before the next item begins; a
line without its end, from a crash in the middle, does not count. Where several processes convert,
process 0 keeps that file and each other one `.incomplete.N`, of the same form.
"""

import glob
import json
import os
import shutil

from v4jax.checkpoints.source import JOURNAL_NAME
from v4jax.errors import InputError
from v4jax.files.atomic import sync_directory, write_atomically
from v4jax.files.json_reader import Fields, parse_json, word
from v4jax.files.regular import read_regular


class Journal:
    """The journal of one conversion, begun or resumed.

    Args:
      process: which process keeps it. That of process 0 takes in what the others of an earlier run
        had finished; it must be there before another is made.

    Attributes:
      done: item -> checksums of its tensors, for every item that is finished.

    Raises:
      InputError: the directory holds something else, or the start of another conversion.
    """

    def __init__(self, directory: str, purpose: dict[str, str], process: int = 0):
        first = os.path.join(directory, JOURNAL_NAME)
        self._path = f"{first}.{process}" if process else first
        self._purpose = purpose
        self.done: dict[str, dict[str, int]] = {}
        if process:
            pass
        elif os.path.exists(self._path):
            self._resume(directory, purpose)
        else:
            os.makedirs(directory, exist_ok=True)
            # A run that was killed at its very first write leaves only that file.
            if set(os.listdir(directory)) - {f".{JOURNAL_NAME}.tmp"}:
                raise InputError(
                    f"{directory}: is not empty; choose a new directory, or pass --verify to "
                    "compare the checkpoint in it with the source"
                )
        self._write()
        for other in self._others() if not process else ():
            os.unlink(other)

    def add(self, item: str, checksums: dict[str, int]) -> None:
        """Notes that an item is finished."""
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, (_line(item, checksums) + "\n").encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        self.done[item] = checksums

    def take_in(self) -> None:
        """Adds what the other processes have finished; their journals then may go."""
        for other in self._others():
            begun, entries = _read(other)
            if begun == self._purpose:
                self.done |= entries

    def close(self) -> None:
        """Ends the conversion: the directory is whole."""
        for path in (*self._others(), self._path):
            os.unlink(path)
        sync_directory(os.path.dirname(self._path))

    def _write(self):
        lines = [json.dumps(self._purpose)] + [_line(*entry) for entry in self.done.items()]
        write_atomically(self._path, "".join(line + "\n" for line in lines).encode())

    def _others(self):
        return glob.glob(glob.escape(self._path) + ".[0-9]*")

    def _resume(self, directory, purpose):
        begun, self.done = _read(self._path)
        if begun != purpose:
            changed = [name for name in purpose if begun.get(name) != purpose[name]]
            source, to, weights = (word(str(begun.get(n))) for n in ("source", "to", "weights"))
            raise InputError(
                f"{directory}: holds the unfinished conversion of {source} to {to} with weights "
                f"{weights}; this one differs in {' and '.join(changed)}, so finish that one or "
                "remove the directory"
            )
        self.take_in()
        _remove_temporaries(directory)


def _read(path):
    """What was begun, and the items that are finished."""
    try:
        first, *lines = read_regular(path).decode().split("\n")
        begun = Fields(parse_json(first, path), path).of_strings()
        entries = [Fields(parse_json(line, path), path) for line in lines[:-1]]
        done = {entry.string("item"): entry.object("crc32").of_integers(low=0) for entry in entries}
    except (InputError, UnicodeDecodeError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise InputError(
            f"{path}: cannot be understood ({reason}); remove the directory and start the "
            "conversion again"
        ) from None
    return begun, done


def _line(item, checksums):
    return json.dumps({"item": item, "crc32": checksums}, separators=(",", ":"))


def _remove_temporaries(directory):
    """Removes what was half written when the earlier run was killed."""
    for folder in (directory, os.path.join(directory, "items")):
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            path = os.path.join(folder, name)
            if name.startswith(".") and name.endswith(".tmp"):
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
