"""Huge pages for what glibc allocates: page faults take up to a quarter of a step on a CPU.

XLA allocates a program's temporaries anew for each call, and Linux fills them page by page.
"""

import os
import sys

VARIABLE = "GLIBC_TUNABLES"
TUNABLE = "glibc.malloc.hugetlb"


def start_again() -> None:
    """Replaces this process by the same command with huge pages; returns in that one.

    glibc reads its settings when a process starts and at no other time. A setting of the user's
    own, of this kind, stays as it is. Elsewhere than on Linux nothing happens.
    """
    settings = os.environ.get(VARIABLE, "")
    if not sys.platform.startswith("linux") or TUNABLE in settings:
        return
    os.environ[VARIABLE] = ":".join(filter(None, [settings, f"{TUNABLE}=1"]))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
