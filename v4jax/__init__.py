"""v4jax: DeepSeek-V4 in JAX. The public names; everything else is imported by its module.

A name's module is imported when the name is first used, so that `v4jax --help` needs no jax.
"""

import importlib

from v4jax import platforms

__version__ = "0.1.0"

_MODULES = {
    "Cache": "v4jax.model.cache",
    "Engine": "v4jax.engine.engine",
    "InputError": "v4jax.errors",
    "LayerSpec": "v4jax.config",
    "ModelConfig": "v4jax.config",
    "Output": "v4jax.model.output",
    "PrefixCache": "v4jax.engine.prefix_cache",
    "QTensor": "v4jax.quant",
    "Request": "v4jax.engine.request",
    "Tokenizer": "v4jax.infer.tokenizer",
    "Transformer": "v4jax.model.transformer",
    "config_names": "v4jax.named_configs",
    "from_pretrained": "v4jax.checkpoints.load",
    "generate": "v4jax.engine.text",
    "get_config": "v4jax.named_configs",
    "load": "v4jax.checkpoints.load",
    "read_config": "v4jax.hf.config",
    "load_cache": "v4jax.infer.cache_file",
    "save_cache": "v4jax.infer.cache_file",
    "save_official": "v4jax.checkpoints.load",
    "save_orbax": "v4jax.checkpoints.load",
    "stream": "v4jax.engine.text",
}

__all__ = list(_MODULES)


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module 'v4jax' has no attribute {name!r}")
    found = getattr(importlib.import_module(_MODULES[name]), name)
    platforms.settle_process()
    return found


def __dir__():
    return sorted(_MODULES)
