"""Signals that end a run, in one process or several, between two steps."""

import signal
import threading

import jax

from v4jax.sharding import processes


class Signals:
    """SIGTERM and SIGINT end the loop after the step in flight; a second one ends the process.

    Of several processes one may have its signal a step before another: all begin no other step once
    the first of them has it. Python lets only its main thread listen.
    """

    caught = stop = False

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # None: of a handler that was not installed from Python, and cannot be again.
                self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def share(self):
        """Between two steps, in all processes."""
        with jax.transfer_guard("allow"):
            self.stop = processes.anywhere(self.caught)

    def _note(self, number, _):
        self.caught = True
        signal.signal(number, self._before[number])
