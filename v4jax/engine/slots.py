"""Rows of a decode cache: one put in, and what a stored prefix keeps of one.

A slot is a row of the engine's cache. Every array of a cache has its rows on one axis, so that a
row goes from one cache to another of the same lengths whatever the layers keep.

What a stored prefix keeps of a row comes in two kinds (inference.md, 2.6): pages, the entries of so
many consecutive tokens; and after so many whole pages the small rest, without which the next token
would see another past.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from v4jax.config import ModelConfig, segments
from v4jax.model.cache import Cache, CompressorState, read_entries, row_axes, write_entries

_LAYERS, _COUNTS = 1, 0  # the axis of the rows: of layers' buffers, of lengths and spare


def put(cache: Cache, slot, row: Cache) -> Cache:
    """The cache with `row`, a cache of one row, in the place of a slot."""

    def into(axis):
        def write(buffer, new):
            # On a mesh where entries lie in parts a row has room for whole tiles of each part.
            common = [min(sizes) for sizes in zip(buffer.shape, new.shape, strict=True)]
            new = jax.lax.slice(new, [0] * new.ndim, common)
            return jax.lax.dynamic_update_slice_in_dim(buffer, new, slot, axis)

        return write

    return cache.replace(
        lengths=into(_COUNTS)(cache.lengths, row.lengths),
        spare=into(_COUNTS)(cache.spare, row.spare),
        layers=jax.tree.map(into(_LAYERS), cache.layers, row.layers),
    )


def put_row(arrays: Any, slot, row: Any) -> Any:
    """Arrays with the rows on their first axis, a slot's replaced by that of `row`, [1,...]."""

    def write(buffer, new):
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, slot, 0)

    return jax.tree.map(write, arrays, row)


def page_tokens(config: ModelConfig) -> int:
    """Tokens of a page: whole blocks of every layer, 128 where the ratios divide it."""
    return math.lcm(128, *(spec.ratio for spec in config.layers if spec.compresses))


def read_page(config: ModelConfig, min_repeats: int, cache: Cache, slot, number) -> Any:
    """The entries of a page of one row, by segment and layer."""

    def read(buffer, ratio):
        count = page_tokens(config) // ratio
        return read_entries(buffer, number * count, count, slot)

    return _by_layer(config, min_repeats, cache, lambda layer, spec: _entries(layer, spec, read))


def write_page(config: ModelConfig, min_repeats: int, cache: Cache, number, page: Any) -> Cache:
    """A cache of one row with a page in its place."""

    def write(layer, spec, new):
        written = {}
        for name, entries in new.items():
            ratio = 1 if name == "tokens" else spec.ratio
            first, old = number * (page_tokens(config) // ratio), getattr(layer, name)
            if isinstance(old, CompressorState):
                into = write_entries(old.entries, 0, first, entries)
                written[name] = old.replace(entries=into)
            else:
                written[name] = write_entries(old, 0, first, entries)
        return layer.replace(**written)

    return cache.replace(layers=_by_layer(config, min_repeats, cache, write, page))


def read_rest(config: ModelConfig, min_repeats: int, cache: Cache, slot) -> Any:
    """What a row at the end of a page keeps beside its pages: window rows and open blocks.

    Of a compressor whose blocks overlap the last block's rows matter, and of these the channels
    with which it enters the next one.
    """

    def read(layer, spec):
        found = {}
        if layer.window is not None:
            found["window"] = _last(layer.window, slot, config.sliding_window - 1)
        for name in ("main", "index"):
            state = getattr(layer, name)
            if state is not None and spec.overlap:
                raw = _last(state.raw, slot, spec.ratio)
                found[name] = raw.reshape(*raw.shape[:-1], 2, 2, -1)[..., 0, :]
        return found

    return _by_layer(config, min_repeats, cache, read)


def write_rest(config: ModelConfig, min_repeats: int, cache: Cache, rest: Any, length) -> Cache:
    """A fresh cache of one row that goes on behind `length` tokens, whose pages it has."""

    def write(layer, spec, kept):
        written = {}
        for name, rows in kept.items():
            old = getattr(layer, name)
            if name == "window":
                written[name] = _put_last(old, rows)
            else:
                doubled = jnp.stack([rows, jnp.zeros_like(rows)], axis=-2)
                raw = doubled.reshape(*rows.shape[:-2], -1)
                written[name] = old.replace(raw=_put_last(old.raw, raw))
        return layer.replace(**written)

    layers = _by_layer(config, min_repeats, cache, write, rest)
    lengths = jnp.full_like(cache.lengths, length)
    return cache.replace(layers=layers, lengths=lengths, spare=jnp.zeros_like(cache.spare))


def _by_layer(config, min_repeats, cache, of, *others):
    """A tuple for each segment, of what `of` makes of each layer of its unit.

    others: trees of the same form, whose parts `of` gets too.
    """
    found = {}
    for segment in segments(config.layers, min_repeats):
        specs = config.layers[segment.start : segment.start + segment.period]
        parts = (tree[segment.name] for tree in others)
        blocks = zip(cache.layers[segment.name], specs, *parts, strict=True)
        found[segment.name] = tuple(of(*block) for block in blocks)
    return found


def _entries(layer, spec, read):
    found = {}
    if layer.tokens is not None:
        found["tokens"] = read(layer.tokens, 1)
    for name in ("main", "index"):
        state = getattr(layer, name)
        if state is not None:
            found[name] = read(state.entries, spec.ratio)
    return found


def _last(buffer, slot, count):
    """The newest `count` rows of one slot, [R,1,count,...]."""

    def one(x, axis):
        row = jax.lax.dynamic_slice_in_dim(x, slot, 1, 1)
        return jax.lax.slice_in_dim(row, x.shape[axis] - count, x.shape[axis], axis=axis)

    return jax.tree.map(one, buffer, row_axes(buffer))


def _put_last(buffer, rows):
    """A buffer of one slot with its newest rows replaced."""

    def one(x, new, axis):
        first = x.shape[axis] - new.shape[axis]
        return jax.lax.dynamic_update_slice_in_dim(x, new, first, axis)

    return jax.tree.map(one, buffer, rows, row_axes(buffer))
