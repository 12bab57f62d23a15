"""prefill = decode = chunks = padded = packed: where implementations of this model broke.

One row of 300 tokens is the yardstick: its logits and chosen entries in one uncached call. Every
other way to compute the same positions must give the same, to 1e-5 and entry for entry.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v4jax
from tests.support.compiling import OPTIMIZED
from tests.support.selection import first
from tests.support.tiny import VARIANTS, drawn, tiny_config, tiny_model
from v4jax.config import CSA, HCA
from v4jax.model.transformer import Transformer

LENGTH = 300
TOLERANCE = 1e-5
ROLLBACK = 9  # of every cache here, so that they share compiled programs
AUX = ("chosen",)


@functools.cache
def setting(variant):
    """Model, variables, a row of tokens, and its logits and choices in one call."""
    model, variables = tiny_model(variant)
    tokens = np.asarray(
        jax.random.randint(jax.random.key(5), (1, LENGTH), 0, model.config.vocab_size)
    )
    out = jax.jit(lambda v, t: model.apply(v, t, aux=AUX))(variables, tokens)
    std = float(np.std(out.logits))
    logits = np.asarray(out.logits[0]) / std
    chosen = {i: np.asarray(c[0]) for i, c in out.aux.get("chosen", {}).items()}
    return model, variables, tokens[0], logits, chosen, std


@functools.cache
def stepper(variant, logits="all"):
    """One jitted function for prefill, chunks and decode; the cache is donated."""
    model = setting(variant)[0]

    def step(variables, tokens, lengths, cache):
        out = model.apply(variables, tokens, lengths=lengths, cache=cache, logits=logits, aux=AUX)
        return out.logits, out.aux.get("chosen", {}), out.cache

    compiled = jax.jit(step, donate_argnums=3)

    def run(*args):
        logits, chosen, cache = compiled(*args)
        return np.asarray(logits), {i: np.asarray(c) for i, c in chosen.items()}, cache

    return run


def check_logits(variant, got, positions):
    *_, logits, _, std = setting(variant)
    np.testing.assert_allclose(
        np.asarray(got) / std, logits[np.asarray(positions)], atol=TOLERANCE, rtol=0
    )


def same_choice(got, expected):
    """Choices as sets: rows may be padded with -1 to different widths."""
    width = max(got.shape[-1], expected.shape[-1])

    def pad(x):
        return np.pad(x, [(0, 0), (0, width - x.shape[-1])], constant_values=-1)

    np.testing.assert_array_equal(pad(got), pad(expected))


ENDS = ("released", "ablated", "all_visible")  # a scanned segment does not cut its last layer short


@pytest.mark.parametrize("variant", first(["released"], ENDS))
def test_last_logits_alone_and_what_the_cache_then_holds(variant):
    """Prefill that computes the last layer's last token alone, then a chunk and a decode step."""
    model, variables, tokens, _, _, _ = setting(variant)
    lengths = np.array([1, 5, 23, 24, 25, 31, 32, 127, 128, 129, 160])
    padded = np.stack([np.where(np.arange(160) < n, tokens[:160], 7) for n in lengths])
    step = jax.jit(functools.partial(model.apply, logits="last"))
    out = step(variables, padded, lengths=lengths, cache=model.init_cache(len(lengths), LENGTH))
    check_logits(variant, out.logits[:, 0], lengths - 1)
    more = np.arange(1, len(lengths) + 1)
    chunk = np.stack([np.resize(tokens[n : n + 12], 160) for n in lengths])
    out = step(variables, chunk, lengths=more, cache=out.cache)
    check_logits(variant, out.logits[:, 0], lengths + more - 1)
    following = tokens[lengths + more][:, None]
    out = step(variables, following, cache=out.cache)
    check_logits(variant, out.logits[:, 0], lengths + more)


ROWS = 37


@pytest.mark.parametrize("variant", first(["released"], VARIANTS))
def test_lengths_padded_then_decoded(variant):
    """The first lengths, those around an HCA block's end and the last ones."""
    check_lengths(variant, (1, 112, 260))


