"""What a run notes down: DIR/metrics.jsonl, and the same for TensorBoard."""

import json
import time
from pathlib import Path
from typing import Any

from v4jax.errors import InputError
from v4jax.files.atomic import write_atomically
from v4jax.files.json_reader import parse_json
from v4jax.files.writing import append, writing
from v4jax.train.events import EventFile

FILE = "metrics.jsonl"


class Metrics:
    """Appends a line per logged step to metrics.jsonl and to a TensorBoard event file.

    Args:
      step: the step that the run goes on from; lines of later ones, from a run that was killed
        after its last checkpoint, are dropped: they will be written again. Damaged lines are too.

    Attributes:
      damaged: how many those were.

    Raises:
      InputError: files that cannot be read or made, a full disk.
    """

    def __init__(self, workdir: Path, step: int):
        path = workdir / FILE
        before = _content(path)
        found = list(_lines(before))
        # A kill may have cut off the last line; any other that is no line is damage.
        self.damaged = sum(line is None for _, line in found[:-1])
        self.damaged += bool(found) and found[-1][1] is None and before.endswith(b"\n")
        kept = b"".join(raw + b"\n" for raw, line in found if line and line["step"] <= step)
        with writing(path):
            if kept != before:
                write_atomically(path, kept)
            self._file = path.open("ab", buffering=0)
        self._events = EventFile(workdir / f"events.out.tfevents.{int(time.time())}.v4jax")

    def write(self, line: dict[str, Any]) -> None:
        append(self._file, json.dumps(line).encode() + b"\n")
        self._events.write(line["step"], {k: v for k, v in line.items() if k != "step"})

    def close(self) -> None:
        self._file.close()
        self._events.close()


def read(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run so far: objects of numbers (or null: no such figure) with a "step".

    What a kill cut off or damage made of a line does not count.

    Raises:
      InputError: the file cannot be read.
    """
    return [line for _, line in _lines(_content(workdir / FILE)) if line]


def _content(path):
    name = str(path)[:200]
    try:
        if not path.exists():
            return b""
        if not path.is_file():
            raise InputError(f"{name}: is no regular file; expected the metrics of a run")
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{name}: cannot be read ({error.strerror}); mend that, or give another directory"
        ) from error


def _lines(content):
    """Pairs of a line's bytes and what it says, None where that is not what `write` writes."""
    for raw in content.split(b"\n"):
        if not raw:
            continue
        try:
            line = parse_json(raw.decode(), FILE, watched=frozenset(), nan=True)
        except ValueError:  # no UTF-8, no JSON, or nested without end
            line = None
        yield raw, line if _is_line(line) else None


def _is_line(line):
    if not isinstance(line, dict) or not all(map(_is_figure, line.values())):
        return False
    return isinstance(line.get("step"), int) and line["step"] > 0


def _is_figure(value):
    if value is None or isinstance(value, float):
        return True
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
