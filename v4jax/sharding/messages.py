"""Values from process 0 to all others, in order, over the coordinator.

Not over the devices: those give up on a process that makes the others wait for long.
"""

import itertools
import pickle
from typing import Any

import jax

from v4jax.sharding import processes

_PATIENCE = 10_000  # milliseconds of one look for the next message; then comes another
_AT_ONCE = (1024, 64 << 20)  # messages and bytes that the coordinator keeps at most

_channels = itertools.count()  # all processes count alike


class Messages:
    """One sequence of values; all processes make theirs at the same point of the program.

    The others unpickle what process 0 sends: they run its program anyway.
    """

    def __init__(self):
        # JAX has no public name for the client, which Orbax uses as well.
        from jax._src import distributed

        self._client = distributed.global_state.client
        self._name = f"v4jax_messages_{next(_channels)}"
        self._part, self._count, self._bytes = 0, 0, 0

    def send(self, value: Any) -> None:
        """Tells all others; in process 0."""
        text = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        self._client.key_value_set_bytes(self._key(), text)
        self._passed(len(text))

    def receive(self) -> Any:
        """The next value, however long it takes; in the other processes."""
        text = None
        while text is None:
            try:
                text = self._client.blocking_key_value_get_bytes(self._key(), _PATIENCE)
            except jax.errors.JaxRuntimeError as error:
                if not str(error).startswith("DEADLINE_EXCEEDED"):
                    raise
        self._passed(len(text))
        return pickle.loads(text)

    def _key(self):
        return f"{self._name}/{self._part}/{self._count}"

    def _passed(self, size):
        """Now and then all meet, so that the coordinator can forget what all have read."""
        self._count, self._bytes = self._count + 1, self._bytes + size
        if self._count < _AT_ONCE[0] and self._bytes < _AT_ONCE[1]:
            return
        folder = f"{self._name}/{self._part}"
        self._client.wait_at_barrier(f"{folder}/read", 1000 * processes.COMPILE_SECONDS)
        if processes.index() == 0:
            self._client.key_value_delete(folder)
        self._part, self._count, self._bytes = self._part + 1, 0, 0
