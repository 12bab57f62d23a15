"""The indexer's loss against attention written out in full, and what it leaves alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.selection import first
from tests.support.tiny import VARIANTS, drawn, tiny_config
from v4jax.model import indexer_loss
from v4jax.model.indexer_loss import SUMS, divergences
from v4jax.model.transformer import Transformer

LENGTH = 70
WANTED = ("indexer_loss", "attention", "index_scores", "chosen")


@pytest.fixture(scope="module")
def setting():
    config = tiny_config(**VARIANTS["scanned"], mtp_layers=(), hc_mult=1)
    model = Transformer(config, min_repeats=2)
    variables = drawn(model)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, LENGTH))
    return model, variables, jnp.asarray(tokens, jnp.int32)


def run(model, variables, tokens, **options):
    """The auxiliary outputs of one compiled call."""
    return jax.jit(functools.partial(model.apply, logits="none", **options))(variables, tokens).aux


def paid_in_full(model, variables, aux, layer):
    """Attention of the joint softmax on every entry of a dense CSA layer, summed over heads."""
    q, kv, entries = (np.asarray(aux[name][layer], np.float64) for name in ("q", "kv", "entries"))
    segment = next(s for s in model.segments() if s.start <= layer < s.start + s.period * s.repeats)
    place, repeat = (layer - segment.start) % segment.period, (layer - segment.start) // 2
    sink = variables["params"][segment.name][f"block_{place}"]["attn"]["attn_sink"]
    sink = np.asarray(sink if segment.repeats == 1 else sink[repeat], np.float64)
    scale, window = q.shape[-1] ** -0.5, model.config.sliding_window
    t = np.arange(LENGTH)
    near = (t[:, None] >= t[None]) & (t[:, None] - t[None] < window)
    seen = np.arange(entries.shape[1])[None] < (t[:, None] + 1) // 4
    rows = np.where(near[None, :, None], np.einsum("btnh,bsh->btns", q, kv) * scale, -np.inf)
    cells = np.where(seen[None, :, None], np.einsum("btnh,bch->btnc", q, entries) * scale, -np.inf)
    weight = np.exp(cells)
    total = weight.sum(-1) + np.exp(rows).sum(-1) + np.exp(sink)[None, None]
    return (weight / total[..., None]).sum(2), np.broadcast_to(seen, (2, *seen.shape))


def kl_by_hand(mass, scores, there, topk=None):
    kl = uniform = captured = queries = 0.0
    for m, s, ok in zip(*(x.reshape(-1, x.shape[-1]) for x in (mass, scores, there)), strict=True):
        if not ok.any():
            continue
        p, s = m[ok] / m[ok].sum(), s[ok]
        student = s - np.log(np.exp(s).sum())
        kl += (p * (np.log(p) - student)).sum()
        uniform += (p * (np.log(p) + np.log(ok.sum()))).sum()
        best = np.argsort(-s, kind="stable")[:topk]
        captured += p[best].sum() if topk else 0.0
        queries += 1
    return np.array([kl, uniform, captured, queries])


def test_dense_stage_is_the_kl_over_every_visible_entry(setting, monkeypatch):
    model, variables, tokens = setting
    monkeypatch.setattr(
        indexer_loss, "BLOCK", 2 * 4 * 17 * 9
    )  # blocks of 9 queries, the last short
    aux = run(model, variables, tokens, dense=True, aux=WANTED[:3])
    assert set(aux["indexer_loss"]) == {1, 3}
    for layer, found in aux["indexer_loss"].items():
        mass, seen = paid_in_full(model, variables, aux, layer)
        scores = np.asarray(aux["index_scores"][layer], np.float64)
        wanted = kl_by_hand(mass, scores, seen, model.config.index_topk)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_sparse_stage_is_the_kl_over_the_chosen_entries(setting):
    model, variables, tokens = setting
    aux = run(model, variables, tokens, aux=WANTED)
    layer = 1  # the first CSA layer reads what the dense model's reads
    mass, seen = paid_in_full(model, variables, aux, layer)
    there = np.zeros_like(seen)
    chosen = np.asarray(aux["chosen"][layer])
    for b, t, k in np.ndindex(chosen.shape):
        entry = chosen[b, t, k]
        if entry >= 0:
            there[b, t, entry] = True
    assert there.sum() < seen.sum()
    # The joint softmax runs over the chosen entries alone: a common factor a head.
    found = np.asarray(aux["indexer_loss"][layer])
    alone = sparse_mass(model, variables, aux, layer, there)
    wanted = kl_by_hand(alone, np.asarray(aux["index_scores"][layer], np.float64), there)
    np.testing.assert_allclose(found[[0, 1, 3]], wanted[[0, 1, 3]], rtol=1e-5)


def sparse_mass(model, variables, aux, layer, there):
    q, kv, entries = (np.asarray(aux[name][layer], np.float64) for name in ("q", "kv", "entries"))
    sink = variables["params"]["layers_1"]["block_0"]["attn"]["attn_sink"][0]
    scale, t = q.shape[-1] ** -0.5, np.arange(LENGTH)
    near = (t[:, None] >= t[None]) & (t[:, None] - t[None] < model.config.sliding_window)
    rows = np.where(near[None, :, None], np.einsum("btnh,bsh->btns", q, kv) * scale, -np.inf)
    cells = np.einsum("btnh,bch->btnc", q, entries) * scale
    weight = np.where(there[:, :, None], np.exp(cells), 0.0)
    total = weight.sum(-1) + np.exp(rows).sum(-1) + np.exp(np.asarray(sink))[None, None]
    return (weight / total[..., None]).sum(2)


@pytest.mark.parametrize("dense", first([False], [True, False]))
def test_gradient_reaches_the_indexer_and_nothing_else(setting, dense):
    model, variables, tokens = setting

    @jax.jit
    @jax.grad
    def gradient(params):
        out = model.apply(
            variables | {"params": params},
            tokens,
            aux=("indexer_loss",),
            dense=dense,
            logits="none",
        )
        return sum(found[SUMS.index("kl")] for found in out.aux["indexer_loss"].values())

    for path, g in jax.tree_util.tree_leaves_with_path(gradient(variables["params"])):
        inside = any(step.key == "indexer" for step in path)
        assert bool(jnp.any(g != 0)) == inside, jax.tree_util.keystr(path)
        assert bool(jnp.all(jnp.isfinite(g)))


def test_gradient_of_the_dense_loss_by_differences(setting):
    """Against the loss of a written-out student, differentiated by jax."""
    key = jax.random.split(jax.random.key(0), 3)
    mass = jax.random.uniform(key[0], (1, 5, 7))
    scores = jax.random.normal(key[1], (1, 5, 7))
    there = jnp.arange(7)[None, None] < jnp.arange(5)[None, :, None]  # the first query sees nothing
    kl = jax.jit(lambda s: divergences(mass, s, there)[0])
    assert divergences(mass, scores, there)[2] == 4
    gradient, step = jax.grad(kl)(scores), 1e-2
    for i in np.ndindex(scores.shape):
        up, down = (kl(scores.at[i].add(sign * step)) for sign in (1, -1))
        assert abs(gradient[i] - (up - down) / (2 * step)) < 1e-3  # central difference in float32


def test_a_learned_student_is_perfect_and_an_even_one_uniform():
    mass = jnp.array([[[0.1, 0.2, 0.4]]])
    there = jnp.ones((1, 1, 3), bool)
    kl, uniform, _ = divergences(mass, jnp.log(mass), there)
    assert abs(kl) < 1e-6 < uniform
    kl, uniform, _ = divergences(mass, jnp.zeros((1, 1, 3)), there)
    np.testing.assert_allclose(kl, uniform, rtol=1e-6)


def test_a_row_too_short_for_any_entry_gives_zeros(setting):
    model, variables, _ = setting
    tokens = jnp.array([[1, 2, 3]], jnp.int32)
    aux = run(model, variables, tokens, dense=True, aux=("indexer_loss",))
    assert all(bool(jnp.all(found == 0)) for found in aux["indexer_loss"].values())
