"""A model whose weights stay on disk: every call reads its layers one by one, as they are needed.

The same numbers as `model.transformer.Transformer` from a few gigabytes of memory: while one layer
computes, the next one's dense weights are read, and of the routed experts only those that tokens of
the call chose, a group at a time. Cache and activations stay in memory.
"""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.model import arguments
from v4jax.model.cache import Cache
from v4jax.model.context import Context
from v4jax.model.output import Output
from v4jax.model.transformer import Transformer
from v4jax.streamed import programs
from v4jax.streamed.groups import Group, groups_of
from v4jax.streamed.source import LayerSource

OnLayer = Callable[[int, jax.Array], Any]  # (layer, streams) -> other streams, or None

_GROUP_BYTES = 512 << 20  # of experts that are computed at once, while as many are read
_HEAD_BYTES = 128 << 20  # of the output head, likewise


@dataclasses.dataclass(frozen=True)
class StreamedTransformer:
    """A model without weights in memory: `apply(source, tokens, ...)` runs it.

    Attributes:
      transformer: the same model, of the layers that run, none of them scanned.
      on_layer: called with the number of each layer and the streams [B,T,M,D] after it; where it
        returns an array, the next layer gets that instead. Of a call with a cache and
        logits="last" the last layer's streams are those of each row's last token.
      group_bytes: how many bytes of routed experts are computed at once (at least one expert).
    """

    transformer: Transformer
    on_layer: OnLayer | None = None
    group_bytes: int = _GROUP_BYTES

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    def clone(self, **changes) -> "StreamedTransformer":
        """The same model with other attributes."""
        return dataclasses.replace(self, **changes)

    def init_cache(
        self, batch: int, max_length: int, rollback: int = 0, store: str | None = None
    ) -> Cache:
        """An empty decode state; see `Transformer.init_cache`."""
        return self.transformer.init_cache(batch, max_length, rollback, store)

    def apply(
        self,
        source: Any,
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
        """One call for prefill, chunks of it and decode, as `Transformer.apply`.

        Outputs of right padding are finite and otherwise without a meaning. Not for use inside
        `jax.jit`, and without gradients.

        Args:
          source: reads the weights, as `v4jax.load(..., stream=True)` returns it.
          others: as of `Transformer.apply`.

        Raises:
          InputError: as of `Transformer.apply`; mtp, since the blocks' weights are not read; a
            file that was cut short since it was opened.
        """
        if not isinstance(source, LayerSource):
            raise InputError(
                f"the weights of a streamed model are of type {type(source).__name__}; expected "
                "what v4jax.load(..., stream=True) returned with it"
            )
        if mtp:
            raise InputError("mtp=True of a streamed model; its MTP blocks are not read: load it")
        options = {"cache": cache, "lengths": lengths, "segment_ids": segment_ids, "aux": aux}
        options |= {"logits": logits, "replay": replay, "dense": dense, "mtp": mtp}
        arguments.check(self.transformer, tokens, **options)
        tokens = np.asarray(tokens, np.int32)
        lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
        start = None if cache is None else cache.lengths
        context = programs.place(tokens, lengths, start, segment_ids, tuple(aux), dense)
        narrow = logits == "last" and cache is not None and tokens.shape[1] > 1
        narrow = narrow and not (aux or replay)
        with ThreadPoolExecutor(2) as pool:
            call = _Call(self, source, pool, context, replay or {}, narrow)
            h_BTMD = call.embed(tokens)
            h_BTMD, layers, found = call.layers(h_BTMD, cache)
            out = Output(cache=_advanced(cache, context, layers), aux=found)
            if logits == "none" or "last_streams" in aux:
                out = out.replace(streams=h_BTMD)
            if logits == "none":
                return out
            if logits == "last" and not narrow:
                h_BTMD = context.last(h_BTMD)
            y_BTD = call.collapse(h_BTMD)
            if logits == "normed":
                return out.replace(normed=y_BTD)
            return out.replace(logits=call.logits(y_BTD))


@dataclasses.dataclass
class _Call:
    """One forward pass; narrow: of the last layer only each row's last token is needed."""

    model: StreamedTransformer
    source: LayerSource
    pool: ThreadPoolExecutor
    context: Context
    replay: dict[str, dict[int, jax.Array]]
    narrow: bool

    def __post_init__(self):
        self.config = self.model.config
        self.execution = self.model.transformer.execution()
        self.kinds = programs.kinds(self.config, self.execution)
        self._ahead = self._begin(self.source.dense, "layer_000")

    def embed(self, tokens):
        x_BTD = self.source.embedding(tokens)
        return programs.begin(self.config.hc_mult, self.execution, x_BTD)

    def layers(self, h_BTMD, cache):
        """All layers: the streams, the new cache's layers, and aux[name][layer]."""
        kept, found = {}, {}
        names = [segment.name for segment in self.model.transformer.segments()]
        items = [*(f"layer_{i:03d}" for i in range(1, len(names))), "head"]
        for layer, (name, following) in enumerate(zip(names, items, strict=True)):
            variables = self._ahead.result()
            self._ahead = self._begin(self.source.dense, following)
            last = layer == len(names) - 1
            context = self.context.replace(last_only=self.narrow and last)
            own = None if cache is None else cache.layers[name][0]
            h_BTMD, own, aux = self._layer(layer, variables, h_BTMD, context, own)
            kept[name] = (own,)
            for key, value in aux.items():
                if value is not None:
                    found.setdefault(key, {})[layer] = value
            if self.model.on_layer is not None:
                other = self.model.on_layer(layer, h_BTMD)
                h_BTMD = h_BTMD if other is None else _replaced(h_BTMD, other)
        return h_BTMD, kept, found

    def collapse(self, h_BTMD):
        return programs.collapse(self.kinds[0], self._ahead.result(), h_BTMD)

    def logits(self, y_BTD):
        """The output head, some of its rows at a time."""
        rows = self.config.vocab_size
        parts = -(-rows // max(1, _HEAD_BYTES // self.source.head_row_bytes))
        size = -(-rows // parts)
        bounds = [(first, min(first + size, rows)) for first in range(0, rows, size)]
        found = []
        for table_VD in self._one_ahead(self.source.head_rows, bounds):
            part = programs.logits_of_rows(y_BTD, table_VD)
            found.append(jax.block_until_ready(part))
        return found[0] if len(found) == 1 else jnp.concatenate(found, axis=-1)

    def _layer(self, layer, variables, h_BTMD, context, cache):
        kind = self.kinds[layer]
        replay = {key: given[layer] for key, given in self.replay.items() if layer in given}
        queries = context.for_queries()
        # A hash layer's experts are known before its attention has run, and are read meanwhile.
        known = replay.get("router_experts")
        if known is None and kind.spec.routing == "hash":
            table = np.asarray(variables["buffers"]["ffn"]["gate"]["tid2eid"])
            known = table[np.asarray(queries.tokens)]
        reads = None if known is None else self._reads(layer, known, context)
        done = programs.attend(kind, variables, h_BTMD, context, cache, replay)
        reads = reads or self._reads(layer, done.chosen_BTK, context)
        x_BTD, gates_BTK = done.between.x_BTD, done.gates_BTK
        y_YD = jnp.zeros((gates_BTK.size, x_BTD.shape[-1]), self.execution.dtype)
        for group, experts in reads:
            rows = (group.source_R, group.sizes_E)
            arrays = (experts, x_BTD, gates_BTK, *rows, y_YD)
            y_YD = programs.run_experts(self.config.swiglu_limit, self.execution, *arrays)
            # Without this the host would read groups ahead of those that compute.
            jax.block_until_ready(y_YD)
            del experts, arrays
        h_BTMD, aux = programs.finish(kind, variables, done.between, y_YD, queries)
        return h_BTMD, done.cache, done.aux | aux

    def _reads(self, layer, chosen_BTK, context) -> Iterator[tuple[Group, dict[str, Any]]]:
        """The groups of a layer's chosen experts; the first is being read when this returns."""
        chosen_BTK = np.asarray(chosen_BTK)
        total, real = np.asarray(context.count), np.asarray(context.real)
        real = (total > 0)[:, None] if context.last_only else real
        most = max(1, self.model.group_bytes // self.source.expert_bytes)
        count, k = self.config.n_routed_experts, chosen_BTK.shape[-1]
        groups = groups_of(chosen_BTK.reshape(-1, k), real.reshape(-1), count, most)
        asked = [(f"layer_{layer:03d}", group.experts, group.room) for group in groups]
        return zip(groups, self._one_ahead(self.source.experts, asked), strict=True)

    def _one_ahead(self, read, asked: list[tuple]) -> Iterator[Any]:
        """The results of `read` on each; the next is read while the caller works on one."""
        first = self._begin(read, *asked[0]) if asked else None
        return self._rest_ahead(read, asked, first)

    def _rest_ahead(self, read, asked, ahead):
        for following in [*asked[1:], None]:
            if ahead is None:
                return
            found = ahead.result()
            ahead = None if following is None else self._begin(read, *following)
            yield found
            del found

    def _begin(self, read, *arguments) -> Future:
        return self.pool.submit(read, *arguments)


def _replaced(h_BTMD, other):
    if other.shape != h_BTMD.shape:
        raise InputError(
            f"on_layer returned an array of shape {list(other.shape)}; expected that of the "
            f"streams, {list(h_BTMD.shape)}, or None to leave them as they are"
        )
    return jnp.asarray(other, h_BTMD.dtype)


def _advanced(cache, context: Context, layers):
    """The cache after the call."""
    if cache is None:
        return None
    total = context.call.total
    spare = jnp.minimum(cache.spare + total, cache.max_rollback)
    return cache.replace(lengths=cache.lengths + total, spare=spare, layers=layers)
