"""One engine in many processes: process 0 decides, the others make the calls that it makes.

What a step does hangs on arrivals, on clocks and on what is stored where. So the loop runs in
process 0 alone. Whatever it asks of the devices it asks of `Programs`: it says which call it makes,
and the others make the same call, in the same order. They read no result.
"""

import functools
import itertools
import weakref
from typing import Any, NamedTuple

import jax
import numpy as np

from v4jax.errors import InputError

CALLS = frozenset(
    {
        *("warm_up", "fresh_row", "fresh_lane", "read", "read_scored", "first", "put"),
        *("verify", "read_page", "write_page", "read_rest", "write_rest"),
    }
)
_LARGE = 256  # bytes from which an array of one value is sent as that value


class _Known(int):
    """Stands for an array that an earlier call has returned: its number."""


class _Same(NamedTuple):
    """Stands for an array of one value, such as a mask that permits everything."""

    shape: tuple[int, ...]
    value: Any


class Leader:
    """Stands in for `Programs` in process 0: what is called here is called in all processes.

    Args:
      programs: the `Programs` of this process. messages: the `Messages` to the others.
    """

    def __init__(self, programs: Any, messages: Any):
        self._programs, self._messages = programs, messages
        self._numbers = itertools.count()
        self._known: dict[int, tuple[int, Any]] = {}  # by id: number, and what tells of its end
        self._gone: list[int] = []
        self._ended = False

    def __getattr__(self, name):
        found = getattr(self._programs, name)
        return functools.partial(self._call, name, found) if name in CALLS else found

    def end(self) -> None:
        """Lets the others go; a second call does nothing."""
        if not self._ended:
            self._ended = True
            self._messages.send(None)

    def _call(self, name, function, *arguments):
        if self._ended:
            raise InputError("the engine is closed, and other processes have left it")
        gone, self._gone = self._gone, []
        self._messages.send((name, jax.tree.map(self._shown, arguments), gone))
        result = function(*arguments)
        for number, leaf in _numbered(self._numbers, result):
            self._known[id(leaf)] = (number, weakref.ref(leaf, self._forget(id(leaf), number)))
        return result

    def _forget(self, key, number):
        def forget(_):
            if self._known.get(key, (None,))[0] == number:
                del self._known[key]
            self._gone.append(number)

        return forget

    def _shown(self, value):
        """What stands for an argument in a message."""
        if isinstance(value, jax.Array):
            return _Known(self._known[id(value)][0])
        # Of whole numbers only: 0.0 equals -0.0.
        if isinstance(value, np.ndarray) and value.dtype.kind in "biu" and value.nbytes >= _LARGE:
            first = value.reshape(-1)[0]
            if (value == first).all():
                return _Same(value.shape, first)
        return value


def follow(programs: Any, messages: Any) -> None:
    """Makes the calls of process 0 in another process, until it ends them."""
    numbers, known = itertools.count(), {}

    def meant(value):
        if isinstance(value, _Known):
            return known[int(value)]
        return np.full(value.shape, value.value) if isinstance(value, _Same) else value

    while (message := messages.receive()) is not None:
        name, shown, gone = message
        for number in gone:
            del known[number]
        arguments = jax.tree.map(meant, shown, is_leaf=lambda x: isinstance(x, _Same))
        known |= dict(_numbered(numbers, getattr(programs, name)(*arguments)))


def _numbered(numbers, result):
    """The arrays of a call's result with their numbers, which are the same in all processes."""
    leaves = [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)]
    return [(next(numbers), leaf) for leaf in leaves]
