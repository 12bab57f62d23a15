"""The folder in which tests keep compiled programs, from one run to the next."""

import hashlib
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

_LARGEST = 4 << 30  # bytes; a folder that has grown beyond it is begun anew


def folder() -> str:
    """One for each jaxlib and each kind of processor, in the user's cache directory."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = root / "v4jax" / f"tests-{metadata.version('jaxlib')}-{_processor()}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        if sum(each.stat().st_size for each in os.scandir(place)) > _LARGEST:
            shutil.rmtree(place)
            place.mkdir()
    except OSError:  # a home that cannot be written
        return tempfile.mkdtemp(prefix="v4jax_programs_")
    return str(place)


def _processor() -> str:
    """Of the instructions it has: programs hold machine code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:8]