@pytest.mark.slow
def test_every_length_padded_then_decoded():
    check_lengths("released", range(1, 297, ROWS))


def check_lengths(variant, starts):
    """Prompts of ROWS lengths from each start as rows of a padded batch, then four decode steps."""
    model, variables, tokens, _, chosen, _ = setting(variant)
    run, rows = stepper(variant), ROWS
    for start in starts:
        lengths = np.arange(start, start + rows, dtype=np.int32)
        prompts = np.where(np.arange(LENGTH)[None] < lengths[:, None], tokens[None], 7)
        cache = model.init_cache(rows, LENGTH, ROLLBACK)
        logits, picked, cache = run(variables, prompts, lengths, cache)
        for row, n in enumerate(lengths):
            check_logits(variant, logits[row, :n], range(n))
            for layer, choice in picked.items():
                same_choice(choice[row, :n], chosen[layer][:n])
        for step in range(4):
            at = lengths + step
            logits, picked, cache = run(
                variables, tokens[at][:, None], np.ones(rows, np.int32), cache
            )
            check_logits(variant, logits[:, 0], at)
            for layer, choice in picked.items():
                same_choice(choice[:, 0], chosen[layer][at])


CHUNKS = {8: (1, 3, 8, 5, 2, 7), 130: (127, 1, 130, 23, 24)}  # shorter and longer than windows
# Chunks of 8 take the program of the rollbacks; a window of the ablated model is shorter than they.
CHUNKED = [(8, "released"), (8, "all_visible"), (8, "ablated"), (130, "scanned")]


@pytest.mark.parametrize("width, variant", first(CHUNKED, itertools.product(CHUNKS, VARIANTS)))
def test_any_chunking(width, variant):
    """Prefill in chunks of odd sizes, which move over the window's and the blocks' edges."""
    model, variables, tokens, _, chosen, _ = setting(variant)
    sizes = CHUNKS[width]
    cache, at, turn = model.init_cache(1, LENGTH, ROLLBACK), 0, 0
    while at < LENGTH:
        size = min(sizes[turn % len(sizes)], LENGTH - at)
        chunk = np.full((1, width), 7, np.int32)
        chunk[0, :size] = tokens[at : at + size]
        logits, picked, cache = stepper(variant)(
            variables, chunk, np.full(1, size, np.int32), cache
        )
        check_logits(variant, logits[0, :size], range(at, at + size))
        for layer, choice in picked.items():
            same_choice(choice[0, :size], chosen[layer][at : at + size])
        at, turn = at + size, turn + 1


@pytest.mark.parametrize("variant", first(["released", "ablated", "all_visible"], VARIANTS))
def test_documents_of_a_packed_row(variant):
    """Each document of a packed row equals the document alone, whatever stands before it."""
    model, variables, tokens, _, _, std = setting(variant)
    sizes = [1, 3, 4, 5, 23, 24, 25, 2, 127, 31]
    segment_ids = np.repeat(np.arange(1, len(sizes) + 1), sizes)[None].astype(np.int32)
    row = np.concatenate([tokens[:n] for n in sizes])[None]
    packed = jax.jit(lambda v, t, s: model.apply(v, t, segment_ids=s).logits)
    logits = packed(variables, row, segment_ids)[0]
    at = 0
    for n in sizes:
        check_logits(variant, logits[at : at + n], range(n))
        at += n


@pytest.mark.parametrize("variant", first(["released", "ablated", "all_visible"], VARIANTS))
@pytest.mark.parametrize("back", [1, 5, 9])
def test_rollback_and_go_on(variant, back):
    """Tokens taken back leave no trace: the row goes on as if they had never come."""
    model, variables, tokens, *_ = setting(variant)
    cache = model.init_cache(1, LENGTH, ROLLBACK)

    def feed(ids):
        nonlocal cache
        chunk = np.full((1, 8), 7, np.int32)
        chunk[0, : len(ids)] = ids
        count = np.full(1, len(ids), np.int32)
        logits, _, cache = stepper(variant)(variables, chunk, count, cache)
        return logits[0, : len(ids)]

    for at in range(0, 120, 8):
        feed(tokens[at : at + 8])
    feed(tokens[120:126])
    feed(np.full(min(back, 8), 11))
    cache = cache.rollback(back)
    at = 126 + min(back, 8) - back
    for start in range(at, at + 24, 8):
        check_logits(variant, feed(tokens[start : start + 8]), range(start, start + 8))


