"""JAX on the CPU alone where there is no accelerator, so that its plugins stay silent.

JAX starts every plugin that is installed. Without a device the CUDA plugin logs a traceback, and
libtpu looks for a TPU and prints what it did not find. Nothing is decided where the user has
decided, where there may be a device, or where a plugin is installed that this file does not know.
"""

import functools
import glob
import importlib.util
import os
import pkgutil
import sys

VARIABLE = "JAX_PLATFORMS"
# Of NVIDIA's driver (/dev/dxg: in WSL) and of TPUs, as JAX and libtpu look for them.
DEVICES = ("/dev/nvidia*", "/dev/dxg", "/dev/accel*", "/dev/vfio/[0-9]*")
VENDORS = "/sys/bus/pci/devices/*/vendor"
GOOGLE = "0x1ae0"
KNOWN_PLUGINS = frozenset({"xla_cuda12", "xla_cuda13"})


def settle_command() -> None:
    """For a command and its children, before jax is imported."""
    if VARIABLE not in os.environ and only_cpu():
        os.environ[VARIABLE] = "cpu"


def settle_process() -> None:
    """For a library call: in this process, if jax is imported and still free to choose."""
    if "jax" not in sys.modules or VARIABLE in os.environ:
        return
    import jax

    if not jax.config.jax_platforms and only_cpu():
        jax.config.update("jax_platforms", "cpu")


@functools.cache
def only_cpu() -> bool:
    """Whether no device is here for any plugin of JAX that is installed."""
    if not sys.platform.startswith("linux") or _devices():
        return False
    return _plugins() <= KNOWN_PLUGINS


def _devices():
    if any(glob.glob(pattern) for pattern in DEVICES):
        return True
    return any(_read(path).strip() == GOOGLE for path in glob.glob(VENDORS))


def _read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def _plugins():
    """Names of the installed plugins, found as JAX finds them; libtpu is none of these."""
    from importlib import metadata  # 10 ms that most processes do without

    spec = importlib.util.find_spec("jax_plugins")
    folders = spec.submodule_search_locations if spec else None
    found = {module.name for module in pkgutil.iter_modules(folders)} if folders else set()
    listed = metadata.entry_points(group="jax_plugins")
    return found | {entry.value.partition(":")[0].rpartition(".")[2] for entry in listed}
