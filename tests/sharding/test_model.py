"""The model on eight fake devices equals the model on one: training, cache, greedy text."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import meshes
from tests.support.compiling import OPTIMIZED
from tests.support.meshes import LENGTH, MESHES, ROWS
from tests.support.selection import first
from v4jax.infer.generate import generate
from v4jax.sharding.rules import DECODE, DECODE_LONG, PREFILL, TRAIN, TRAIN_LONG

LOGITS = 2e-5  # float32; of whole rows in parts of the logits' standard deviation
GRADIENTS = 2e-5  # see `meshes.assert_close`
DECODED = 32  # over two ends of HCA blocks


def quick(sizes):
    """All meshes, of which one is in the quick suite: each is minutes of compilation."""
    return first([sizes], MESHES)


def loss(model, params, buffers, tokens, documents):
    """Something of every output that training uses, and the outputs."""
    out = model.apply(
        {"params": params, "buffers": buffers},
        tokens,
        segment_ids=documents,
        mtp=True,
        aux=("chosen", "router_experts", "router_load", "indexer_loss"),
    )
    first = jax.nn.log_softmax(out.logits)[..., 0].mean()
    further = jax.nn.log_softmax(out.mtp_logits[0])[..., 1].mean()
    kl = sum(sums[0] for sums in out.aux["indexer_loss"].values())
    return first + further + 1e-3 * kl, out


@functools.cache
def trained_alone(packed):
    """What one device makes, and its gradients at weights that are a rounding away."""
    model, variables = meshes.alone()
    step = training(model, packed)
    nudged = (meshes.nudged(variables["params"], seed) for seed in range(meshes.NUDGES))
    moved = [step(variables | {"params": params})[1] for params in nudged]
    return *step(variables), moved


def training(model, packed):
    """A function from variables to (loss, outputs) and the gradients."""
    step = jax.jit(
        jax.value_and_grad(functools.partial(loss, model), has_aux=True),
        compiler_options=OPTIMIZED,
    )
    documents = meshes.documents() if packed else None
    return lambda v: step(v["params"], v["buffers"], meshes.tokens(), documents)


def check_training(sizes, strategy, packed):
    model, variables = meshes.on_mesh(sizes, strategy)
    found, grads = training(model, packed)(variables)
    wanted, wanted_grads, moved = trained_alone(packed)
    check_outputs(found, wanted)
    meshes.assert_close(grads, wanted_grads, moved, GRADIENTS)


def check_outputs(found, wanted):
    """The loss and all that training reads beside it."""
    (value, out), (wanted_value, wanted) = found, wanted
    spread = float(jnp.std(wanted.logits))
    for name in ("logits", "mtp_logits"):
        off = meshes.largest_difference(getattr(out, name), getattr(wanted, name)) / spread
        print(f"{name} off by {off:.2g} of the logits' deviation")
        assert off <= LOGITS
    assert meshes.equal(out.aux["chosen"], wanted.aux["chosen"])
    assert meshes.equal(out.aux["router_experts"], wanted.aux["router_experts"])
    for name in ("router_load", "indexer_loss"):
        for layer, found in out.aux[name].items():
            np.testing.assert_allclose(found, wanted.aux[name][layer], rtol=2e-5, atol=1e-4)
    np.testing.assert_allclose(value, wanted_value, rtol=2e-5)


FORWARD = {"plain": (TRAIN, False), "packed": (TRAIN, True), "long": (TRAIN_LONG, True)}


@pytest.mark.parametrize(
    "sizes,rows", first([("sequence=8", "packed")], itertools.product(MESHES, FORWARD))
)
def test_outputs_are_the_same(sizes, rows):
    """Forward alone, no logit beyond the bound; slices are shorter than the window."""
    strategy, packed = FORWARD[rows]
    found = forward(*meshes.on_mesh(sizes, strategy), packed)
    check_outputs(found, forward_alone(packed))


def forward(model, variables, packed):
    """(loss, outputs)."""
    run = jax.jit(functools.partial(loss, model))
    documents = meshes.documents() if packed else None
    return run(variables["params"], variables["buffers"], meshes.tokens(), documents)


@functools.cache
def forward_alone(packed):
    return forward(*meshes.alone(), packed)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
def test_packed_training_is_the_same(sizes):
    check_training(sizes, TRAIN, packed=True)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
def test_training_is_the_same(sizes):
    check_training(sizes, TRAIN, packed=False)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
def test_long_rows_train_the_same(sizes):
    check_training(sizes, TRAIN_LONG, packed=True)


@functools.cache
def lengths():
    """Of the prompts and of a second chunk, each row's own."""
    drawn = np.random.default_rng(1).integers(20, 41, (2, ROWS))
    return jnp.asarray(drawn, jnp.int32)


