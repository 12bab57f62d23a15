"""DeepSeek-V4 as a functional model: `init`, `apply`, `init_cache`. Read this file first.

`network.Network` is the Linen module of the forward pass; `sharded` runs it on a mesh.

Dimension key, the suffix of every array's name:
  B batch            T query tokens      S window rows (older + own)   P older rows
  D hidden           M residual streams  N heads       H head dim      R rope dim
  L query latent     G output groups     C compressed entries          E experts (or new entries)
  K choices of a token  F expert width    I index heads Z index head dim
  V vocabulary       X anything flattened
Logical axes name the same things for sharding: vocab embed q_lora heads kv expert mlp router
compressed index_heads hc hc_embed norm, and layers for the repeats of a scanned segment.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import PartitionSpec

from v4jax import config as config_lib
from v4jax import weights
from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.model import ambient, arguments, sharded
from v4jax.model import cache as cache_lib
from v4jax.model.cache import Cache
from v4jax.model.layers import Execution
from v4jax.model.output import Output
from v4jax.sharding.rules import ONE_DEVICE, Layout

if TYPE_CHECKING:
    from v4jax.model.network import Network


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The model: `init(key)` makes variables, `apply(variables, tokens, ...)` runs them.

    Attributes:
      config: sizes and layers.
      dtype: activations, "float32" or "bfloat16"; the config's if left out.
      numerics: None, or "native" for the official low-precision rounding (section 10).
      min_repeats: a unit of layers that repeats at least so often is scanned, its weights stacked.
        Below it layers are unrolled, which spares a scan's copies of weights out of the stack.
      remat: recompute each unit's activations in the backward pass.
      kernels: "xla", "pallas_tpu" or "pallas_gpu" for every kernel (a Pallas one is interpreted
        where it cannot run); None takes the best of the platform that is compiled for. These have
        gradients and no other derivatives. "reference" is plain JAX on one device, slow, with
        derivatives of every order: jax.jvp, jax.linearize, jax.hessian.
      sharding: mesh and strategy to run on, by default one device; see `model.sharded`.
      source: the directory that the weights came from, for what lies beside them; models that
        differ in nothing else are equal.
    """

    config: ModelConfig
    dtype: str | None = None
    numerics: str | None = None
    min_repeats: int = 4
    remat: bool = False
    kernels: str | None = None
    sharding: Layout = ONE_DEVICE
    source: str | None = dataclasses.field(default=None, compare=False, repr=False)

    def execution(self) -> Execution:
        """How a forward pass computes, from `dtype`, `numerics`, `kernels` and `sharding`."""
        if self.numerics not in (None, "native"):
            raise InputError(f"numerics is {self.numerics!r}; expected None or 'native'")
        native = self.numerics == "native"
        default = "bfloat16" if native else self.config.dtype
        dtype = str(jnp.dtype(self.dtype or default))
        return Execution(dtype, native, self.kernels, self.sharding)

    def network(self) -> "Network":
        """The Linen module: on a mesh for use inside `shard_map`, on one shard's arrays."""
        # Layers and kernels take a second to import, which programs that are ready need not wait.
        from v4jax.model.network import Network

        return Network(self.config, self.execution(), self.min_repeats, self.remat)

    def segments(self) -> tuple[config_lib.Segment, ...]:
        """The units of layers that repeat, in order."""
        return config_lib.segments(self.config.layers, self.min_repeats)

    def clone(self, **changes) -> "Transformer":
        """The same model with other attributes."""
        return dataclasses.replace(self, **changes)

    def apply(
        self,
        variables: Any,
        tokens: Any,
        *,
        cache: Any = None,
        lengths: Any = None,
        segment_ids: Any = None,
        logits: str = "all",
        mtp: bool = False,
        aux: Any = (),
        replay: Any = None,
        dense: bool = False,
    ) -> Output:
        """One call for prefill, chunks of it, decode, padded and packed batches.

        With a mesh, arguments and results are global arrays (see `model.sharded`).

        Args:
          variables: {"params", "buffers"}, as `init` or `load` return them.
          tokens: ids, an integer array [B,T].
          cache: a `Cache`, the decode state that the tokens continue; the new one is in the output.
          lengths: integers [B], real tokens of each row in this call; the rest is right padding.
          segment_ids: integers [B,T], documents packed in a row, each a run of equal ids; nothing
            crosses.
          logits: "all", "last" (each row's last real token; never holds [B,T,V]), "none", or
            "normed" for a loss that never holds [B,T,V] either.
          mtp: also the MTP blocks' logits (without a cache).
          aux: a tuple of names out of `auxiliary.ASKABLE` to return.
          replay: {"router_experts" | "chosen": {layer: [B,T,K]}} to use instead of the model's
            own choices, as aux returned them (MTP blocks count on after the layers).
          dense: CSA layers attend to every visible entry, as in training before the sparse stage.

        Raises:
          InputError: arguments that contradict each other or the cache, or of another shape, type
            or (where their values are known: not inside `jax.jit`) range.
        """
        options = {
            "cache": cache,
            "lengths": lengths,
            "segment_ids": segment_ids,
            "logits": logits,
            "mtp": mtp,
            "aux": aux,
            "replay": replay,
            "dense": dense,
        }
        arguments.check(self, tokens, **options)
        if self.sharding.mesh is not None:
            return sharded.apply(self, variables, tokens, **options)
        with arguments.derivatives_explained():
            return ambient.run(self.network().apply, variables, {"tokens": tokens} | options)

    def init(self, rngs: Any, tokens: Any = None) -> dict[str, Any]:
        """Fresh variables {"params", "buffers"}, plain arrays; float32.

        Args:
          rngs: a key, as for any Linen module.
          tokens: example ids; shapes do not depend on them.
        """
        if self.sharding.mesh is not None:
            return sharded.init(self, rngs)
        if tokens is None:
            # Each MTP block needs a token of its own behind the first.
            tokens = jnp.zeros((1, 2 + len(self.config.mtp_layers)), jnp.int32)
        return dict(self.network().init(rngs, tokens))

    def abstract_variables(self) -> dict[str, Any]:
        """Shapes and types of `init`'s variables, nothing computed."""
        return self._by_path(
            lambda w: jax.ShapeDtypeStruct(w.shape, "int32" if w.role == "table" else "float32")
        )

    def logical_axes(self) -> dict[str, Any]:
        """A PartitionSpec of logical axis names for every variable."""
        return self._by_path(lambda w: PartitionSpec(*w.axes))

    def _by_path(self, of):
        """A tree like the variables, of what `of` makes of each declared weight."""
        declared = weights.variables(self.config, self.min_repeats)
        found = {path: of(weight) for path, weight in declared.items()}
        return {"params": {}, "buffers": {}} | unflatten_dict(found)

    def init_cache(
        self, batch: int, max_length: int, rollback: int = 0, store: str | None = None
    ) -> Cache:
        """An empty decode state; see `cache.init_cache`.

        Args:
          store: how rows of keys are kept. "native": as the official kernels store them, half the
            bytes, where native numerics has rounded them so. "activations": in the activations'
            type, which gives the same numbers. None: the smaller one that the numerics allows.

        Raises:
          InputError: sizes that no call could use, or a store that the numerics does not allow.
        """
        cache_lib.check_sizes(self.config, batch, max_length, rollback)
        execution = self.execution()
        if store is None:
            store = "native" if execution.native else "activations"
        cache_lib.check_store(store, execution.native)
        make = functools.partial(
            cache_lib.init_cache,
            self.config,
            batch,
            max_length,
            rollback=rollback,
            dtype=execution.dtype,
            min_repeats=self.min_repeats,
            parts=self.sharding.size("entries"),
            store=store,
        )
        if self.sharding.mesh is None:
            return make()
        self.sharding.check_divides({"batch": batch})
        shape = jax.eval_shape(make)
        return jax.jit(make, out_shardings=sharded.cache_shardings(self.sharding, shape))()
