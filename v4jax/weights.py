"""Every weight of the model, declared once: its shape, logical axes, role and initialiser.

The modules of `model/` make their weights from these tables. The official names (`hf/tensors`),
what a mesh must divide, shardings, groups of the optimiser and abstract shapes are read off them.
No JAX here: `v4jax inspect flash` answers without it.

Paths are relative to the module ("wq_a/weight" of an attention layer), to the item of a checkpoint
in `items`, and to the variables in `variables`, where the repeats of a segment lie in one leaf.
"""

import functools
import math
import types
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from v4jax.config import (
    WINDOW,
    DSpark,
    LayerSpec,
    ModelConfig,
    Segment,
    layer_place,
    segments,
)


class Initializer(NamedTuple):
    """What a fresh weight is: "normal" (value: its deviation), "constant" or "even_table".

    even_table: K distinct experts for every token id, each of `value` experts equally often.
    """

    kind: str
    value: float


class Weight(NamedTuple):
    """One weight.

    Attributes:
      shape: its sizes. axes: a logical axis name for each, None for one that is never cut.
      role: what decides its stored type: "matrix", "expert", "plain", "norm", "control", "table".
      init: what it is in a fresh model.
      collection: "params" where it is trained, else "buffers".
      matrices: how many maps of features lie one below the other in its last two axes, each of
        which Muon makes orthogonal by itself; 0 where it is no such map (a table, a norm).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    role: str
    init: Initializer
    collection: str = "params"
    matrices: int = 0


Weights = dict[str, Weight]
ZEROS = Initializer("constant", 0.0)
ONES = Initializer("constant", 1.0)
# The paper starts the dynamic part at 0.01, so that the static base dominates at first.
SMALL = Initializer("constant", 0.01)


def items(config: ModelConfig) -> Iterator[tuple[str, int | None, Weights]]:
    """What a checkpoint consists of: each item's name, its layer if it is one, its weights."""
    yield "embed", None, {"embed/weight": table(config)}
    for number, layer in enumerate(config.layers):
        yield f"layer_{number:03d}", number, block(config, layer)
    norms = {"norm/weight": norm(config.hidden_size)}
    hyper = _within("hc_head", hyper_head(config))
    yield "head", None, {"head/weight": table(config)} | norms | hyper
    for number, layer in enumerate(config.mtp_layers):
        yield f"mtp_{number}", None, mtp(config, layer)
    if config.dspark is not None:
        for stage in range(config.draft_layers):
            yield f"draft_{stage}", None, draft(config, stage)


def variables(config: ModelConfig, min_repeats: int) -> dict[tuple[str, ...], Weight]:
    """The model's variables by path, the collection first; repeats of a segment in one leaf."""
    cut, found = segments(config.layers, min_repeats), {}
    repeats = {segment.name: segment.repeats for segment in cut}
    for item, _, declared in items(config):
        for name, weight in declared.items():
            path, repeat = variable_place(cut, item, (weight.collection, *name.split("/")))
            if repeat is not None:
                shape = (repeats[path[1]], *weight.shape)
                weight = weight._replace(shape=shape, axes=("layers", *weight.axes))
            found[path] = weight
    return found


def parameters(config: ModelConfig, min_repeats: int) -> dict[str, Weight]:
    """Those of `variables` that are trained, by "/"-joined path without the collection."""
    declared = variables(config, min_repeats).items()
    return {"/".join(path[1:]): weight for path, weight in declared if path[0] == "params"}


def variable_place(
    cut: tuple[Segment, ...], item: str, path: tuple[str, ...]
) -> tuple[tuple[str, ...], int | None]:
    """Where an item's leaf lives in the model's variables.

    Args:
      cut: `config.segments(layers, min_repeats)`. item: as of `items`.
      path: the collection and the path inside the item.

    Returns:
      The path, and the index along the leaf's leading axis of repeats (None: there is none).
    """
    collection, *rest = path
    kind, _, number = item.partition("_")
    if kind in ("mtp", "draft"):
        return (collection, item, *rest), None
    if kind != "layer":
        return (collection, *rest), None
    segment, place, repeat = layer_place(cut, int(number))
    where = (collection, *segment.path(place), *rest)
    return where, repeat if segment.repeats > 1 else None


