"""A cache in stored form gives the same bits as one in the activations' type, in half the bytes."""

import dataclasses
import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.flax import save_file

import v4jax
from tests.support import meshes
from tests.support.tiny import drawn, tiny_config
from v4jax import accounting
from v4jax.config import CSA, FULL, HCA, WINDOW
from v4jax.infer.placement import Placement
from v4jax.kernels.indexer_topk import forms
from v4jax.kernels.indexer_topk.compact_keys import CompactKeys
from v4jax.kernels.sparse_attention import entries
from v4jax.model.cache import STORES, read_entries, write_entries
from v4jax.model.transformer import Transformer
from v4jax.sharding.rules import DECODE, DECODE_LONG, PREFILL

ROWS, LENGTH, ROLLBACK = 3, 300, 6
KINDS = (CSA, HCA, FULL)  # the first two have windows
# One program of each width, whatever the lengths; the last is longer than the window.
WIDTHS, MORE_WIDTHS = (1, 40), (1, 7, 140)


@functools.cache
def setting():
    """All layer kinds, tokens, and a jitted call."""
    sizes = {"hc_mult": 1, "n_routed_experts": 4, "moe_intermediate_size": 8, "mtp_layers": ()}
    model = Transformer(tiny_config(layers=KINDS, **sizes), numerics="native")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (ROWS, LENGTH))
    return model, drawn(model), tokens.astype(np.int32), called(model)


def called(model):
    @jax.jit
    def call(variables, tokens, lengths, cache):
        out = model.apply(variables, tokens, lengths=lengths, cache=cache)
        return out.logits, out.cache

    return call


def run(calls, store):
    """Logits of real tokens after calls of (width, lengths) or of ("back", counts)."""
    model, variables, tokens, call = setting()
    cache, found = model.init_cache(ROWS, LENGTH, ROLLBACK, store), []
    for width, counts in calls:
        counts = np.asarray(counts, np.int32)
        if width == "back":
            cache = cache.rollback(counts)
            continue
        at = np.asarray(cache.lengths)[:, None] + np.arange(width)[None]
        chunk = np.take_along_axis(tokens, np.minimum(at, LENGTH - 1), axis=1)
        logits, cache = call(variables, chunk, counts, cache)
        real = np.arange(width)[None] < counts[:, None]
        found.append(np.where(real[..., None], logits, 0))
    return found, cache


def check_equal(calls):
    (native, cache), (activations, _) = (run(calls, store) for store in STORES)
    for ours, wanted in zip(native, activations, strict=True):
        np.testing.assert_array_equal(ours, wanted)
    return cache


def test_same_bits_in_prefill_chunks_decode_and_rollback():
    calls = [(40, [40, 33, 1]), (40, [40, 31, 0]), (40, [40, 30, 7]), (40, [9, 36, 40])]
    calls += [(1, [1, 1, 1]), (1, [1, 1, 0]), ("back", [2, 1, 1]), (40, [5, 40, 2])]
    calls += [(1, [1, 1, 1]), ("back", [0, 2, 3]), (1, [1, 1, 1]), (1, [1, 0, 1])]
    check_equal(calls)


def test_a_saved_cache_goes_on_bit_for_bit(tmp_path):
    model, variables, tokens, call = setting()
    _, cache = run([(40, [40, 33, 1])], "native")
    path, like = tmp_path / "cache", functools.partial(model.init_cache, ROWS, LENGTH, ROLLBACK)
    v4jax.save_cache(path, cache, model, variables)
    loaded = v4jax.load_cache(path, jax.eval_shape(like), model, variables)
    assert jax.tree.structure(loaded) == jax.tree.structure(cache)
    assert meshes.equal(loaded, cache)
    counts = np.ones(ROWS, np.int32)
    ours, wanted = (call(variables, tokens[:, :1], counts, x)[0] for x in (loaded, cache))
    np.testing.assert_array_equal(ours, wanted)
    with pytest.raises(v4jax.InputError, match="in the store 'native' and this cache in 'activ"):
        v4jax.load_cache(path, like("activations"), model, variables)
    v4jax.save_cache(path, like("activations"), model, variables)
    with pytest.raises(v4jax.InputError, match="make the cache with init_cache.*'activations'"):
        v4jax.load_cache(path, like("native"), model, variables)


def test_files_from_before_stores_hold_activations(tmp_path):
    model, variables, *_ = setting()
    cache, path = model.init_cache(1, 20, store="activations"), tmp_path / "cache"
    v4jax.save_cache(path, cache, model, variables)
    with safe_open(path, "flax") as file:
        about = {name: x for name, x in file.metadata().items() if name != "store"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=about)
    assert meshes.equal(v4jax.load_cache(path, cache, model, variables), cache)
    with pytest.raises(v4jax.InputError, match="in the store 'activations'"):
        v4jax.load_cache(path, model.init_cache(1, 20), model, variables)


