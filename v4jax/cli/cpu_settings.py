"""Settings of a process with which programs run quicker on a CPU. The user's own stay."""

import os
import sys

VARIABLE = "GLIBC_TUNABLES"
TUNABLE = "glibc.malloc.hugetlb"
XLA_VARIABLE = "XLA_FLAGS"
# A training step on two cores takes 0.83 of the time and a fifth less of temporaries: operations
# that read the same arrays become one, and an order that lets more of them run at once gains
# nothing, where most are too small for a second core, and holds more.
TRAINING_FLAGS = {
    "--xla_backend_extra_options": "xla_cpu_use_multi_output_fusion=true",
    "--xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}


def compile_for_training() -> None:
    """Has XLA:CPU compile with TRAINING_FLAGS; to be called before JAX first needs a device."""
    settings = os.environ.get(XLA_VARIABLE, "")
    added = [f"{flag}={value}" for flag, value in TRAINING_FLAGS.items() if flag not in settings]
    os.environ[XLA_VARIABLE] = " ".join(filter(None, [settings, *added]))


def start_again_with_huge_pages() -> None:
    """Replaces this process by the same command with huge pages; returns in that one.

    XLA allocates a program's temporaries anew for each call, and Linux fills them page by page:
    page faults take up to a quarter of a step. glibc reads its settings when a process starts and
    at no other time. Elsewhere than on Linux nothing happens.
    """
    settings = os.environ.get(VARIABLE, "")
    if not sys.platform.startswith("linux") or TUNABLE in settings:
        return
    os.environ[VARIABLE] = ":".join(filter(None, [settings, f"{TUNABLE}=1"]))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
