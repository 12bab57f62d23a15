"""Config files: Python with a `get_config()` that gives a `TrainConfig`, or a model to train."""

import importlib.util
from pathlib import Path

from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.train.config import TrainConfig, override


def read(path: str, overrides: dict[str, str] | None = None) -> TrainConfig:
    """Runs a file's get_config() and sets fields by name.

    Args:
      path: the file. A `ModelConfig` out of it is trained with the defaults of `TrainConfig`.
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


def _get_config(path):
    file = Path(path)
    if not file.is_file():
        raise InputError(f"--config {path}: there is no such file; give one of configs/*.py")
    spec = importlib.util.spec_from_file_location(f"v4jax_config_{file.stem}", file)
    if spec is None:
        raise InputError(f"--config {path}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"{path}:{error.lineno}: {error.msg}") from None
    if not hasattr(module, "get_config"):
        raise InputError(f"{path}: has no get_config(); see configs/train_tiny.py")
    return module.get_config()
