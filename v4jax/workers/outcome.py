"""What becomes of a task: a plain value that travels from a worker to the process that gave it."""

import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from v4jax.errors import InputError

VALUE, INPUT, FAULT = "value", "input", "fault"


class Outcome(NamedTuple):
    """kind: VALUE, and what the task gave; INPUT, and the sentence of an `InputError`; FAULT, and
    the traceback of any other exception."""

    kind: str
    value: Any


def outcome_of(do: Callable[[Any], Any], task: Any) -> Outcome:
    """Does a task; whatever it raises is its outcome."""
    try:
        return Outcome(VALUE, do(task))
    except InputError as error:
        return Outcome(INPUT, str(error))
    except Exception:
        return Outcome(FAULT, traceback.format_exc())
