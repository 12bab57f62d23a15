"""A forward pass on a mesh: the whole model inside one `shard_map`, and what lies where.

`Transformer.apply` comes here when the model has a mesh. Arguments and results are global arrays;
rows of a call are padded to a number that the shards divide, and cut off again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from v4jax import weights
from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.model import auxiliary
from v4jax.model.cache import Cache, CompressorState, LayerCache
from v4jax.model.output import Output
from v4jax.sharding import collectives
from v4jax.sharding.rules import ONE_DEVICE, Layout


def check(config: ModelConfig, layout: Layout) -> None:
    """Refuses a mesh that does not divide the model.

    Raises:
      InputError: naming the axis, its size and the mesh axes.
    """
    layout.check_divides(weights.axis_sizes(config))


# Asked for at every call of a model on a mesh.
@functools.lru_cache(maxsize=32)
def variable_specs(model) -> dict[str, Any]:
    """A PartitionSpec for every variable; that of a quantised matrix holds for both its leaves."""
    return jax.tree.map(
        lambda names: model.sharding.spec(*names),
        model.logical_axes(),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def variable_shardings(model) -> dict[str, Any]:
    """`variable_specs` on the mesh, for `jax.jit` and `jax.device_put`."""
    return _on_mesh(model.sharding, variable_specs(model))


def cache_specs(layout: Layout, cache: Cache) -> Cache:
    """PartitionSpecs of a decode state."""
    rows, entries = layout.spec(None, "batch"), layout.spec(None, "batch", "entries")

    def each(spec, buffer):
        return jax.tree.map(lambda _: spec, buffer)

    def compressor(state):
        return state and CompressorState(entries=each(entries, state.entries), raw=rows)

    def layer(state):
        return LayerCache(
            window=each(rows, state.window),
            tokens=each(entries, state.tokens),
            main=compressor(state.main),
            index=compressor(state.index),
        )

    layers = {name: tuple(map(layer, blocks)) for name, blocks in cache.layers.items()}
    batch = layout.spec("batch")
    return cache.replace(lengths=batch, spare=batch, layers=layers)


def cache_shardings(layout: Layout, cache: Cache) -> Cache:
    """`cache_specs` on the mesh."""
    return _on_mesh(layout, cache_specs(layout, cache))


def _on_mesh(layout, specs):
    return jax.tree.map(
        lambda spec: NamedSharding(layout.mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def init(model, rngs):
    """Fresh variables, made where they lie: no device ever holds all of them."""
    check(model.config, model.sharding)
    alone = model.clone(sharding=ONE_DEVICE)
    return jax.jit(alone.init, out_shardings=variable_shardings(model))(rngs)


def apply(
    model,
    variables,
    tokens,
    *,
    cache=None,
    lengths=None,
    segment_ids=None,
    replay=None,
    logits="all",
    mtp=False,
    aux=(),
    **options,
):
    """`Transformer.apply` of global arrays on the model's mesh."""
    layout = model.sharding
    check(model.config, layout)
    tokens = jnp.asarray(tokens, jnp.int32)
    batch, length = tokens.shape
    layout.check_divides({"batch": batch})
    padding = -length % layout.size("sequence")
    tokens, lengths, segment_ids, replay = _padded(padding, tokens, lengths, segment_ids, replay)
    specs = variable_specs(model)
    variables = {name: tree for name, tree in variables.items() if name in specs}
    row = layout.spec("batch")
    in_specs = (
        {name: specs[name] for name in variables},
        row,
        None if cache is None else cache_specs(layout, cache),
        None if lengths is None else row,
        None if segment_ids is None else row,
        layout.spec("batch", "sequence"),
    )
    body = functools.partial(apply_local, model.network(), logits, mtp, aux, options)
    out = jax.shard_map(
        body,
        mesh=layout.mesh,
        in_specs=in_specs,
        out_specs=_output_specs(model, logits, mtp, aux, cache, replay),
        check_vma=False,
    )(variables, tokens, cache, lengths, segment_ids, replay)
    return _cut(out, length, padding, layout)


