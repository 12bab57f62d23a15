"""Config files: Python with a `get_config()` that gives a `TrainConfig`, or a model to train."""

import contextlib
import importlib.util
import traceback
from pathlib import Path
from types import ModuleType

from v4jax import named_configs
from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.train.config import TrainConfig, override


def read(path: str, overrides: dict[str, str] | None = None) -> TrainConfig:
    """Runs a file's get_config() and sets fields by name.

    Args:
      path: the file, or the name of one of configs/. A `ModelConfig` out of it is trained with the
        defaults of `TrainConfig`.
      overrides: values as text by dotted name.

    Raises:
      InputError: no such file, a mistake in it, no such field.
    """
    config = _get_config(path)
    if isinstance(config, ModelConfig):
        config = TrainConfig(model=config)
    if not isinstance(config, TrainConfig):
        raise InputError(
            f"{path}: get_config() gives {type(config).__name__}; expected a TrainConfig or a "
            "ModelConfig"
        )
    return override(config, overrides or {})


def run_file(path: Path) -> ModuleType:
    """The module that a Python file is; mistakes in it are named by file and line.

    Raises:
      InputError: it cannot be read, or running it raises something.
    """
    with _its_mistakes(path):
        path.read_bytes()  # the import system would not say whose file it cannot read
    spec = importlib.util.spec_from_file_location(f"v4jax_file_{path.stem}", path)
    if spec is None:
        raise InputError(f"{path}: is no Python file; expected a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    with _its_mistakes(path):
        spec.loader.exec_module(module)
    return module


def find_file(path: str | Path, named_by: str, cure: str) -> Path:
    """A path that is a file.

    Args:
      named_by: the flag, for the message. cure: what to give instead.

    Raises:
      InputError: there is none, or something that is no file.
    """
    path = Path(path)
    with _its_mistakes(path):
        if path.is_file():
            return path
        there = path.exists()
    found = "that is no file" if there else "there is no such file"
    raise InputError(f"{named_by} {str(path)[:200]}: {found}; {cure}")


def _get_config(path):
    file = named_configs.config_file(str(path))
    if file is None:
        names = ", ".join(named_configs.recipe_names() + named_configs.config_names())
        file = find_file(path, "--config", f"give a Python file, or one of {names}")
    module = run_file(file)
    if not hasattr(module, "get_config"):
        raise InputError(f"{path}: has no get_config(); see configs/train_tiny.py")
    with _its_mistakes(file):
        return module.get_config()


@contextlib.contextmanager
def _its_mistakes(path):
    """Whatever a file of the user's raises, as a sentence with its line."""
    name = str(path)[:200]
    try:
        yield
    except InputError:
        raise
    except SyntaxError as error:
        raise InputError(f"{name}:{error.lineno}: {error.msg}; correct it") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if isinstance(error, OSError) and not lines:
            raise InputError(f"{name}: cannot be read ({error.strerror}); give another") from error
        where = f"{name}:{lines[-1]}" if lines else name
        raise InputError(f"{where}: {said}; correct it") from error
