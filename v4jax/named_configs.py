"""`get_config(name)`: the model that a file of configs/ describes.

The files lie next to the package in a checkout, and inside it as `v4jax.configs` once installed.
"""

import importlib.util
from pathlib import Path

from v4jax.config import ModelConfig
from v4jax.errors import InputError

_RECIPES = ("train_", "draft_")


def get_config(name: str) -> ModelConfig:
    """Runs `get_config()` of configs/<name>.py.

    Raises:
      InputError: there is no such file; the message lists the names.
    """
    names = config_names()
    if name not in names:
        raise InputError(f"there is no config {name!r}; expected one of {', '.join(names)}")
    spec = importlib.util.spec_from_file_location(
        f"v4jax.configs.{name}", _directory() / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None  # the file is there
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def config_names() -> list[str]:
    """The names that `get_config` takes: models, not recipes."""
    names = sorted(path.stem for path in _directory().glob("*.py"))
    return [name for name in names if name != "__init__" and not name.startswith(_RECIPES)]


def config_file(name: str) -> Path | None:
    """The file of a name, recipes among them; None where there is none."""
    found = {path.stem: path for path in _directory().glob("*.py")}
    return None if name == "__init__" else found.get(name)


def recipe_names() -> list[str]:
    """The names of the recipes: of models, train_*.py, then of drafts, draft_*.py."""
    return [path.stem for kind in _RECIPES for path in sorted(_directory().glob(f"{kind}*.py"))]


def _directory():
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
