"""What every test runs under: CPU, strict promotion, warnings as errors in our own code."""

import gc
import os
import time
from importlib import metadata

from tests.support import programs

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes nearly all of the tests' time, and twice as long with LLVM's optimisations. Half
# of the rest are JAX 0.10's fusion emitters; later versions die of a flag that they do not know.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + (
        " --xla_cpu_use_fusion_emitters=false --xla_llvm_disable_expensive_passes=true"
        if metadata.version("jaxlib").startswith("0.10.")
        else ""
    ),
)

# A program is compiled once, whichever run, worker, or command that a test starts needs it first.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.folder()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

from pathlib import Path

import jax
import pytest

from tests.support import durations, type_checks

type_checks.install()  # before anything imports v4jax

# Traces make millions of objects that live on; to look through them all again and again for what is
# garbage takes a tenth of the time.
gc.set_threshold(200_000, 20, 100)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser):
    parser.addoption("--keep_durations", action="store_true", help="write tests/durations.json")


def pytest_configure(config):
    if config.getoption("keep_durations"):
        config.pluginmanager.register(durations.Recorder())


def pytest_collection_modifyitems(items):
    durations.order(items)


GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden():
    """The folder of golden numbers; a checkout without it skips those tests."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden numbers at {GOLDEN.parent.name}/{GOLDEN.name} beside the checkout")
    return GOLDEN


# Linux gives a process 65,530 memory maps, and every compiled program takes some: past that XLA
# dies of a segmentation fault.
MAPS = Path("/proc/self/maps")
MANY_MAPS = 35_000


@pytest.fixture(autouse=True)
def _forget_programs():
    """Drops compiled programs once they hold many of the memory maps that a process may have."""
    started = time.process_time()
    yield
    if time.process_time() - started < 0.3:
        return
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