@functools.lru_cache(maxsize=32)
def axis_sizes(config: ModelConfig) -> Mapping[str, int]:
    """For each logical axis the size that the parts of a mesh must divide."""
    sizes: dict[str, int] = {}
    for _, _, declared in items(config):
        for weight in declared.values():
            for axis, size in zip(weight.axes, weight.shape, strict=True):
                if axis is not None:
                    sizes[axis] = math.gcd(size, sizes.get(axis, size))
    # Heads stay with their group of the output projection.
    return types.MappingProxyType(sizes | {"heads": config.o_groups})


def table(config: ModelConfig) -> Weight:
    """The embedding, or the output head."""
    shape = (config.vocab_size, config.hidden_size)
    return Weight(shape, ("vocab", "embed"), "plain", _normal(config))


def norm(features: int) -> Weight:
    """The weight of an RMSNorm."""
    return Weight((features,), ("norm",), "norm", ONES)


def block(config: ModelConfig, layer: LayerSpec) -> Weights:
    """One layer."""
    d = config.hidden_size
    norms = {"attn_norm/weight": norm(d), "ffn_norm/weight": norm(d)}
    hyper = [_within(name, hyper_connection(config)) for name in ("hc_attn", "hc_ffn")]
    return (
        norms
        | hyper[0]
        | hyper[1]
        | _within("attn", attention(config, layer))
        | _within("ffn", moe(config, layer))
    )


def mtp(config: ModelConfig, layer: LayerSpec) -> Weights:
    """One multi-token-prediction block."""
    d = config.hidden_size
    norms = {f"{name}/weight": norm(d) for name in ("enorm", "hnorm", "norm")}
    matrices = {
        f"{name}/weight": _matrix(config, (d, d), (None, "embed")) for name in ("e_proj", "h_proj")
    }
    hyper = _within("hc_head", hyper_head(config))
    return norms | matrices | hyper | _within("block", block(config, layer))


def draft(config: ModelConfig, stage: int) -> Weights:
    """One stage of a DSpark draft: a window block, and what the first and the last have besides."""
    d = config.hidden_size
    found = _within("block", block(config, WINDOW))
    if stage == 0:
        read = len(_dspark(config).target_layer_ids) * d
        found["main_proj/weight"] = _matrix(config, (d, read), (None, "embed"))
        found["main_norm/weight"] = norm(d)
    if stage == config.draft_layers - 1:
        found["norm/weight"] = norm(d)
        found |= _within("hc_head", hyper_head(config))
        found |= _within("markov_head", markov_head(config))
        found |= _within("confidence_head", confidence_head(config))
    return found


def markov_head(config: ModelConfig) -> Weights:
    """What a draft's token before adds to a token's logits; the first is looked up by token."""
    shape = (config.vocab_size, _dspark(config).markov_rank)
    return {
        "markov_w1/weight": _plain(config, shape, (None, None)),
        "markov_w2/weight": _plain(config, shape, ("vocab", None)),
    }


def confidence_head(config: ModelConfig) -> Weights:
    """How likely a draft's token is to be accepted."""
    shape = (1, config.hidden_size + _dspark(config).markov_rank)
    return {"proj/weight": _plain(config, shape, (None, None))}


def _dspark(config) -> DSpark:
    assert config.dspark is not None  # a model without it has no such item
    return config.dspark


def hyper_connection(config: ModelConfig) -> Weights:
    """One sub-layer's mixing of the M residual streams; none for a plain residual."""
    m, d = config.hc_mult, config.hidden_size
    return _mixing(config, (2 + m) * m, 3, m * d)


def hyper_head(config: ModelConfig) -> Weights:
    """The streams' collapse before an output head; none for a plain residual."""
    return _mixing(config, config.hc_mult, 1, config.hc_mult * config.hidden_size)


def _mixing(config, rows, scales, channels):
    if config.hc_mult == 1:
        return {}
    return {
        "fn": Weight((rows, channels), ("hc", "hc_embed"), "control", _normal(config), matrices=1),
        "base": Weight((rows,), ("hc",), "control", ZEROS),
        "scale": Weight((scales,), (None,), "control", SMALL),
    }


