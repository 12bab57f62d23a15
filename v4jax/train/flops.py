"""Operations of a training step, by what of the model learns."""

import dataclasses
import math
from typing import Any, NamedTuple

from v4jax import accounting
from v4jax.config import ModelConfig
from v4jax.train.lora import SUBTREE
from v4jax.train.optimizer import matches
from v4jax.train.tree_paths import by_path


@dataclasses.dataclass(frozen=True)
class Shares:
    """Shares of a forward pass's operations, 0 to 1.

    back: of products with weights, those through which gradients flow back; layers: of those in
    layers. learnt: those whose weights get gradients.
    """

    back: float = 1.0
    layers: float = 1.0
    learnt: float = 1.0

    def operations(self, of_weights: float, of_entries: float) -> float:
        """With those of both passes; products of activations have two gradients to pass back."""
        return of_weights * (1 + self.back + self.learnt) + of_entries * (1 + 2 * self.layers)


@dataclasses.dataclass(frozen=True)
class Passes:
    """What a step computes backward: the indexer, which has a loss of its own, and the rest."""

    indexer: Shares = Shares()
    rest: Shares = Shares()


class _Weight(NamedTuple):
    """A leaf of the params: its depth, its operations per token, whether it learns."""

    name: str
    depth: float
    operations: float
    learns: bool


def passes(params: Any, trained: str | None, config: ModelConfig) -> Passes:
    """What a step computes that trains some of the parameters of the main model.

    Gradients flow back as far as the first layer that learns, through the indexer only where it
    does. Adapters of LoRA, thin, count for no operations of their own.

    Args:
      params: a tree of arrays or shapes. trained: as `StepConfig.trained`.
    """
    weights = [
        _weight(path, math.prod(leaf.shape), trained, config)
        for path, leaf in by_path(params).items()
    ]
    weights = [weight for weight in weights if not weight.name.startswith(("mtp_", "draft_"))]
    indexer = [weight for weight in weights if "/indexer/" in weight.name]
    rest = [weight for weight in weights if "/indexer/" not in weight.name]
    return Passes(_shares([weight._replace(depth=0) for weight in indexer]), _shares(rest))


def _weight(path, size, trained, config):
    name = path.removeprefix(SUBTREE + "/")
    learns = trained is None or matches(trained, path)
    top = name.split("/")[0]
    if top == "embed" or name != path or name.endswith("/ape"):  # a lookup, an adapter, a sum
        size = 0
    if "/experts/" in name:
        size *= config.num_experts_per_tok / config.n_routed_experts
    layer = int(top.removeprefix("layers_")) if top.startswith("layers_") else math.inf
    return _Weight(name, -1 if top == "embed" else layer, size, learns)


def _shares(weights):
    first = min((weight.depth for weight in weights if weight.learns), default=math.inf)
    learns = any(weight.learns for weight in weights)
    in_layers = [weight for weight in weights if weight.depth < math.inf]
    return Shares(
        back=_share(weights, lambda weight: learns and weight.depth >= first),
        layers=_share(in_layers, lambda weight: weight.depth >= first),
        learnt=_share(weights, lambda weight: weight.learns),
    )


def _share(weights, chosen):
    whole = sum(weight.operations for weight in weights)
    return sum(w.operations for w in weights if chosen(w)) / whole if whole else 0.0


def step_flops(
    config: ModelConfig, tokens: int, length: int, passes: Passes, dense: bool = False
) -> float:
    """Operations of a training step, of the main model; nothing computed again counts.

    Every row is taken for one document: in packed rows attention pays for less.

    Args:
      dense: CSA layers attend to every visible entry.
    """
    if dense:
        config = dataclasses.replace(config, index_topk=None)
    context = length // 2
    parts = accounting.flops_per_token(config, context, accounting.ONE_EACH)
    scores = sum(
        accounting.layer_flops(config, layer, context, accounting.ONE_EACH)["index_scores"]
        for layer in config.layers
    )
    indexer, attention = parts.pop("indexer"), parts.pop("attention")
    of_indexer = passes.indexer.operations(indexer - scores, scores)
    return tokens * (of_indexer + passes.rest.operations(sum(parts.values()), attention))
