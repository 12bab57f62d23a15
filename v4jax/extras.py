"""How to install what an extra of the package needs, from wherever the package came."""

import importlib.util
import json
import re
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

from v4jax.errors import InputError


def require(module: str, extra: str, what: str) -> None:
    """Raises `InputError` where a module that `what` needs is not installed."""
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{what} needs {module}, which is not installed: {how_to_install(extra)}")


def how_to_install(extra: str) -> str:
    """The pip command for an extra: of the checkout, or of its packages by name."""
    checkout, editable = _checkout()
    if checkout is not None:
        return f"pip install {'-e ' if editable else ''}'{checkout}[{extra}]'"
    return "pip install " + " ".join(f"'{name}'" for name in _packages(extra))


def _checkout():
    """The directory that the package was installed from, if it is still there, and how."""
    parent = Path(__file__).resolve().parents[1]
    if (parent / "pyproject.toml").is_file():
        return parent, True
    try:
        text = metadata.distribution("v4jax").read_text("direct_url.json")
        described = json.loads(text or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None, False
    url = urlparse(described.get("url", ""))
    directory = Path(unquote(url.path))
    if url.scheme != "file" or not (directory / "pyproject.toml").is_file():
        return None, False
    return directory, bool(described.get("dir_info", {}).get("editable"))


def _packages(extra):
    """The requirements that the installed package lists for an extra."""
    listed = metadata.requires("v4jax") or []
    mark = re.compile(rf"""extra\s*==\s*["']{re.escape(extra)}["']""")
    return [line.split(";")[0].strip() for line in listed if mark.search(line)]
