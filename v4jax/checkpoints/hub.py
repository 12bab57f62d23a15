"""Checkpoints in the hub's local cache: a directory of it, or the id `org/name` of a model.

Nothing is downloaded: an id that is not there is answered with the command that does.
"""

import os
import re
from pathlib import Path

from v4jax.errors import InputError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def cached(path: str) -> str:
    """The directory that a path means: itself, a model's newest snapshot, or that of an id.

    Raises:
      InputError: an id that is not in the cache, or a model's directory without a snapshot.
    """
    if os.path.isdir(os.path.join(path, "snapshots")):
        return _snapshot(Path(path))
    if os.path.exists(path) or _ID.fullmatch(path) is None:
        return path
    directory = cache_directory() / f"models--{path.replace('/', '--')}"
    if directory.is_dir():
        return _snapshot(directory)
    raise InputError(
        f"there is no directory {path} here and no model of that id in {cache_directory()}; "
        f"download it with: hf download {path}"
    )


def cache_directory() -> Path:
    """Where the hub's tools keep what they download."""
    if found := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(found).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{home}/huggingface").expanduser() / "hub"


def _snapshot(directory: Path) -> str:
    """The snapshot of the branch `main`; without one the newest."""
    name = directory.name.removeprefix("models--").replace("--", "/")
    snapshots = directory / "snapshots"
    main = directory / "refs" / "main"
    if main.is_file():
        revision = main.read_text(errors="replace").strip()
        # The name of a file in this folder, and of none elsewhere.
        if revision == os.path.basename(revision) and (snapshots / revision).is_dir():
            return str(snapshots / revision)
    there = list(snapshots.iterdir()) if snapshots.is_dir() else []
    if not there:
        raise InputError(f"{directory}: has no snapshot; download it with: hf download {name}")
    return str(max(there, key=lambda each: each.stat().st_mtime))
