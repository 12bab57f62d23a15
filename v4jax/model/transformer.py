"""DeepSeek-V4 as a Flax Linen module. Read this file first.

Dimension key, the suffix of every array's name:
  B batch            T query tokens      S window rows (older + own)   P older rows
  D hidden           M residual streams  N heads       H head dim      R rope dim
  L query latent     G output groups     C compressed entries          E experts (or new entries)
  K choices a token  F expert width      I index heads Z index head dim
  V vocabulary       X anything flattened
Logical axes name the same things for sharding: vocab embed q_lora heads kv expert mlp router
compressed index_heads hc hc_embed norm, and layers for the repeats of a scanned segment.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from v4jax import config as config_lib
from v4jax.config import LayerSpec, ModelConfig
from v4jax.errors import InputError
from v4jax.model import ambient, arguments, sharded
from v4jax.model import cache as cache_lib
from v4jax.model.block import Unit
from v4jax.model.cache import Cache
from v4jax.model.context import AUX_NAMES, Context, check_packed, place_tokens, slice_of
from v4jax.model.hyper_connections import HyperHead
from v4jax.model.layers import Execution, RMSNorm, weight
from v4jax.model.mtp import MTPBlock
from v4jax.reprs import short_repr
from v4jax.sharding import collectives
from v4jax.sharding.rules import ONE_DEVICE, Layout


@struct.dataclass
class Output:
    """What `model.apply` returns.

    logits float32: [B,T,V], or [B,1,V] of each row's last token, or None with logits="none" and
    "normed". normed, mtp_normed: with logits="normed" what the output head would multiply, [B,T,D].
    cache: the new decode state, when one went in. mtp_logits: with mtp=True one array for each
    MTP block k = 1, 2, ...: [B,T-k,V], at t the prediction of token t + k + 1.
    aux: wanted auxiliary outputs, aux[name][layer]; MTP blocks count on after the layers.
    streams: [B,T,M,D] with logits="none".
    """

    logits: Any
    cache: Any = None
    mtp_logits: Any = ()
    aux: Any = struct.field(default_factory=dict)
    streams: Any = None
    normed: Any = None
    mtp_normed: Any = ()

    def __repr__(self) -> str:
        return short_repr(self)


class Transformer(nn.Module):
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
      inside: whether `apply` is called inside `shard_map` already, on one shard's arrays.
    """

    config: ModelConfig
    dtype: str | None = None
    numerics: str | None = None
    min_repeats: int = 4
    remat: bool = False
    kernels: str | None = None
    sharding: Layout = ONE_DEVICE
    inside: bool = False

    @nn.nowrap
    def execution(self) -> Execution:
        """Where activations round, from `dtype` and `numerics`."""
        if self.numerics not in (None, "native"):
            raise InputError(f"numerics is {self.numerics!r}; expected None or 'native'")
        native = self.numerics == "native"
        default = "bfloat16" if native else self.config.dtype
        layout = self.sharding if self.inside else ONE_DEVICE
        return Execution(str(jnp.dtype(self.dtype or default)), native, self.kernels, layout)

    @nn.nowrap
    def segments(self) -> tuple[config_lib.Segment, ...]:
        return config_lib.segments(self.config.layers, self.min_repeats)

    def setup(self):
        config, execution = self.config, self.execution()
        normal = nn.initializers.normal(config.initializer_range)
        shape = (config.vocab_size, config.hidden_size)
        self.embed = _Table(shape, ("vocab", "embed"), normal, execution)
        self.units = [
            self._unit(segment)(config, self._specs(segment), execution, name=segment.name)
            for segment in self.segments()
        ]
        self.hc_head = HyperHead(config, execution)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, execution)
        self.head = _Table(shape, ("vocab", "embed"), normal, execution)
        self.mtp = [
            MTPBlock(config, spec, execution, name=f"mtp_{k}")
            for k, spec in enumerate(config.mtp_layers)
        ]

    @nn.nowrap
    def _specs(self, segment) -> tuple[LayerSpec, ...]:
        return self.config.layers[segment.start : segment.start + segment.period]

    @nn.nowrap
    def _unit(self, segment):
        unit = nn.remat(Unit, prevent_cse=segment.repeats == 1) if self.remat else Unit
        if segment.repeats == 1:
            return unit
        return nn.scan(
            unit,
            variable_axes={"params": 0, "buffers": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=segment.repeats,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "b t"],
        *,
        cache: Cache | None = None,
        lengths: Int[Array | np.ndarray, " b"] | None = None,
        segment_ids: Int[Array | np.ndarray, "b t"] | None = None,
        logits: str = "all",
        mtp: bool = False,
        aux: tuple[str, ...] = (),
        replay: dict[str, dict[int, Array]] | None = None,
        dense: bool = False,
    ) -> Output:
        """One call for prefill, chunks of it, decode, padded and packed batches.

        Args:
          tokens: ids [B,T].
          cache: decode state that the tokens continue; the new one is in the output.
          lengths: real tokens of each row in this call; the rest is right padding.
          segment_ids: documents packed in a row, each a run of equal ids; nothing crosses.
          logits: "all", "last" (each row's last real token; never holds [B,T,V]), "none", or
            "normed" for a loss that never holds [B,T,V] either.
          mtp: also the MTP blocks' logits (without a cache).
          aux: names out of `context.AUX_NAMES` to return.
          replay: {"router_experts" | "chosen": {layer: [B,T,K]}} to use instead of the model's
            own choices, as aux returned them (MTP blocks count on after the layers).
          dense: CSA layers attend to every visible entry, as in training before the sparse stage.

        Raises:
          InputError: arguments that contradict each other or the cache.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
        segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
        self._check(tokens, cache, segment_ids, lengths, logits, mtp, aux)
        start = None if cache is None else cache.lengths
        layout = self.execution().layout
        context = place_tokens(tokens, lengths, start, segment_ids, aux, dense, layout)
        h_BTMD = self._streams(context.tokens)
        last_only = logits == "last" and self._can_narrow(tokens, cache, aux, replay)
        h_BTMD, cache, found = self._layers(h_BTMD, context, cache, replay or {}, last_only)
        initializing = self.is_initializing()
        states = (
            self._mtp(h_BTMD, tokens, context, found, replay or {}) if mtp or initializing else ()
        )
        if logits == "normed":
            y_BTD = self.norm(self.hc_head(h_BTMD))
            return Output(None, cache, (), found, None, y_BTD, states)
        predictions = tuple(self._logits(y_BTD) for y_BTD in states)
        if logits == "none" and not initializing:
            return Output(None, cache, predictions, found, h_BTMD)
        if logits == "last" and not last_only:
            h_BTMD = context.last(h_BTMD)
        y_BTD = self.norm(self.hc_head(h_BTMD))
        return Output(self._logits(y_BTD), cache, predictions, found)

    @nn.nowrap
    def apply(self, variables, *args, **options):
        """Runs `__call__` on the variables; with a mesh, of global arrays (see `model.sharded`).

        Raises:
          InputError: as `__call__`; arguments of another shape, type or (where their values are
            known: not inside `jax.jit`) range.
        """
        if self.inside or "method" in options:
            return super().apply(variables, *args, **options)
        arguments.check(self, *args, **options)
        if self.sharding.mesh is not None:
            return sharded.apply(self, variables, *args, **options)
        options |= {"tokens": args[0]} if args else {}
        with arguments.derivatives_explained():
            return ambient.run(super().apply, variables, options)

    @nn.nowrap
    def init(self, rngs, tokens=None, **options):
        """Fresh variables {"params", "buffers"}, plain arrays; float32.

        Args:
          rngs: a key, as for any Linen module.
          tokens: example ids; shapes do not depend on them.
        """
        if self.sharding.mesh is not None:
            return sharded.init(self, rngs)
        return nn.unbox(self._boxed(rngs, tokens, **options))

    @nn.nowrap
    def _boxed(self, rngs, tokens=None, **options):
        if tokens is None:
            # Each MTP block needs a token of its own behind the first.
            tokens = jnp.zeros((1, 2 + len(self.config.mtp_layers)), jnp.int32)
        return super().init(rngs, tokens, **options)

    @nn.nowrap
    def abstract_variables(self):
        """Shapes and types of `init`'s variables, nothing computed."""
        return jax.eval_shape(self.init, jax.random.key(0))

    @nn.nowrap
    def logical_axes(self):
        """A PartitionSpec of logical axis names for every variable."""
        return nn.get_partition_spec(jax.eval_shape(self._boxed, jax.random.key(0)))

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int, rollback: int = 0) -> Cache:
        """An empty decode state; see `cache.init_cache`."""
        cache_lib.check_sizes(self.config, batch, max_length, rollback)
        make = functools.partial(
            cache_lib.init_cache,
            self.config,
            batch,
            max_length,
            rollback=rollback,
            dtype=self.execution().dtype,
            min_repeats=self.min_repeats,
            parts=self.sharding.size("entries"),
        )
        if self.sharding.mesh is None:
            return make()
        self.sharding.check_divides({"batch": batch})
        shape = jax.eval_shape(make)
        return jax.jit(make, out_shardings=sharded.cache_shardings(self.sharding, shape))()

    def _streams(self, tokens):
        """The embedding repeated over the residual streams."""
        x_BTD = self.embed.rows(tokens).astype(self.execution().dtype)
        shape = (*tokens.shape, self.config.hc_mult, self.config.hidden_size)
        return jnp.broadcast_to(x_BTD[:, :, None], shape)

    def _layers(self, h_BTMD, context: Context, cache, replay, last_only):
        """All layers; the new cache and aux[name][layer].

        last_only: nothing is wanted of the last layer but its cache and each row's last token.
        """
        found: dict[str, dict[int, Array]] = {}
        kept = {}
        for segment, unit in zip(self.segments(), self.units, strict=True):
            caches = None if cache is None else cache.layers[segment.name]
            if segment == self.segments()[-1]:
                context = context.replace(last_only=last_only)
            carry, auxes = _run(unit, segment, (h_BTMD, caches), replay, context)
            h_BTMD, kept[segment.name] = carry
            _collect(found, auxes, segment)
        if cache is None:
            return h_BTMD, None, found
        spare = jnp.minimum(cache.spare + context.call.total, cache.max_rollback)
        lengths = cache.lengths + context.call.total
        return h_BTMD, cache.replace(lengths=lengths, spare=spare, layers=kept), found

    @nn.nowrap
    def _can_narrow(self, tokens, cache, aux, replay):
        """Whether the last layer can leave out all but each row's last token, beside its cache.

        Not in a scan, whose steps are one program; nor where each shard has a slice of the row.
        """
        several = tokens.shape[1] > 1 and cache is not None and not (aux or replay)
        layout = self.execution().layout
        return several and self.segments()[-1].repeats == 1 and not layout.axes("sequence")

    def _logits(self, y_BTD):
        y, table = y_BTD.astype(jnp.float32), self.head.table().astype(jnp.float32)
        return jnp.einsum("btd,vd->btv", y, table)

    def _mtp(self, h_BTMD, tokens_BT, context: Context, found, replay):
        """Each MTP block's normed state: block k reads block k - 1's streams and ids k further."""
        states = []
        layout, length = self.execution().layout, tokens_BT.shape[1]
        for k, block in enumerate(self.mtp):
            # Positions and documents stay those of the streams: the block attends among them. The
            # last k + 1 rows have no such token; nothing before them sees them.
            tokens_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
            total = jnp.maximum(context.call.total - k - 1, 0)
            call = context.call.replace(total=total)
            here = slice_of(tokens_BT, call, context.aux, False, layout)
            e_BTD = self.embed.rows(here.tokens).astype(self.execution().dtype)
            number = len(self.config.layers) + k
            given = {name: layers[number] for name, layers in replay.items() if number in layers}
            h_BTMD, y_BTD, aux = block(h_BTMD, e_BTD, here, given)
            states.append(y_BTD if layout.axes("sequence") else y_BTD[:, : length - k - 1])
            for name, value in aux.items():
                if value is not None:
                    found.setdefault(name, {})[number] = value
        return tuple(states)

    @nn.nowrap
    def _check(self, tokens, cache, segment_ids, lengths, logits, mtp, aux):
        if logits not in ("all", "last", "none", "normed"):
            raise InputError(f"logits is {logits!r}; expected 'all', 'last', 'none' or 'normed'")
        unknown = sorted(set(aux) - set(AUX_NAMES))
        if unknown:
            raise InputError(f"aux names {unknown} are unknown; expected some of {AUX_NAMES}")
        if tokens.shape[1] == 0:
            raise InputError("tokens has no columns; expected at least one token a row")
        if not self.inside:  # where `sharded` has checked, and may have padded a packed row
            check_packed(segment_ids, cache, lengths)
        if cache is not None:
            arguments.check_room(tokens, cache, lengths, mtp)


