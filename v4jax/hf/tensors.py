"""Every tensor of a checkpoint: its key, shape and stored type, and where it lives in our tree.

No I/O. A checkpoint is a row of items, each written and read as a whole: `embed`, `layer_000`, ...,
`head`, `mtp_0`, .... Paths are those inside the item; `variable_place` says where the item's block
sits in the model's variables, which depends on how its layers are cut into segments.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from v4jax.config import LayerSpec, ModelConfig, Segment, layer_place
from v4jax.errors import InputError
from v4jax.files.safetensors import NUMPY_DTYPES

LAYOUTS = ("official", "transformers")
WEIGHTS = ("stored", "bf16", "float32")
BLOCK = 128  # an FP8 scale covers BLOCK x BLOCK values
GROUP = 32  # an FP4 scale covers GROUP input channels
DEFAULT_QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
_PLAIN_NAMES = {"bfloat16": "BF16", "float32": "F32"}


@dataclasses.dataclass(frozen=True)
class StoredForm:
    """How a checkpoint stores its weights.

    Attributes:
      plain: dtype of all that is not quantised, "F32" or "BF16".
      matrices: dtype of the linear layers, `plain` or "F8_E4M3".
      experts: dtype of the routed experts, `plain`, "F8_E4M3" or "I8" (packed FP4).
      scale: dtype of the scales, "F8_E8M0" or "F32"; None where nothing is quantised.
      loose: whether norms and control tensors (hyper-connections, sinks, biases, ape) may be
        float32 or `plain` alike, as in checkpoints that are not quantised; official ones have
        `plain` norms and float32 control tensors.
    """

    plain: str
    matrices: str
    experts: str
    scale: str | None
    loose: bool


class TensorSpec(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
      key: its name in the files.
      shape: its shape there (packed FP4 has half the columns).
      dtypes: the safetensors dtypes it may have; the first is the one we write.
      item: the item it belongs to.
      path: where its leaf is in the item's tree, the collection first: ("params", "attn", ...).
      part: "array", or "values" / "scales" of a `quant.QTensor`.
      expert: its index along the leaf's first axis, None where the leaf is the tensor.
      layer: the layer it belongs to, None outside the layers.
      role: what decides its dtype: "matrix", "expert", "scale", "plain", "norm", "control",
        "table", or "carried" for a tensor that is only passed on.
    """

    key: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    item: str
    path: tuple[str, ...]
    part: str = "array"
    expert: int | None = None
    layer: int | None = None
    role: str = "plain"

    @property
    def dtype(self) -> np.dtype:
        """The array's dtype in our tree: E8M0 scales and packed FP4 are plain bytes."""
        if self.part != "array" and self.dtypes[0] in ("F8_E8M0", "I8"):
            return np.dtype(np.uint8)
        return NUMPY_DTYPES[self.dtypes[0]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def stored_form(config: ModelConfig, scale: str | None = None) -> StoredForm:
    """The form that a config announces.

    Args:
      scale: dtype of the scales where the files have been seen. The base checkpoints' configs say
        "ue8m0" and their files hold float32, so FP8 alone settles nothing.
    """
    plain = _PLAIN_NAMES[config.dtype]
    if config.quantization is None:
        return StoredForm(plain, plain, plain, None, True)
    scale_format = config.quantization.get("scale_fmt")
    if scale_format not in ("ue8m0", "float32", None):
        raise InputError(
            f"quantization_config's scale_fmt is {scale_format!r}, an unknown scale format; "
            "expected 'ue8m0' (one byte, a power of two) or 'float32'"
        )
    if config.expert_dtype == "fp4":
        return StoredForm(plain, "F8_E4M3", "I8", "F8_E8M0", False)
    if scale_format != "ue8m0" or scale is None:
        scale = "F32"
    return StoredForm(plain, "F8_E4M3", "F8_E4M3", scale, False)


def expanded_config(config: ModelConfig, weights: str) -> ModelConfig:
    """The config of the same model with its weights "stored", in "bf16" or in "float32"."""
    if weights not in WEIGHTS:
        raise InputError(f"weights is {weights!r}; expected one of {', '.join(WEIGHTS)}")
    if weights == "stored":
        return config
    dtype = {"bf16": "bfloat16", "float32": "float32"}[weights]
    return dataclasses.replace(config, dtype=dtype, quantization=None, expert_dtype=None)


def tensor_table(
    config: ModelConfig, layout: str = "official", form: StoredForm | None = None
) -> list[TensorSpec]:
    """Every tensor of a checkpoint, item after item.

    Args:
      layout: "official" or "transformers"; they differ in names, and the latter has no MTP.
      form: how the weights are stored; None for what the config announces.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    form = form or stored_form(config)
    specs = [
        spec
        for item, prefix, layer, weights in _items(config)
        for path, shape, role in weights
        for spec in _specs(config, form, item, prefix, layer, path, shape, role)
    ]
    if layout == "official":
        return specs
    return [spec._replace(key=transformers_key(spec.key)) for spec in specs]


def item_names(config: ModelConfig) -> list[str]:
    """The items of a checkpoint in the order of the official files (without carried drafts)."""
    return [item for item, *_ in _items(config)]


def variable_place(
    cut: tuple[Segment, ...], item: str, path: tuple[str, ...]
) -> tuple[tuple[str, ...], int | None]:
    """Where an item's leaf lives in the model's variables.

    Args:
      cut: `config.segments(layers, min_repeats)`. item, path: as in `TensorSpec`.

    Returns:
      The path, and the index along the leaf's leading axis of repeats (None: there is none).
    """
    collection, *rest = path
    kind, _, number = item.partition("_")
    if kind == "mtp":
        return (collection, item, *rest), None
    if kind != "layer":
        return (collection, *rest), None
    segment, place, repeat = layer_place(cut, int(number))
    where = (collection, segment.name, f"block_{place}", *rest)
    return where, repeat if segment.repeats > 1 else None


def transformers_key(key: str) -> str:
    """The name under which transformers saves the tensor that officially is called `key`."""
    if key == "head.weight":
        return key
    if key == "embed.weight":
        return "model.embed_tokens.weight"
    if key.startswith("hc_head_"):
        return "model.hc_head.hc_" + key.removeprefix("hc_head_")
    return "model." + key.replace(".attn.kv_norm.", ".attn.norm.")


def scale_key(key: str) -> str:
    """The key of the scales of a quantised weight."""
    return key.removesuffix(".weight") + ".scale"


def _items(config) -> Iterator[tuple[str, str, int | None, list]]:
    """Each item's name, prefix of its official keys, layer, and weights (path, shape, role)."""
    d, vocab = config.hidden_size, config.vocab_size
    yield "embed", "", None, [("embed/weight", (vocab, d), "plain")]
    for i, layer in enumerate(config.layers):
        yield f"layer_{i:03d}", f"layers.{i}.", i, _block(config, layer)
    head = [("head/weight", (vocab, d), "plain"), ("norm/weight", (d,), "norm")]
    yield "head", "", None, head + _head_streams(config)
    for k, layer in enumerate(config.mtp_layers):
        block = [(f"block/{path}", shape, role) for path, shape, role in _block(config, layer)]
        yield f"mtp_{k}", f"mtp.{k}.", None, _mtp(config) + block


def _block(config, layer: LayerSpec):
    d = config.hidden_size
    weights = [("attn_norm/weight", (d,), "norm"), ("ffn_norm/weight", (d,), "norm")]
    weights += _streams(config, "hc_attn") + _streams(config, "hc_ffn")
    weights += [(f"attn/{path}", shape, role) for path, shape, role in _attention(config, layer)]
    return weights + [(f"ffn/{path}", shape, role) for path, shape, role in _moe(config, layer)]


def _streams(config, name):
    m = config.hc_mult
    if m == 1:
        return []
    mix = (2 + m) * m
    return [
        (f"{name}/fn", (mix, m * config.hidden_size), "control"),
        (f"{name}/base", (mix,), "control"),
        (f"{name}/scale", (3,), "control"),
    ]


def _head_streams(config):
    m = config.hc_mult
    if m == 1:
        return []
    return [
        ("hc_head/fn", (m, m * config.hidden_size), "control"),
        ("hc_head/base", (m,), "control"),
        ("hc_head/scale", (1,), "control"),
    ]


def _mtp(config):
    d = config.hidden_size
    norms = [(f"{name}/weight", (d,), "norm") for name in ("enorm", "hnorm", "norm")]
    matrices = [(f"{name}/weight", (d, d), "matrix") for name in ("e_proj", "h_proj")]
    return norms + matrices + _head_streams(config)


def _attention(config, layer):
    d, latent, h = config.hidden_size, config.q_lora_rank, config.head_dim
    heads, groups, o = config.num_attention_heads, config.o_groups, config.o_lora_rank
    weights = [
        ("attn_sink", (heads,), "control"),
        ("wq_a/weight", (latent, d), "matrix"),
        ("q_norm/weight", (latent,), "norm"),
        ("wq_b/weight", (heads * h, latent), "matrix"),
        ("wkv/weight", (h, d), "matrix"),
        ("kv_norm/weight", (h,), "norm"),
        ("wo_a/weight", (groups * o, heads // groups * h), "matrix"),
        ("wo_b/weight", (d, groups * o), "matrix"),
    ]
    if layer.attention in ("csa", "hca"):
        weights += _compressor(config, layer, "compressor", h)
    if layer.attention == "csa":
        index_heads, width = config.index_n_heads, config.index_head_dim
        weights += [
            ("indexer/wq_b/weight", (index_heads * width, latent), "matrix"),
            ("indexer/weights_proj/weight", (index_heads, d), "plain"),
            *_compressor(config, layer, "indexer/compressor", width),
        ]
    return weights


def _compressor(config, layer, name, width):
    channels = 2 * width if layer.overlap else width
    return [
        (f"{name}/ape", (layer.ratio, channels), "control"),
        (f"{name}/wkv/weight", (channels, config.hidden_size), "plain"),
        (f"{name}/wgate/weight", (channels, config.hidden_size), "plain"),
        (f"{name}/norm/weight", (width,), "norm"),
    ]


def _moe(config, layer):
    d, experts, f = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    weights = [("gate/weight", (experts, d), "plain")]
    if layer.routing == "hash":
        table = (config.vocab_size, config.num_experts_per_tok)
        weights += [("gate/tid2eid", table, "table")]
    else:
        weights += [("gate/bias", (experts,), "control")]
    sides = (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d)))
    weights += [(f"experts/{name}", shape, "expert") for name, shape in sides]
    shared = config.shared_intermediate_size
    if shared:
        sides = (("w1", (shared, d)), ("w2", (d, shared)), ("w3", (shared, d)))
        weights += [(f"shared_experts/{name}/weight", shape, "matrix") for name, shape in sides]
    return weights


def _specs(config, form, item, prefix, layer, path, shape, role) -> Iterator[TensorSpec]:
    """The tensors of one weight: an expert's matrices one by one, scales beside values."""
    names = path.split("/")
    buffer = names[-2:] in (["gate", "bias"], ["gate", "tid2eid"])
    place = ("buffers" if buffer else "params", *names)
    dtype = {"matrix": form.matrices, "expert": form.experts}.get(role, form.plain)
    values_shape, scales_shape = _stored_shapes(path, shape, dtype)
    for expert in range(config.n_routed_experts) if role == "expert" else (None,):
        key = prefix + _official_name(names, expert)
        common = {"item": item, "path": place, "expert": expert, "layer": layer}
        if scales_shape is None:
            yield TensorSpec(key, values_shape, _dtypes(form, role), role=role, **common)
            continue
        yield TensorSpec(key, values_shape, (dtype,), part="values", role=role, **common)
        yield TensorSpec(
            scale_key(key), scales_shape, (form.scale,), part="scales", role="scale", **common
        )


def _official_name(names, expert):
    if expert is not None:
        *head, matrix = names
        names = [*head, str(expert), matrix, "weight"]
    names = [name for name in names if name != "block"]
    hyper = [name for name in names if name.startswith("hc_")]
    return "_".join(names) if hyper else ".".join(names)


def _dtypes(form, role):
    if role == "table":
        return ("I64",)
    if role == "control":
        return ("F32", form.plain) if form.loose and form.plain != "F32" else ("F32",)
    if role == "norm" and form.loose and form.plain != "F32":
        return (form.plain, "F32")
    return (form.plain,)


def _stored_shapes(path, shape, dtype):
    """Shapes of a matrix's values and of its scales, None where it has none."""
    if dtype == "F8_E4M3":
        return shape, tuple(-(-n // BLOCK) for n in shape)
    if dtype != "I8":
        return shape, None
    out, channels = shape
    if channels % GROUP:
        raise InputError(
            f"{path} has {channels} input channels; FP4 needs a multiple of {GROUP}, as one scale "
            f"covers {GROUP} of them"
        )
    return (out, channels // 2), (out, channels // GROUP)
