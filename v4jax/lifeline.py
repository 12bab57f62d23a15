"""Child processes that end with their parent, also with one that was killed.

The parent holds the writing end of a pipe and never writes. The system closes it when the parent
ends, however that happens, and the child, which reads, ends then too. This works wherever there are
pipes; Linux alone could signal a parent's death.
"""

import os
import stat
import subprocess
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

VARIABLE = "V4JAX_LIFELINE"  # of the child: the number of its end


class Child(subprocess.Popen):
    """A `v4jax` command (or whatever calls `watch`) that ends when this process does.

    It ends as well when this object is no longer referred to.

    Args:
      command, options: as of subprocess.Popen. environment: all of its variables; None: ours.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        **options: Any,
    ):
        theirs, ours = os.pipe()  # neither end is inherited unless it is passed on
        weakref.finalize(self, os.close, ours)
        environment = os.environ if environment is None else environment
        try:
            super().__init__(
                command,
                env={**environment, VARIABLE: str(theirs)},
                pass_fds=(*pass_fds, theirs),
                **options,
            )
        finally:
            os.close(theirs)


def watch() -> None:
    """Has this process end at once when the parent that started it as a `Child` ends.

    Does nothing in a process that nobody started so. Its own children do not inherit this.
    """
    number = os.environ.pop(VARIABLE, "")
    if not number.isdecimal():
        return
    try:
        if not stat.S_ISFIFO(os.fstat(int(number)).st_mode):
            return
        os.set_inheritable(int(number), False)
    except OSError:  # the variable came by another way than the pipe
        return
    threading.Thread(target=_wait, args=(int(number),), name="lifeline", daemon=True).start()


def _wait(end):
    while os.read(end, 1):
        pass
    os._exit(1)  # nobody is left who could want what is under way
