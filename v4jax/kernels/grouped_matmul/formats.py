"""How an expert's weights are stored, and in which type they are multiplied."""

import einops
import jax
import jax.numpy as jnp
import numpy as np

from v4jax import quant

FLOATS = ("float32", "bfloat16")


def kind(weight) -> str:
    """ "float", "fp8" or "fp4"."""
    return weight.kind if isinstance(weight, quant.QTensor) else "float"


def trained(weights) -> bool:
    """Whether gradients of the weights exist: stored forms are frozen."""
    return all(kind(weight) == "float" for weight in weights)


def operand_dtype(weights, rounding) -> str:
    """The type in which activations and expanded weights are multiplied (section 10).

    `rounding.native` multiplies in float32. Its activations have at most four significant bits, so
    where the weights are exact in bfloat16 so is every product, and bfloat16 serves.
    """
    if not rounding.native:
        return rounding.dtype
    return "bfloat16" if all(_exact_in_bfloat16(weight) for weight in weights) else "float32"


def gradient_dtype(weights, rounding) -> str:
    """The same for the backward matmuls, one of whose operands is a rounded gradient."""
    if rounding.dtype == "float32":
        return "float32"
    return operand_dtype(weights, rounding)


def activations(x, weights, rounding):
    """x as it is multiplied: fake-quantised if native, in the operand type."""
    if rounding.native:
        x = quant.fake_quant_e4m3(x, 128)
    return x.astype(operand_dtype(weights, rounding))


def refuse(weights) -> str | None:
    """Why no kernel can take weights of these types."""
    for name, weight in zip(("w1", "w2", "w3"), weights, strict=True):
        if kind(weight) == "float" and weight.dtype.name not in FLOATS:
            return f"{name} is {weight.dtype.name}; float weights may be {' or '.join(FLOATS)}"
    if len({kind(weight) for weight in weights}) > 1:
        kinds = [kind(weight) for weight in weights]
        return f"w1, w2, w3 are stored as {kinds}; expected one form"
    return None


def parts(weight) -> int:
    """In how many interleaved columns an input axis is split: FP4 packs even and odd ones."""
    return 2 if kind(weight) == "fp4" else 1


def split(x, count: int) -> jax.Array:
    """[X, n] as [count, X, n / count], column i in part i % count."""
    if count == 1:
        return x[None]
    return einops.rearrange(x, "x (n p) -> p x n", p=count)


def join(x) -> jax.Array:
    """What `split` took apart."""
    if x.shape[0] == 1:
        return x[0]
    return einops.rearrange(x, "p x n -> x (n p)")


def float_scales(weight: quant.QTensor) -> jax.Array:
    """FP8 scales as float32; the E8M0 byte 0 is 2^-127, which some hardware takes as zero."""
    if weight.scales.dtype == jnp.uint8:
        return quant.e8m0_to_float(weight.scales)
    return weight.scales


def _exact_in_bfloat16(weight):
    if kind(weight) == "float":
        return weight.dtype == jnp.bfloat16
    return np.dtype(weight.scales.dtype) == np.uint8
