"""What every block is made of: declared weights, projection, RMSNorm, how a forward pass runs."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from v4jax import quant
from v4jax.errors import InputError
from v4jax.kernels.quantized_matmul import api as quantized_matmul
from v4jax.ops import derivatives
from v4jax.ops.rms_norm import rms_norm
from v4jax.quant import round_to
from v4jax.sharding import collectives
from v4jax.sharding.rules import ONE_DEVICE, Layout


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


def weight(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Callable,
    collection: str = "params",
    dtype=jnp.float32,
    used_as: str | None = None,
):
    """Declares a weight: its name, shape, logical axes and initialiser.

    A variable that is already there is taken in the form in which it is stored (float32, bfloat16
    or `quant.QTensor`), after a check of its shape. On a mesh it comes as this shard's part: along
    axes where the strategy gathers weights, all parts are put together here, and only here; a float
    weight that is used in another type, `used_as`, travels in that.
    """
    if not module.has_variable(collection, name):
        boxed = nn.with_logical_partitioning(init, axes)
        if collection == "params":
            return module.param(name, boxed, shape, dtype)
        value = module.variable(
            collection, name, lambda: boxed(module.make_rng("params"), shape, dtype)
        )
        return value.value
    value = nn.unbox(module.get_variable(collection, name))
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


def project(
    equation: str, x: Array, w: Array | quant.QTensor, execution: Execution, quantize_input=True
) -> Float[Array, "..."]:
    """The einsum of `x` with a weight whose last axis is contracted; float32 out.

    Products accumulate in float32. Under native numerics the input is first rounded to E4M3 in
    groups of 128 channels (section 10), unless `quantize_input` is False.
    """
    if execution.native and quantize_input:
        x = quant.fake_quant_e4m3(x, 128)
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

    out_features: int
    in_features: int
    axes: tuple[str | None, str | None]
    execution: Execution
    init_std: float
    quantize_input: bool = True
    float32: bool = False

    def setup(self):
        init = nn.initializers.normal(self.init_std)
        shape = (self.out_features, self.in_features)
        used_as = None if self.float32 else self.execution.dtype
        self.weight = weight(self, "weight", shape, self.axes, init, used_as=used_as)

    def __call__(self, equation: str, x: Array) -> Array:
        """The projection of `x`, rounded once to the activation dtype."""
        y = project(equation, x, self.weight, self.execution, self.quantize_input)
        # Shards that hold parts of the contracted axis have partial sums.
        y = collectives.total(y, self.execution.layout.kept(self.axes[1]))
        return self.execution.round(y)

    def grouped(self, x: Array, groups: int) -> Array:
        """[B,T,G,X] -> [B,T,G,O]: output rows cut into groups, each with its own slice of x."""
        w = self.weight
        if isinstance(w, quant.QTensor) and w.shape[0] // groups % 128:
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
        # A CPU turns all of x over before a batched product; other backends do not.
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
        scale = weight(self, "weight", (self.features,), ("norm",), nn.initializers.ones)
        norm = derivatives.of(rms_norm, self.execution.kernels)
        return self.execution.round(norm(self.eps, x, scale.astype(jnp.float32)))