def apply_local(
    network, logits, mtp, aux, options, variables, tokens, cache, lengths, segment_ids, replay
):
    """The forward pass on one shard's arrays; tokens, lengths and segment ids of whole rows."""
    out = network.apply(
        variables,
        tokens,
        cache=cache,
        lengths=lengths,
        segment_ids=segment_ids,
        replay=replay,
        logits=logits,
        mtp=mtp,
        aux=aux,
        **options,
    )
    layout = network.execution.layout
    summed = {}
    for key, layers in out.aux.items():
        axes = tuple(a for name in auxiliary.TABLE[key].summed for a in layout.axes(name))
        total = functools.partial(collectives.total, axes=axes)
        summed[key] = jax.tree.map(total, layers) if axes else layers
    return out.replace(aux=summed)


def method(model, name: str, variables, arrays: tuple, out_specs: Any) -> Any:
    """A method of `Network` on the model's mesh, or on one device.

    Args:
      arrays: its arguments; the rows of each are the batch's.
      out_specs: a PartitionSpec for each of its results.

    Raises:
      InputError: a strategy that cuts rows into parts.
    """
    layout = model.sharding
    body = functools.partial(model.network().apply, method=name)
    if layout.mesh is None:
        return body({name: variables[name] for name in ("params", "buffers")}, *arrays)
    if layout.axes("sequence"):
        raise InputError(
            f"a draft came with strategy {layout.strategy.name!r}, which cuts rows into parts; "
            "expected one whose shards hold whole rows, such as 'decode'"
        )
    layout.check_divides({"batch": len(arrays[0])})
    specs, row = variable_specs(model), layout.spec("batch")
    run = jax.shard_map(
        body,
        mesh=layout.mesh,
        in_specs=(specs, *(row,) * len(arrays)),
        out_specs=out_specs,
        check_vma=False,
    )
    return run({name: variables[name] for name in specs}, *arrays)


def _padded(padding, tokens, lengths, segment_ids, replay):
    """The arguments with rows that the shards divide; the padding is a document of its own.

    And it is no real token, packed or not: routers' loads and the indexer's loss leave it out.
    """
    if not padding:
        return tokens, lengths, segment_ids, replay
    columns = ((0, 0), (0, padding))
    if segment_ids is not None:
        other = jnp.asarray(segment_ids)[:, -1:] + 1
        segment_ids = jnp.concatenate([segment_ids, jnp.repeat(other, padding, axis=1)], axis=1)
    if lengths is None:
        lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    if replay is not None:
        replay = jax.tree.map(lambda x: jnp.pad(x, (*columns, (0, 0)), mode="edge"), replay)
    return jnp.pad(tokens, columns), lengths, segment_ids, replay


def _output_specs(model, logits, mtp, aux, cache, replay):
    layout, config = model.sharding, model.config
    rows = layout.spec("batch", "sequence")
    predictions = len(config.mtp_layers) if mtp else 0
    vocab = layout.spec("batch", "sequence" if logits == "all" else None, "vocab")
    normed = logits == "normed"
    further = layout.spec("batch", "sequence", "vocab")
    keys = auxiliary.keys(config, aux, bool(replay) and "chosen" in replay)
    return Output(
        logits=vocab if logits in ("all", "last") else None,
        cache=None if cache is None else cache_specs(layout, cache),
        mtp_logits=() if normed else (further,) * predictions,
        aux={key: auxiliary.spec(layout, key, cache is not None) for key in keys},
        streams=rows if logits == "none" or "last_streams" in aux else None,
        normed=rows if normed else None,
        mtp_normed=(rows,) * predictions if normed else (),
    )


def _cut(out, length, padding, layout):
    """The output without the rows of the padding."""

    def rows(x):
        return x[:, :length]

    predictions = out.mtp_logits, out.mtp_normed
    if layout.axes("sequence"):  # each prediction further has a row less
        predictions = tuple(
            tuple(x[:, : length - k - 1] for k, x in enumerate(group)) for group in predictions
        )
    out = out.replace(mtp_logits=predictions[0], mtp_normed=predictions[1])
    if not padding:
        return out
    return out.replace(
        logits=None if out.logits is None else out.logits[:, : max(length, 1)],
        streams=None if out.streams is None else rows(out.streams),
        normed=None if out.normed is None else rows(out.normed),
        aux={
            name: jax.tree.map(rows, value) if auxiliary.has_rows(name) else value
            for name, value in out.aux.items()
        },
    )