class _Table(nn.Module):
    """An embedding or output table [V,D]."""

    shape: tuple[int, int]
    axes: tuple[str, str]
    init_fn: nn.initializers.Initializer
    execution: Execution

    def setup(self):
        self.weight = weight(self, "weight", self.shape, self.axes, self.init_fn)

    def rows(self, ids):
        layout, count = self.execution.layout, self.weight.shape[0]
        axes = layout.kept(self.axes[0])
        if not axes:
            return self.weight[ids]
        here = ids - layout.index(self.axes[0]) * count
        rows = self.weight[jnp.clip(here, 0, count - 1)]
        mine = ((here >= 0) & (here < count))[..., None]
        return collectives.total(jnp.where(mine, rows, 0), axes)

    def table(self):
        return self.weight


def _run(unit, segment, carry, replay, context):
    """A segment, scanned if it repeats; replays stacked over its repeats."""
    if segment.repeats == 1:
        replays = tuple(
            {name: layers[segment.start + i] for name, layers in replay.items()
             if segment.start + i in layers}
            for i in range(segment.period)
        )  # fmt: skip
        return unit(carry, (0, replays), context)
    replays = tuple(_stacked_replay(replay, segment, i) for i in range(segment.period))
    return unit(carry, (jnp.arange(segment.repeats, dtype=jnp.int32), replays), context)


def _stacked_replay(replay, segment, place):
    numbers = [segment.start + place + segment.period * r for r in range(segment.repeats)]
    stacked = {}
    for name, layers in replay.items():
        given = [n for n in numbers if n in layers]
        if given and len(given) < len(numbers):
            raise InputError(
                f"replay of {name} has layers {given} and lacks others of the scanned group "
                f"{numbers}; give all of a group, or build the model with a larger min_repeats"
            )
        if given:
            stacked[name] = jnp.stack([layers[n] for n in numbers])
    return stacked


def _collect(found, auxes, segment):
    """Files a segment's auxiliary outputs under found[name][layer]."""
    for place, aux in enumerate(auxes):
        for name, value in aux.items():
            if value is None:
                continue
            for repeat in range(segment.repeats):
                layer = segment.start + repeat * segment.period + place
                one = value if segment.repeats == 1 else value[repeat]
                found.setdefault(name, {})[layer] = one
