"""A worker's process: takes tasks from a connection, and ends with it."""

import concurrent.futures
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading

from v4jax.workers.outcome import FAULT, Outcome, outcome_of


def main() -> None:
    """Works until the other end is closed, be it by a kill."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end decides what it means
    connection = multiprocessing.connection.Connection(int(sys.argv[1]))
    os.set_inheritable(connection.fileno(), False)  # its own children do not hold it open
    try:
        make, many, cores = pickle.loads(connection.recv_bytes())
        if cores is not None:
            os.sched_setaffinity(0, cores)
        _Work(connection, make(), many).run()
    except (EOFError, OSError):
        os._exit(0)  # threads at work are left where they are


class _Work:
    def __init__(self, connection, do, many):
        self._connection, self._do = connection, do
        self._pool = concurrent.futures.ThreadPoolExecutor(many)
        self._sending = threading.Lock()

    def run(self):
        self._connection.send(None)
        while True:
            number, task = self._connection.recv()
            self._pool.submit(self._work, number, task)

    def _work(self, number, task):
        outcome = outcome_of(self._do, task)
        try:
            message = pickle.dumps((number, tuple(outcome)))
        except Exception as error:
            message = pickle.dumps((number, tuple(Outcome(FAULT, f"cannot be pickled: {error}"))))
        try:
            with self._sending:
                self._connection.send_bytes(message)
        except OSError:
            os._exit(0)


if __name__ == "__main__":
    main()