def buffers(cache):
    """Every buffer that grows with the tokens, by tokens per row of it."""
    for blocks in cache.layers.values():
        for layer in blocks:
            if layer.tokens is not None:
                yield 1, layer.tokens
            for ratio in (4, 128):
                if layer.main is not None and (layer.index is None) == (ratio == 128):
                    yield ratio, layer.main.entries
                    if layer.index is not None:
                        yield ratio, layer.index.entries


@pytest.mark.parametrize("store", STORES)
def test_pages_of_128_tokens_can_be_read_and_written(store):
    """Wherever they begin, and of an HCA layer that is one entry."""
    model = setting()[0]
    rng = np.random.default_rng(0)

    def filled(x):
        return jnp.asarray(rng.integers(1, 100, x.shape), x.dtype)

    cache = jax.tree.map(filled, model.init_cache(ROWS, 1000, store=store))
    empty = model.init_cache(2, 1500, store=store)
    counts = []
    for (ratio, source), (_, target) in zip(buffers(cache), buffers(empty), strict=True):
        count = 128 // ratio
        counts.append(count)
        for page in (0, 3, 6):
            taken = read_entries(source, page * count, count, row=2)
            # In the stored form, too, these are the entries that they stand for.
            assert taken.shape == (1, 1, count, *source.shape[3:])
            whole, part = (expanded_row(x, 2) for x in (source, taken))
            np.testing.assert_array_equal(part, whole[page * count : (page + 1) * count])
            target = write_entries(target, 1, (page + 2) * count, taken)
            again = read_entries(target, (page + 2) * count, count, row=1)
            assert meshes.equal(again, taken)
        # Nothing else was written, and the last page is the source's own numbers.
        written = sum(np.count_nonzero(x) for x in jax.tree.leaves(target))
        pages = [read_entries(source, page * count, count, row=2) for page in (0, 3, 6)]
        assert written == sum(np.count_nonzero(x) for x in jax.tree.leaves(pages))
        assert sum(x.nbytes for x in jax.tree.leaves(taken)) == count * bytes_of(source)
    assert counts == [32, 32, 1, 128]
    for leaf in jax.tree.leaves(cache.layers):
        assert leaf.shape[:2] == (1, ROWS)


@functools.partial(jax.jit, static_argnames="row")
def expanded_row(buffer, row):
    """One row of a buffer's entries as numbers."""
    layer = jax.tree.map(lambda x: x[0, min(row, x.shape[1] - 1)][None], buffer)
    keys = isinstance(layer, CompactKeys)
    return (forms.expanded(layer) if keys else entries.expanded(layer))[0]


def bytes_of(buffer):
    """Of one row of a buffer."""
    total = sum(x.nbytes for x in jax.tree.leaves(buffer))
    return total // (buffer.shape[0] * buffer.shape[1] * buffer.shape[2])


@pytest.mark.parametrize("name, wanted", [("flash", 3514.25), ("pro", 5031.4375)])
def test_bytes_per_token_of_the_released_models(name, wanted):
    """Of the arrays themselves, at two lengths; windows and raw rows do not grow."""
    config = v4jax.get_config(name)
    assert accounting.kv_bytes_per_token(config) == wanted
    model = Transformer(config, numerics="native")

    def nbytes(length, store=None):
        cache = jax.eval_shape(functools.partial(model.init_cache, 1, length, store=store))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))

    lengths = (1 << 17, 1 << 20)
    grown = nbytes(lengths[1]) - nbytes(lengths[0])
    assert grown / (lengths[1] - lengths[0]) == pytest.approx(wanted, rel=0.01)
    window = jax.eval_shape(functools.partial(model.init_cache, 1, 128)).layers
    rows = next(iter(window.values()))[0].window
    assert sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(rows)) == rows.shape[0] * 127 * 584
    print(grown / (lengths[1] - lengths[0]))


def test_stores_that_cannot_be():
    model = setting()[0]
    with pytest.raises(v4jax.InputError, match="cache store is 'fp8'; expected one of"):
        model.init_cache(1, 8, store="fp8")
    plain = model.clone(numerics=None)
    with pytest.raises(v4jax.InputError, match="is 'native' and the model's numerics are not"):
        plain.init_cache(1, 8, store="native")
    assert (model.init_cache(1, 8).store, plain.init_cache(1, 8).store) == STORES
    variables, tokens = model.abstract_variables(), np.zeros((1, 1), np.int32)
    with pytest.raises(v4jax.InputError, match="is 'native' and the model's numerics are not"):
        plain.apply(variables, tokens, cache=model.init_cache(1, 8))