def served(prefill, decode, variables, hand_over=lambda cache: cache):
    """Logits of a prefill, of a second chunk and of greedy steps; the steps' tokens and entries."""
    cache = prefill.init_cache(ROWS, 160)
    read = jax.jit(
        lambda v, c, t, n: prefill.apply(v, t, cache=c, lengths=n, logits="last"), donate_argnums=1
    )

    @functools.partial(jax.jit, donate_argnums=1)
    def step(v, c, t):
        out = decode.apply(v, t, cache=c, aux=("chosen",))
        return out.cache, out.logits, jnp.argmax(out.logits[:, -1:], -1), out.aux["chosen"]

    logits = []
    for start, count in zip((0, 35), lengths(), strict=True):
        out = read(variables, cache, meshes.tokens()[:, start : start + 40], count)
        cache = out.cache
        logits.append(np.asarray(out.logits))
    cache, token, texts, entries = hand_over(cache), meshes.tokens()[:, :1], [], []
    for _ in range(DECODED):
        cache, found, token, chosen = step(variables, cache, token)
        token = jnp.asarray(np.asarray(token))
        logits.append(np.asarray(found))
        texts.append(np.asarray(token))
        entries.append(jax.tree.map(np.asarray, chosen))
    return logits, texts, entries


@functools.cache
def served_alone():
    model, variables = meshes.alone()
    return served(model, model, variables)


def check_serving(sizes, decode_strategy):
    from v4jax.infer.placement import Placement

    prefill, variables = meshes.on_mesh(sizes, PREFILL)
    decode, _ = meshes.on_mesh(sizes, decode_strategy)
    hand_over = Placement(prefill, decode).handed_over
    logits, texts, entries = served(prefill, decode, variables, hand_over)
    wanted_logits, wanted_texts, wanted_entries = served_alone()
    assert meshes.largest_difference(logits, wanted_logits) <= LOGITS
    assert meshes.equal(texts, wanted_texts)
    assert meshes.equal(entries, wanted_entries)


@pytest.mark.parametrize("sizes", quick("expert=2,sequence=4"))
def test_prefill_chunks_and_decode_of_caches_in_parts_are_the_same(sizes):
    check_serving(sizes, DECODE_LONG)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
def test_decode_of_many_rows_is_the_same(sizes):
    check_serving(sizes, DECODE)


@functools.cache
def generated_alone(rows, few=False):
    model, variables = meshes.alone(few)
    return generate(model, variables, prompts(rows), max_new_tokens=24, prefill_chunk=32).tokens


def prompts(rows):
    return [meshes.tokens()[i, : 11 + 9 * i].tolist() for i in range(rows)]


# The tests above have the steps of the whole model; how they follow one another two layers show.
@pytest.mark.parametrize("sizes", quick("expert=2,sequence=4"))
@pytest.mark.parametrize("rows, few", first([(2, True)], [(2, True), (2, False), (8, False)]))
def test_generated_tokens_are_the_same(sizes, rows, few):
    model, variables = meshes.on_mesh(sizes, PREFILL, few)
    found = generate(model, variables, prompts(rows), max_new_tokens=24, prefill_chunk=32)
    assert found.tokens == generated_alone(rows, few)


def test_variables_are_made_where_they_lie():
    model, wanted = meshes.on_mesh("data=2,fsdp=2,sequence=2", TRAIN, few=True)
    made = model.init(jax.random.key(meshes.SEED))
    assert meshes.largest_difference(made, wanted) == 0
    w1 = made["params"]["layers_0"]["block_0"]["ffn"]["experts"]["w1"]
    assert w1.sharding.shard_shape(w1.shape) == (*w1.shape[:-1], w1.shape[-1] // 4)
    assert LENGTH % 4 and LENGTH % 16  # what the tests of this file rest on