def test_rollback_beyond_what_is_kept_is_refused():
    model, variables, tokens, *_ = setting("released")
    cache = model.init_cache(1, LENGTH, ROLLBACK)
    with pytest.raises(v4jax.InputError, match="can go back"):
        cache.rollback(1)


@pytest.mark.parametrize("variant", first(["released", "ablated"], VARIANTS))
def test_no_gradient_from_later_tokens(variant):
    """The loss at a position has a gradient of exactly zero in every later token's embedding."""
    model, variables, _, *_ = setting(variant)
    tokens = np.asarray(jax.random.permutation(jax.random.key(1), 331)[None, :200])

    def logit_sum(table, at):
        params = variables["params"] | {"embed": {"weight": table}}
        logits = model.apply(variables | {"params": params}, tokens).logits
        return jnp.sum(jnp.sin(logits[0, at]))

    gradient = jax.jit(jax.grad(logit_sum))
    table = variables["params"]["embed"]["weight"]
    for at in (0, 3, 4, 23, 24, 126, 127, 128, 150):
        rows = np.asarray(gradient(table, at))[tokens[0]]
        assert np.all(rows[at + 1 :] == 0)
        assert np.abs(rows[at]).max() > 0


@pytest.mark.slow  # test_last_logits_alone_... has more lengths
def test_last_logits_are_the_last():
    variant = "released"
    model, variables, tokens, *_ = setting(variant)
    lengths = np.array([5, 130], np.int32)
    prompts = np.stack([tokens[:200], tokens[:200]])
    logits, _, _ = stepper(variant, "last")(
        variables, prompts, lengths, model.init_cache(2, LENGTH, ROLLBACK)
    )
    assert logits.shape == (2, 1, model.config.vocab_size)
    check_logits(variant, logits[:, 0], lengths - 1)


def test_scan_equals_unrolled():
    """The same weights in a stacked and in an unrolled tree give the same logits."""
    model, variables, tokens, *_ = setting("scanned")
    unrolled = type(model)(model.config, min_repeats=99)
    params = {}
    buffers = {}
    for tree, flat in ((variables["params"], params), (variables["buffers"], buffers)):
        for name, value in tree.items():
            if name == "layers_1":
                for layer in range(4):
                    block = value.get(f"block_{layer % 2}")
                    flat[f"layers_{1 + layer}"] = {
                        "block_0": jax.tree.map(lambda x, r=layer // 2: x[r], block)
                    }
            else:
                flat[name] = value
    logits = jax.jit(lambda v, t: unrolled.apply(v, t).logits)(
        {"params": params, "buffers": buffers}, tokens[None]
    )
    check_logits("scanned", logits[0], range(LENGTH))


# Scanned layers with both choices, and little else to compile with all optimisations.
FEW = {"layers": (CSA, HCA) * 2, "mtp_layers": (), "hc_mult": 1}


@pytest.mark.parametrize("variant", first(["few"], ["few", "released", "scanned"]))
def test_replay_of_own_choices(variant):
    """Choices that go out as auxiliary outputs and come back in change nothing."""
    sizes = FEW if variant == "few" else VARIANTS[variant]
    model = Transformer(tiny_config(**sizes), min_repeats=2)
    variables = drawn(model)
    tokens = np.random.default_rng(5).integers(0, model.config.vocab_size, (1, LENGTH))
    names = ("chosen", "router_experts")
    apply = jax.jit(model.apply, static_argnames="aux", compiler_options=OPTIMIZED)
    out = apply(variables, tokens, aux=names)
    again = apply(variables, tokens, replay={name: out.aux[name] for name in names})
    atol = TOLERANCE * float(np.std(out.logits))
    np.testing.assert_allclose(again.logits, out.logits, atol=atol, rtol=0)