@st.composite
def drawn_calls(draw, widths=WIDTHS):
    """Any order of prefill, chunks, decode steps and rollbacks within the room."""
    calls, used, spare = [], np.zeros(ROWS, int), np.zeros(ROWS, int)
    for _ in range(draw(st.integers(2, 6))):
        if spare.any() and draw(st.booleans()):
            counts = np.array([draw(st.integers(0, int(n))) for n in spare])
            calls.append(("back", counts))
            used, spare = used - counts, spare - counts
        width = draw(st.sampled_from(widths))
        most = np.minimum(width, LENGTH - used)
        counts = np.array([draw(st.integers(0, int(n))) for n in most])
        calls.append((width, counts))
        used, spare = used + counts, np.minimum(spare + counts, ROLLBACK)
    return calls


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(drawn_calls())
def test_same_bits_at_any_lengths(calls):
    check_equal(calls)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, database=None)
@given(drawn_calls(MORE_WIDTHS))
def test_same_bits_at_any_lengths_many_times(calls):
    check_equal(calls)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"layers": (WINDOW, *(CSA, HCA) * 4)},
        {"layers": (CSA, FULL), "index_topk": None, "head_dim": 40, "index_head_dim": 64},
        {"layers": (CSA, HCA), "head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128},
        {"layers": (CSA,), "head_dim": 256, "index_topk": 2},
    ],
)
def test_same_bits_at_other_widths(changes):
    """Scanned layers, every entry visible, the released widths, and fetched rows in lanes."""
    model = Transformer(tiny_config(**changes), numerics="native")
    variables, call = drawn(model), called(model)
    found = []
    for store in STORES:
        cache, logits = model.init_cache(2, 200, 2, store), []
        for start, width in ((0, 90), (90, 40), *((130 + i, 1) for i in range(12))):
            tokens = (np.arange(2 * width, dtype=np.int32).reshape(2, -1) * 7 + start) % 331
            out, cache = call(variables, tokens, np.array([width, width // 2]), cache)
            logits.append(np.asarray(out))
        found.append(logits)
    assert meshes.equal(*found)


def test_same_bits_where_each_device_has_a_part_of_the_entries():
    """A chunk and decode steps of a CSA layer by one program."""
    layout = meshes.on_mesh("sequence=2", DECODE_LONG, few=True)[0].sharding
    model = Transformer(
        dataclasses.replace(meshes.config(), layers=(CSA,), mtp_layers=(), hc_mult=1),
        numerics="native",
        sharding=layout,
    )
    variables, call, found = drawn(model), called(model), []
    for store in STORES:
        cache, logits = model.init_cache(2, 160, store=store), []
        for start, counts in ((0, [7, 5]), (7, [7, 7]), (14, [7, 0]), (21, [1, 1]), (22, [6, 1])):
            tokens = meshes.tokens()[:2, start : start + 7]
            out, cache = call(variables, tokens, np.array(counts, np.int32), cache)
            logits.append(np.asarray(out))
        found.append(logits)
    assert meshes.equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, strategy",
    [
        ("sequence=4", DECODE_LONG),
        ("expert=2,sequence=4", DECODE_LONG),
        ("expert=4,fsdp=2", DECODE),
    ],
)
def test_same_bits_on_a_mesh(sizes, strategy):
    """Prompts read with tokens spread, then decoded, as `generate` does."""
    model, variables = meshes.on_mesh(sizes, PREFILL, few=True)
    prefill = model.clone(numerics="native", dtype="bfloat16")
    placed = Placement(prefill, prefill.clone(sharding=meshes.on_mesh(sizes, strategy)[0].sharding))
    found = []
    for store in STORES:
        read, step = called(placed.prefill), called(placed.decode)
        cache, logits = placed.prefill.init_cache(meshes.ROWS, 160, store=store), []
        lengths = np.arange(meshes.ROWS, dtype=np.int32) + 40
        out, cache = read(variables, meshes.tokens(), lengths, cache)
        logits.append(np.where(np.arange(75)[None, :, None] < lengths[:, None, None], out, 0))
        cache = placed.handed_over(cache)
        for at in range(5):
            out, cache = step(
                variables, meshes.tokens()[:, at : at + 1], np.ones(meshes.ROWS, np.int32), cache
            )
            logits.append(np.asarray(out))
        found.append(logits)
    assert meshes.equal(*found)
