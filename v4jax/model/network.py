"""The Linen module of a forward pass: one device's, or one shard's inside `shard_map`.

`transformer.Transformer` stands above it: it checks arguments, and runs this where they lie.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from v4jax import config as config_lib
from v4jax import weights
from v4jax.config import LayerSpec, ModelConfig
from v4jax.errors import InputError
from v4jax.model import taps
from v4jax.model.block import Unit
from v4jax.model.cache import Cache, LayerCache
from v4jax.model.context import Context, place_tokens, slice_of
from v4jax.model.dspark import DSparkStage, Ring
from v4jax.model.hyper_connections import HyperHead
from v4jax.model.layers import Execution, RMSNorm, weight
from v4jax.model.mtp import MTPBlock
from v4jax.model.output import Output
from v4jax.sharding import collectives
from v4jax.weights import Weight


class Network(nn.Module):
    """Embedding, layers, output head and MTP blocks.

    Attributes: as of `transformer.Transformer`; execution: where activations round, on what mesh.
    """

    config: ModelConfig
    execution: Execution
    min_repeats: int = 4
    remat: bool = False

    @nn.nowrap
    def segments(self) -> tuple[config_lib.Segment, ...]:
        return config_lib.segments(self.config.layers, self.min_repeats)

    def setup(self):
        config, execution = self.config, self.execution
        self.embed = _Table(weights.table(config), execution)
        self.units = [
            self._unit(segment)(config, self._specs(segment), execution, name=segment.name)
            for segment in self.segments()
        ]
        self.hc_head = HyperHead(config, execution)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, execution)
        self.head = _Table(weights.table(config), execution)
        self.mtp = [
            MTPBlock(config, spec, execution, name=f"mtp_{k}")
            for k, spec in enumerate(config.mtp_layers)
        ]
        stages = range(config.draft_layers if config.dspark else 0)
        self.draft = [DSparkStage(config, s, execution, name=f"draft_{s}") for s in stages]

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
        """The forward pass; arguments are those of `Transformer.apply`, which checks them."""
        tokens = jnp.asarray(tokens, jnp.int32)
        lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
        segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
        replay = replay or {}
        start = None if cache is None else cache.lengths
        layout = self.execution.layout
        context = place_tokens(tokens, lengths, start, segment_ids, aux, dense, layout)
        # The embedding, repeated over the residual streams, through all layers.
        last_only = logits == "last" and self._can_narrow(tokens, cache, aux, replay)
        h_BTMD = self._streams(context.tokens)
        h_BTMD, cache, found = self._layers(h_BTMD, context, cache, replay, last_only)
        # The MTP blocks' states; a fresh model makes their weights too.
        states = ()
        if mtp or self.is_initializing():
            states = self._mtp(h_BTMD, tokens, context, found, replay)
        if self.is_initializing() and self.draft:
            self._init_draft(tokens)
        out = Output(cache=cache, aux=found)
        if "last_streams" in aux:
            out = out.replace(streams=h_BTMD)
        if logits == "normed":
            return out.replace(normed=self.norm(self.hc_head(h_BTMD)), mtp_normed=states)
        out = out.replace(mtp_logits=tuple(self._logits(y_BTD) for y_BTD in states))
        if logits == "none" and not self.is_initializing():
            return out.replace(streams=h_BTMD)
        # The output head, on every token or on each row's last real one.
        if logits == "last" and not last_only:
            h_BTMD = context.last(h_BTMD)
        return out.replace(logits=self._logits(self.norm(self.hc_head(h_BTMD))))

    def _streams(self, tokens):
        """The embedding repeated over the residual streams."""
        x_BTD = self.embed.rows(tokens).astype(self.execution.dtype)
        shape = (*tokens.shape, self.config.hc_mult, self.config.hidden_size)
        return jnp.broadcast_to(x_BTD[:, :, None], shape)

    def _layers(self, h_BTMD, context: Context, cache, replay, last_only):
        """All layers; the new cache and aux[name][layer].

        last_only: of the last layer only its cache and each row's last token are needed.
        """
        found: dict[str, dict[int, Array]] = {}
        kept = {}
        tapped = taps.empty(self.config, h_BTMD) if "features" in context.aux else None
        for segment, unit in zip(self.segments(), self.units, strict=True):
            caches = None if cache is None else cache.layers[segment.name]
            if segment == self.segments()[-1]:
                context = context.replace(last_only=last_only)
            slots = () if tapped is None else taps.slots(self.config, segment)
            carry, auxes = _run(unit, segment, (h_BTMD, caches, tapped), replay, slots, context)
            h_BTMD, kept[segment.name], tapped = carry
            for place, aux in enumerate(auxes):
                _collect(found, aux, segment.layers(place))
        if tapped is not None:
            found["features"] = taps.features(tapped)
        if cache is None:
            return h_BTMD, None, found
        spare = jnp.minimum(cache.spare + context.call.total, cache.max_rollback)
        lengths = cache.lengths + context.call.total
        return h_BTMD, cache.replace(lengths=lengths, spare=spare, layers=kept), found

    @nn.nowrap
    def _can_narrow(self, tokens, cache, aux, replay):
        """Whether the last layer can leave out all but each row's last token and its cache.

        Not in a scan, whose steps are one program; nor where each shard has a slice of the row.
        """
        several = tokens.shape[1] > 1 and cache is not None and not (aux or replay)
        layout = self.execution.layout
        return several and self.segments()[-1].repeats == 1 and not layout.axes("sequence")

    def _logits(self, y_BTD):
        y, table = y_BTD.astype(jnp.float32), self.head.table().astype(jnp.float32)
        return jnp.einsum("btd,vd->btv", y, table)

    def _mtp(self, h_BTMD, tokens_BT, context: Context, found, replay):
        """Each MTP block's normed state, for the output head.

        Block k predicts token t + k + 1 from block k - 1's streams and the embedding of token
        t + k.
        """
        states = []
        layout, length = self.execution.layout, tokens_BT.shape[1]
        for k, block in enumerate(self.mtp):
            # Positions and documents stay those of the streams: the block attends among them. The
            # last k + 1 rows have no such token; nothing before them sees them.
            tokens_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
            total = jnp.maximum(context.call.total - k - 1, 0)
            call = context.call.replace(total=total)
            here = slice_of(tokens_BT, call, context.aux, False, layout)
            e_BTD = self.embed.rows(here.tokens).astype(self.execution.dtype)
            number = len(self.config.layers) + k
            h_BTMD, y_BTD, aux, _ = block(h_BTMD, e_BTD, here, _replay_of(replay, number))
            states.append(y_BTD if layout.axes("sequence") else y_BTD[:, : length - k - 1])
            _collect(found, aux, [number])
        return tuple(states)

    def mtp_rows(self, h_BTMD, tokens_BT, window_BPH, begin_B, count_B):
        """New rows of the first MTP block's window; see `draft.MTPState`.

        Args:
          h_BTMD, tokens_BT: pairs of streams and the token behind them, each row's first real.
          window_BPH: the rows so far, the newest last. begin_B: the position of each first pair.
          count_B: each row's real pairs.

        Returns:
          The window; of each row's last real pair the block's streams [B,M,D] and logits [B,V].
        """
        layout = self.execution.layout
        context = place_tokens(tokens_BT, count_B, begin_B, None, layout=layout)
        e_BTD = self.embed.rows(context.tokens).astype(self.execution.dtype)
        cache = LayerCache(window=window_BPH[None])
        # The window needs every pair's row, and those are made without queries or experts.
        context = context.replace(last_only=True)
        z_B1MD, y_B1D, _, cache = self.mtp[0](h_BTMD, e_BTD, context, cache=cache)
        return cache.window[0], z_B1MD[:, 0], self._logits(y_B1D)[:, 0]

    def draft_rows(self, features_BTX, begin_B):
        """A DSpark draft's ring rows of tokens at positions begin, begin + 1, ...: [B,S,T,H].

        Args:
          features_BTX: `aux["features"]` of these tokens.
        """
        position = begin_B[:, None] + jnp.arange(features_BTX.shape[1], dtype=jnp.int32)[None]
        return self.draft_rows_at(features_BTX, position)

    def draft_rows_at(self, features_BTX, position_BT):
        """`draft_rows` of tokens at any positions."""
        f_BTD = self.draft[0].read(features_BTX)
        return jnp.stack([stage.rows(f_BTD, position_BT) for stage in self.draft], axis=1)

    def draft_block(self, tokens_BT, rings_BSWH, length_B):
        """One pass of a DSpark draft over a block of tokens behind `length` others.

        Returns:
          The collapsed state [B,T,D], the logits [B,T,V] before the heads, and their weights.
        """
        context = place_tokens(tokens_BT, None, length_B, None, layout=self.execution.layout)
        x_BTMD = self._streams(context.tokens)
        for s, stage in enumerate(self.draft):
            x_BTMD = stage(x_BTMD, context, Ring(rings_BSWH[:, s], length_B))
        y_BTD, normed_BTD = self.draft[-1].collapse(x_BTMD)
        return y_BTD, self._logits(normed_BTD), self.draft[-1].heads()

    def _init_draft(self, tokens_BT):
        config, batch = self.config, tokens_BT.shape[0]
        dtype, begin = self.execution.dtype, jnp.zeros((batch,), jnp.int32)
        width = len(config.dspark.target_layer_ids) * config.hidden_size
        rows = self.draft_rows(jnp.zeros((*tokens_BT.shape, width), dtype), begin)
        self.draft_block(tokens_BT, rows, begin)


class _Table(nn.Module):
    """An embedding or output table [V,D]."""

    declared: Weight
    execution: Execution

    def setup(self):
        self.weight = weight(self, "weight", self.declared)

    def rows(self, ids):
        layout, count = self.execution.layout, self.weight.shape[0]
        axes = layout.kept("vocab")
        if not axes:
            return self.weight[ids]
        here = ids - layout.index("vocab") * count
        rows = self.weight[jnp.clip(here, 0, count - 1)]
        mine = ((here >= 0) & (here < count))[..., None]
        return collectives.total(jnp.where(mine, rows, 0), axes)

    def table(self):
        return self.weight


def _run(unit, segment, carry, replay, slots, context):
    """A segment, scanned if it repeats; replays stacked over its repeats, as slots of taps are."""
    if segment.repeats == 1:
        replays = tuple(_replay_of(replay, segment.start + i) for i in range(segment.period))
        return unit(carry, (0, replays, slots), context)
    replays = tuple(_stacked_replay(replay, segment, i) for i in range(segment.period))
    index = jnp.arange(segment.repeats, dtype=jnp.int32)
    return unit(carry, (index, replays, slots), context)


def _replay_of(replay, layer):
    return {name: layers[layer] for name, layers in replay.items() if layer in layers}


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


def _collect(found, aux, layers):
    """Files a block's auxiliary outputs, stacked where it stands for layers, as found[name][n]."""
    for name, value in aux.items():
        if value is not None:
            parts = [value] if len(layers) == 1 else [value[r] for r in range(len(layers))]
            found.setdefault(name, {}).update(zip(layers, parts, strict=True))
