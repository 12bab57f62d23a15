"""Every tensor of a checkpoint: its key, shape and stored type, and where it lives in our tree.

No I/O. A checkpoint is a row of items, each written and read as a whole: `embed`, `layer_000`, ...,
`head`, `mtp_0`, ... or `draft_0`, .... The weights are those of `weights.items`, and paths are
those inside the item; `weights.variable_place` says where they sit in the model's variables.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from v4jax import block_sizes, weights
from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.files.safetensors import NUMPY_DTYPES

LAYOUTS = ("official", "transformers")
WEIGHTS = ("stored", "bf16", "float32")
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

    @property
    def loaded_dtype(self) -> np.dtype:
        """The dtype in a model's variables: narrow tables, control tensors always in float32."""
        if self.role == "table":
            return np.dtype(np.int32)
        return np.dtype(np.float32) if self.role == "control" else self.dtype


def fp8_quantization(scale_fmt: str | None = None) -> dict[str, Any]:
    """The official `quantization_config` of FP8 weights; scale_fmt: "ue8m0", "float32" or none."""
    keys = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": scale_fmt,
        "weight_block_size": [block_sizes.FP8, block_sizes.FP8],
    }
    return {name: value for name, value in keys.items() if value is not None}


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
        for item, layer, declared in weights.items(config)
        for path, weight in declared.items()
        for spec in _specs(form, item, layer, path, weight)
    ]
    if layout == "official":
        return specs
    return [spec._replace(key=transformers_key(spec.key)) for spec in specs]


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


def _prefix(item):
    """What the official keys of an item begin with."""
    kind, _, number = item.partition("_")
    behind = f"mtp.{number}."
    return {"layer": f"layers.{int(number or 0)}.", "mtp": behind, "draft": behind}.get(kind, "")


def _specs(form, item, layer, path, weight) -> Iterator[TensorSpec]:
    """The tensors of one weight: an expert's matrices one by one, scales next to values."""
    names, role, prefix = path.split("/"), weight.role, _prefix(item)
    stacked = role == "expert"
    shape = weight.shape[1:] if stacked else weight.shape
    dtype = {"matrix": form.matrices, "expert": form.experts}.get(role, form.plain)
    values_shape, scales_shape = _stored_shapes(path, shape, dtype)
    for expert in range(weight.shape[0]) if stacked else (None,):
        key = prefix + _official_name(names, expert)
        where = (weight.collection, *names)
        common = {"item": item, "path": where, "expert": expert, "layer": layer}
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
        return shape, tuple(-(-n // block_sizes.FP8) for n in shape)
    if dtype != "I8":
        return shape, None
    out, channels = shape
    group = block_sizes.FP4
    if channels % group:
        raise InputError(
            f"{path} has {channels} input channels; FP4 needs a multiple of {group}, as one scale "
            f"covers {group} of them"
        )
    return (out, channels // 2), (out, channels // group)
