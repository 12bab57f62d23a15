"""What workers of the tests do."""

import os
import signal
import time
from pathlib import Path

from v4jax.errors import InputError


class Doer:
    """Does a task (name, argument); "die_once" kills its worker if a file is not there yet."""

    def __call__(self, task):
        name, value = task
        return getattr(self, name)(value)

    def square(self, value):
        return value * value

    def slow(self, value):
        time.sleep(value)
        return os.getpid()

    def who(self, value):
        return os.getpid()

    def refuse(self, value):
        raise InputError(f"{value} is not to be done")

    def fail(self, value):
        raise KeyError(value)

    def die(self, value):
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self, value):
        os._exit(value)

    def die_once(self, path):
        try:
            Path(path).touch(exist_ok=False)
        except FileExistsError:
            return "done"
        os.kill(os.getpid(), signal.SIGKILL)