def attention(config: ModelConfig, layer: LayerSpec) -> Weights:
    """The attention of one layer, with its compressor and indexer if its kind has them."""
    d, latent, h = config.hidden_size, config.q_lora_rank, config.head_dim
    heads, groups, o = config.num_attention_heads, config.o_groups, config.o_lora_rank
    group = heads // groups * h
    weights = {
        "attn_sink": Weight((heads,), ("heads",), "control", ZEROS),
        "wq_a/weight": _matrix(config, (latent, d), ("q_lora", "embed")),
        "q_norm/weight": norm(latent),
        "wq_b/weight": _matrix(config, (heads * h, latent), ("heads", "q_latent")),
        "wkv/weight": _matrix(config, (h, d), ("kv", "embed")),
        "kv_norm/weight": norm(h),
        "wo_a/weight": _matrix(config, (groups * o, group), ("heads", "head_group"), groups),
        "wo_b/weight": _matrix(config, (d, groups * o), ("embed", "heads")),
    }
    if layer.compresses:
        weights |= _within("compressor", compressor(config, layer, h))
    if layer.attention == "csa":
        weights |= _within("indexer", indexer(config, layer))
    return weights


def compressor(config: ModelConfig, layer: LayerSpec, width: int) -> Weights:
    """What pools tokens into entries of `width` channels."""
    channels = 2 * width if layer.overlap else width
    shape, axes = (channels, config.hidden_size), ("compressed", "embed")
    ape = (layer.ratio, channels)
    return {
        "ape": Weight(ape, (None, "compressed"), "control", _normal(config)),
        "wkv/weight": _plain(config, shape, axes),
        "wgate/weight": _plain(config, shape, axes),
        "norm/weight": norm(width),
    }


def indexer(config: ModelConfig, layer: LayerSpec) -> Weights:
    """The lightning indexer of a CSA layer."""
    d, latent = config.hidden_size, config.q_lora_rank
    heads, width = config.index_n_heads, config.index_head_dim
    axes = ("index_heads", "embed")
    return {
        "wq_b/weight": _matrix(config, (heads * width, latent), ("index_heads", "q_latent")),
        "weights_proj/weight": _plain(config, (heads, d), axes),
        **_within("compressor", compressor(config, layer, width)),
    }


def moe(config: ModelConfig, layer: LayerSpec) -> Weights:
    """Router, routed experts and the shared one."""
    weights = _within("gate", router(config, layer)) | _within("experts", experts(config))
    if config.n_shared_experts:
        weights |= _within("shared_experts", shared_expert(config))
    return weights


def router(config: ModelConfig, layer: LayerSpec) -> Weights:
    """The scores of every expert, and a hash table or the bias that balances the choice."""
    d, count = config.hidden_size, config.n_routed_experts
    weights = {"weight": _plain(config, (count, d), ("router", "embed"))}
    if layer.routing == "hash":
        shape = (config.vocab_size, config.num_experts_per_tok)
        init = Initializer("even_table", count)
        return weights | {"tid2eid": Weight(shape, (None, None), "table", init, "buffers")}
    return weights | {"bias": Weight((count,), ("router",), "control", ZEROS, "buffers")}


def experts(config: ModelConfig) -> Weights:
    """The routed experts; a checkpoint has the matrices of each apart."""
    e, f, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    up, down = ("expert", "mlp", "embed"), ("expert", "embed", "mlp")
    return {
        "w1": Weight((e, f, d), up, "expert", _normal(config), matrices=1),
        "w2": Weight((e, d, f), down, "expert", _normal(config), matrices=1),
        "w3": Weight((e, f, d), up, "expert", _normal(config), matrices=1),
    }


def shared_expert(config: ModelConfig) -> Weights:
    """The expert that every token takes."""
    f, d = config.shared_intermediate_size, config.hidden_size
    return {
        "w1/weight": _matrix(config, (f, d), ("mlp", "embed")),
        "w2/weight": _matrix(config, (d, f), ("embed", "mlp")),
        "w3/weight": _matrix(config, (f, d), ("mlp", "embed")),
    }


def _matrix(config, shape, axes, matrices=1):
    return Weight(shape, axes, "matrix", _normal(config), matrices=matrices)


def _plain(config, shape, axes):
    """A matrix that checkpoints keep unquantised."""
    return Weight(shape, axes, "plain", _normal(config), matrices=1)


def _normal(config):
    return Initializer("normal", config.initializer_range)


def _within(name: str, weights: Mapping[str, Weight]) -> Weights:
    return {f"{name}/{path}": weight for path, weight in weights.items()}
