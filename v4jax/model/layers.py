"""What every block is made of: declared weights, projection, RMSNorm, how a forward pass runs."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from v4jax import block_sizes, quant, weights
from v4jax.errors import InputError
from v4jax.kernels.quantized_matmul import api as quantized_matmul
from v4jax.ops import derivatives
from v4jax.ops.rms_norm import rms_norm
from v4jax.quant import round_to
from v4jax.sharding import collectives
from v4jax.sharding.rules import ONE_DEVICE, Layout
from v4jax.weights import Initializer, Weight

# Up to so many, a CPU copies more of a matrix that it cuts than of tokens that it transposes.
FEW_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a forward pass computes: where activations are rounded, with which kernels, on what.

    Attributes:
      dtype: the activations' type; every rounding point of architecture section 10 casts to it.
      native: also the official FP8 / FP4 rounding of matmul inputs, KV and indexer, the bf16
        chains of section 10 (points 2 and 7) and the Hadamard rotation.
      kernels: the implementation of every kernel by name ("xla", "pallas_tpu", ...); None takes
        the best of the platform that the program is compiled for.
      layout: the mesh that the pass runs on, inside `shard_map`; by default one device.
    """

    dtype: str = "float32"
    native: bool = False
    kernels: str | None = None
    layout: Layout = ONE_DEVICE

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype is {self.dtype!r}; expected 'float32' or 'bfloat16'")
        if self.native and self.dtype != "bfloat16":
            raise InputError(
                f"numerics='native' is defined on bfloat16 activations and dtype is {self.dtype!r};"
                " leave dtype out or pass 'bfloat16'"
            )

    def round(self, x: Array) -> Array:
        """x in the activations' dtype, really rounded."""
        return round_to(x, self.dtype)


def weight(module: nn.Module, name: str, declared: Weight, used_as: str | None = None):
    """A weight of a module, as declared in `v4jax.weights`.

    A variable that is already there is taken in the form in which it is stored (float32, bfloat16
    or `quant.QTensor`), after a check of its shape. On a mesh it comes as this shard's part: along
    axes where the strategy gathers weights, all parts are put together here, and only here; a float
    weight that is used in another type, `used_as`, travels in that.
    """
    collection, shape, axes = declared.collection, declared.shape, declared.axes
    if not module.has_variable(collection, name):
        init = initializer(declared.init)
        dtype = jnp.int32 if declared.role == "table" else jnp.float32
        if collection == "params":
            return module.param(name, init, shape, dtype)

        def fresh():
            return init(module.make_rng("params"), shape, dtype)

        return module.variable(collection, name, fresh).value
    value = module.get_variable(collection, name)
    layout = module.execution.layout
    expected = tuple(n // layout.size(axis) for n, axis in zip(shape, axes, strict=True))
    if tuple(value.shape) != expected:
        where = "/".join((*module.scope.path, name))
        raise InputError(f"weight {where} has shape {tuple(value.shape)}; expected {expected}")
    for dimension, axis in enumerate(axes):
        if not (parts := layout.gathered(axis)):
            continue
        if isinstance(value, quant.QTensor) or used_as is None:
            gather = functools.partial(collectives.gather, axes=parts, dimension=dimension)
            value = jax.tree.map(gather, value)
        else:
            value = collectives.gather_as(value, parts, dimension, used_as)
    return value


def initializer(init: Initializer) -> Callable:
    """The function (key, shape, dtype) -> array that an `Initializer` names."""
    if init.kind == "normal":
        return nn.initializers.normal(init.value)
    if init.kind == "constant":
        return nn.initializers.constant(init.value)
    return _even_table(int(init.value))


def _even_table(experts):
    """Even over ids, not over a text's tokens.

    Training from scratch should build the table from token frequencies instead.
    """

    def init(key, shape, dtype):
        ids, k = shape
        order = jax.random.permutation(key, ids).astype(dtype)
        return (order[:, None] * k + jnp.arange(k, dtype=dtype)[None]) % experts

    return init


def project(
    equation: str, x: Array, w: Array | quant.QTensor, execution: Execution, quantize_input=True
) -> Float[Array, "..."]:
    """The einsum of `x` with a weight whose last axis is contracted; float32 out.

    Products accumulate in float32. Under native numerics the input is first rounded to E4M3 in
    groups of 128 channels (section 10), unless `quantize_input` is False.
    """
    if execution.native and quantize_input:
        x = quant.fake_quant_e4m3(x, block_sizes.FP8)
    # Values of the native path fit bf16 exactly, so float32 operands lose nothing on any backend.
    dtype = jnp.float32 if execution.native else execution.dtype
    if isinstance(w, quant.QTensor):
        return quantized_matmul.einsum(equation, x.astype(dtype), w)
    return jnp.einsum(
        equation, x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32
    )


class Projection(nn.Module):
    """A matrix [out, in] without bias; the equation stands at the call.

    `float32` says that only `in_float32` is called.
    """

    declared: Weight
    execution: Execution
    quantize_input: bool = True
    float32: bool = False

    def setup(self):
        used_as = None if self.float32 else self.execution.dtype
        self.weight = weight(self, "weight", self.declared, used_as)

    def __call__(self, equation: str, x: Array) -> Array:
        """The projection of `x`, rounded once to the activation dtype."""
        y = project(equation, x, self.weight, self.execution, self.quantize_input)
        # Shards that hold parts of the contracted axis have partial sums.
        y = collectives.total(y, self.execution.layout.kept(self.declared.axes[1]))
        return self.execution.round(y)

    def grouped(self, x: Array, groups: int) -> Array:
        """[B,T,G,X] -> [B,T,G,O]: output rows cut into groups, each with its own slice of x."""
        w = self.weight
        if isinstance(w, quant.QTensor) and w.shape[0] // groups % block_sizes.FP8:
            w = w.dequantize(self.execution.dtype)  # a scale block would reach over two groups
        w = jax.tree.map(lambda leaf: leaf.reshape(groups, -1, leaf.shape[-1]), w)

        def together(x, w):
            return project("btgx,gox->btgo", x, w, self.execution, self.quantize_input)

        def one_by_one(x, w):
            pairs = [(x[:, :, g], w[g]) for g in range(groups)]
            parts = [
                project("btx,ox->bto", *pair, self.execution, self.quantize_input) for pair in pairs
            ]
            return jnp.stack(parts, axis=2)

        if isinstance(w, quant.QTensor):
            return self.execution.round(together(x, w))
        if x.shape[0] * x.shape[1] <= FEW_TOKENS:
            return self.execution.round(together(x, w))
        # A CPU transposes all of x before a batched product; other backends do not.
        y = jax.lax.platform_dependent(x, w, cpu=one_by_one, default=together)
        return self.execution.round(y)

    def in_float32(self, equation: str, x: Array) -> Array:
        """The projection computed in float32 whatever the activations are (compressor, router)."""
        return jnp.einsum(
            equation,
            x.astype(jnp.float32),
            self.weight.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )


class RMSNorm(nn.Module):
    """RMSNorm with a weight: float32 throughout, cast once at the end (architecture section 2)."""

    features: int
    eps: float
    execution: Execution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = weight(self, "weight", weights.norm(self.features))
        norm = derivatives.of(rms_norm, self.execution.kernels)
        return self.execution.round(norm(self.eps, x, scale.astype(jnp.float32)))
