"""LoRA: frozen weights plus a product of two thin matrices, on attention and experts.

The adapters are a subtree "lora" of params with the paths of what they adapt: a [..., r, in] and
b [..., out, r], leading axes (layers, experts) those of the weight. The model never sees them: a
step merges them into its weights, and so does the export.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from v4jax.errors import InputError
from v4jax.train.optimizer import moved
from v4jax.train.tree_paths import by_path
from v4jax.weights import ZEROS, Initializer, Weight

SUBTREE = "lora"
ALL_ELSE = f"^(?!{SUBTREE}/)"  # a pattern of every other parameter


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights get an adapter, and of what size.

    Attributes:
      rank: r; None for no LoRA at all. alpha: the product is scaled by alpha / rank.
      adapted: a regular expression searched in the paths of the matrices.
    """

    rank: int | None = None
    alpha: float = 16.0
    adapted: str = r"/attn/w(q_a|q_b|kv|o_a|o_b)/|/experts/w[123]$"

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise InputError(f"lora.rank is {self.rank}; expected 1 or more, or None for no LoRA")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def declared(of: Mapping[str, Weight], config: LoraConfig) -> dict[str, Weight]:
    """The adapters of a model's parameters by path, beside those of `weights.parameters`."""
    adapters = {}
    for name, weight in of.items():
        if not re.search(config.adapted, name):
            continue
        *lead, out, features = weight.shape
        *axes, rows, columns = weight.axes
        init = Initializer("normal", features**-0.5)
        a = Weight((*lead, config.rank, features), (*axes, None, columns), "plain", init)
        b = Weight((*lead, out, config.rank), (*axes, rows, None), "plain", ZEROS)
        adapters |= {f"{SUBTREE}/{name}/a": a, f"{SUBTREE}/{name}/b": b}
    return adapters


def add(params: Any, config: LoraConfig, key: jax.Array) -> Any:
    """Params with adapters that change nothing yet: b is 0.

    Raises:
      InputError: no parameter matches.
    """
    found = {
        name: leaf for name, leaf in by_path(params).items() if re.search(config.adapted, name)
    }
    if not found:
        raise InputError(f"lora.adapted is {config.adapted!r} and matches no parameter")
    adapters: dict[str, Any] = {}
    for name, one in zip(found, jax.random.split(key, len(found)), strict=True):
        *lead, out, features = found[name].shape
        adapters[f"{name}/a"] = (
            jax.random.normal(one, (*lead, config.rank, features)) * features**-0.5
        )
        adapters[f"{name}/b"] = jnp.zeros((*lead, out, config.rank))
    return params | {SUBTREE: traverse_util.unflatten_dict(adapters, sep="/")}


def merge(params: Any, config: LoraConfig) -> Any:
    """Params of the model itself, adapters added to what they adapt; without LoRA as they are."""
    if SUBTREE not in params:
        return params

    def merged(base, adapter):
        if adapter is None:
            return base
        if isinstance(base, dict):
            return {name: merged(child, adapter.get(name)) for name, child in base.items()}
        product = jnp.einsum("...or,...ri->...oi", adapter["b"], adapter["a"])
        return moved(base, config.scale * product)

    rest = {name: child for name, child in params.items() if name != SUBTREE}
    return merged(rest, params[SUBTREE])
