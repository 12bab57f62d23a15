"""A cache in stored form gives the same bits as one in the activations' type, in half the bytes."""

import functools

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from tests.support import meshes
from tests.support.tiny import drawn, tiny_config
from v4jax.config import CSA, FULL, HCA, WINDOW
from v4jax.infer.placement import Placement
from v4jax.model.cache import STORES
from v4jax.model.transformer import Transformer
from v4jax.sharding.rules import DECODE, DECODE_LONG, PREFILL

ROWS, LENGTH, ROLLBACK = 3, 300, 6
KINDS = (WINDOW, CSA, HCA, FULL)
# One program of each width, whatever the lengths: the last is longer than the window.
WIDTHS = (1, 7, 140)


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
    calls = [(140, [140, 129, 1]), (7, [7, 0, 3]), (1, [1, 1, 1]), (1, [1, 1, 0])]
    calls += [("back", [2, 1, 1]), (7, [5, 7, 2]), (140, [100, 2, 140]), (7, [1, 2, 3])]
    calls += [("back", [0, 2, 6]), (1, [1, 1, 1])]
    check_equal(calls)


@st.composite
def drawn_calls(draw):
    """Any order of prefill, chunks, decode steps and rollbacks within the room."""
    calls, used, spare = [], np.zeros(ROWS, int), np.zeros(ROWS, int)
    for _ in range(draw(st.integers(2, 6))):
        if spare.any() and draw(st.booleans()):
            counts = np.array([draw(st.integers(0, int(n))) for n in spare])
            calls.append(("back", counts))
            used, spare = used - counts, spare - counts
        width = draw(st.sampled_from(WIDTHS))
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
@given(drawn_calls())
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


@pytest.mark.parametrize(
    "sizes, strategy",
    [
        ("sequence=4", DECODE_LONG),
        pytest.param("expert=2,sequence=4", DECODE_LONG, marks=pytest.mark.slow),
        pytest.param("expert=4,fsdp=2", DECODE, marks=pytest.mark.slow),
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
