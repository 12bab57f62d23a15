"""Rejection sampling gives the model's distribution; two near misses do not (inference.md, 3.5).

Three tokens, two drafts. The model's and the draft's next-token probabilities hang on the token
before; what is drawn is held against the model's law of two tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.support.engines import SIZES, prompt_of, tiny_engine
from tests.support.tiny import drawn, tiny_config
from v4jax.engine import acceptance, speculate
from v4jax.engine.acceptance import Proposal
from v4jax.engine.adjust import neutral
from v4jax.engine.choice import no_draws
from v4jax.engine.engine import Engine
from v4jax.engine.request import Request
from v4jax.errors import InputError
from v4jax.model.transformer import Transformer

V, DRAWS = 3, 50_000
AT_ONE = no_draws(DRAWS, V).sampling._replace(temperature=np.ones(DRAWS, np.float32))
ANCHOR = 1
MODEL_VV = np.array([[0.5, 0.3, 0.2], [0.7, 0.25, 0.05], [0.1, 0.3, 0.6]])  # by the token before
DRAFT_VV = np.array([[0.2, 0.3, 0.5], [0.4, 0.2, 0.4], [0.3, 0.6, 0.1]])
WANTED_VV = MODEL_VV[ANCHOR][:, None] * MODEL_VV  # of two tokens behind the anchor


def law(q_VV):
    """The law of two tokens by the rule's own parts, over all drafts and outcomes; float64."""
    found_VV = np.zeros((V, V))

    def parts(before, draft):
        p, q = (jnp.asarray(x[before])[None, None] for x in (MODEL_VV, q_VV))
        keeps = float(acceptance.chance(p, q, jnp.array([[draft]]))[0, 0])
        return keeps, np.asarray(acceptance.residual(p, q))[0, 0]

    def second(before):
        """The law of a token that a round begins with."""
        found_V = np.zeros(V)
        for draft in range(V):
            keeps, instead_V = parts(before, draft)
            found_V += q_VV[before, draft] * ((1 - keeps) * instead_V)
            found_V[draft] += q_VV[before, draft] * keeps
        return found_V

    for first in range(V):
        keeps, instead_V = parts(ANCHOR, first)
        chance = q_VV[ANCHOR, first]
        # A draft that is not kept ends the round, the next one draws the second token.
        for token in range(V):
            found_VV[token] += chance * (1 - keeps) * instead_V[token] * second(token)
        found_VV[first] += chance * keeps * second(first)
    return found_VV


def test_the_law_of_two_tokens_is_the_models():
    with jax.enable_x64(True):
        greedy_VV = np.eye(V)[DRAFT_VV.argmax(axis=1)]
        for q_VV in (DRAFT_VV, MODEL_VV, np.roll(np.eye(V), 1, axis=1), greedy_VV):
            np.testing.assert_allclose(law(q_VV), WANTED_VV, atol=1e-12, rtol=0)
        # A draft that is its softmax's best token, and not drawn from it.
        p, q = (jnp.asarray(x[ANCHOR])[None, None] for x in (MODEL_VV, DRAFT_VV))
        best = int(DRAFT_VV[ANCHOR].argmax())
        keeps = float(acceptance.chance(p, q, jnp.array([[best]]))[0, 0])
        found_V = (1 - keeps) * np.asarray(acceptance.residual(p, q))[0, 0]
        found_V[best] += keeps
        assert np.abs(found_V - MODEL_VV[ANCHOR]).max() > 0.03


def test_a_residual_without_mass_is_the_model():
    same = jnp.asarray(DRAFT_VV, jnp.float32)[None]
    np.testing.assert_array_equal(acceptance.residual(same, same), same)


def pairs(change=None, drawn=True):
    """Two tokens of each of 50,000 slots by the code that the engine runs, of one or two rounds.

    Args:
      change: (drafts [S,2], limit [S]) -> limit, of a rule that looks at drafts.
      drawn: whether drafts are drawn as their probabilities say; else the likeliest is taken.
    """
    draws = no_draws(DRAWS, V)._replace(
        active=np.ones(DRAWS, bool),
        seed=np.arange(DRAWS, dtype=np.uint32),
        sampling=AT_ONE,
    )
    model_VV, draft_VV = (jnp.log(jnp.asarray(x, jnp.float32)) for x in (MODEL_VV, DRAFT_VV))

    @jax.jit
    def propose(before_S, draws):
        drafts, chances = [], []
        for place in range(2):
            logits_SV = draft_VV[before_S]
            token_S, chance_SV = acceptance.draft(logits_SV, draws, place, acceptance.REJECTION)
            before_S = token_S if drawn else jnp.argmax(logits_SV, axis=1).astype(jnp.int32)
            drafts.append(before_S)
            chances.append(chance_SV)
        return Proposal(jnp.stack(drafts, 1), None, jnp.stack(chances, 1))

    @jax.jit
    def verify(before_S, proposal, limit_S, draws):
        tokens_SP = jnp.concatenate([before_S[:, None], proposal.token], axis=1)
        return acceptance.rejection(model_VV[tokens_SP], proposal, limit_S, draws)

    def round_of(before_S, draws):
        proposal, limit_S = propose(before_S, draws), np.full(DRAWS, 2, np.int32)
        if change is not None:
            limit_S = change(np.asarray(proposal.token), limit_S)
        return (np.asarray(x) for x in verify(before_S, proposal, limit_S, draws))

    token_SP, kept_S = round_of(jnp.full(DRAWS, ANCHOR, jnp.int32), draws)
    first_S = token_SP[:, 0]
    again_SP, _ = round_of(jnp.asarray(first_S), draws._replace(step=draws.step + 1))
    second_S = np.where(kept_S > 0, token_SP[:, 1], again_SP[:, 0])
    return np.bincount(first_S * V + second_S, minlength=V * V)


def p_value(counts):
    return stats.chisquare(counts, WANTED_VV.ravel() * DRAWS).pvalue


def test_what_is_drawn_has_the_models_law():
    assert p_value(pairs()) > 0.001
    # A limit that looks at nothing is as good, also one that differs between slots.
    assert p_value(pairs(lambda drafts, limit: limit - np.arange(DRAWS) % 3)) > 0.001


def test_two_wrong_rules_do_not():
    assert p_value(pairs(drawn=False)) < 1e-6
    # Drafts are left out where the second looks bad.
    assert p_value(pairs(lambda drafts, limit: np.where(drafts[:, 1] == 2, 0, limit))) < 1e-6


@pytest.mark.parametrize("grammar_cut", [True, False])
def test_a_draft_that_may_not_come_is_verified(grammar_cut):
    """Token 2 may not come first: cut off behind that draft, or (wrongly) before it."""
    q_V, p_V = DRAFT_VV[ANCHOR], MODEL_VV[ANCHOR] * [1, 1, 0]
    p_V = p_V / p_V.sum()
    p, q = (np.broadcast_to(x, (DRAWS, 2 if x is p_V else 1, V)) for x in (p_V, q_V))
    drafts_S1 = np.random.default_rng(0).choice(V, (DRAWS, 1), p=q_V)
    legal_S = (drafts_S1[:, 0] != 2).astype(np.int32)
    limit_S = np.ones(DRAWS, np.int32) if grammar_cut else legal_S
    seed_S = np.arange(DRAWS, dtype=np.uint32)
    draws = no_draws(DRAWS, V)._replace(seed=seed_S, sampling=AT_ONE)
    proposal = Proposal(jnp.asarray(drafts_S1, jnp.int32), None, jnp.asarray(q, jnp.float32))
    logits = jnp.log(jnp.asarray(p, jnp.float32))
    token_SP, _ = jax.jit(acceptance.rejection)(logits, proposal, limit_S, draws)
    counts = np.bincount(np.asarray(token_SP)[:, 0], minlength=V)
    assert counts[2] == 0
    chi = stats.chisquare(counts[:2], p_V[:2] * DRAWS).pvalue
    assert chi > 0.001 if grammar_cut else chi < 1e-6


@pytest.fixture(scope="module")
def engines():
    return tiny_engine()[0], tiny_engine(draft="mtp", draft_tokens=3, draft_rule="rejection")[0]


def test_greedy_stays_greedy(engines):
    plain, engine = engines
    for length in (5, 126):
        request = Request(prompt_of(length), max_new_tokens=20, logprobs=0)
        found, expected = engine.submit(request).result(), plain.submit(request).result()
        assert found.tokens == expected.tokens and found.drafted > 0
        found, expected = ([x.logprob for x in r.logprobs] for r in (found, expected))
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_answer_depends_on_its_own_request(engines):
    _, engine = engines
    requests = [
        Request(prompt_of(n), max_new_tokens=20, temperature=0.9, top_k=50, seed=n)
        for n in (9, 130, 64)
    ]
    alone = [engine.submit(request).result() for request in requests]
    streams = [engine.submit(request) for request in requests]
    for one, stream in zip(alone, streams, strict=True):
        result = stream.result()
        assert result.tokens == one.tokens and len(result.tokens) == 20
        assert (result.drafted, result.accepted) == (one.drafted, one.accepted)


def test_a_rule_that_there_is_not():
    with pytest.raises(InputError, match="draft_rule is 'typical'; expected one of"):
        tiny_engine(draft="mtp", draft_rule="typical")


@pytest.mark.slow
def test_what_a_model_says_has_its_own_law():
    """50,000 pairs of tokens of a model of five words, by the programs of the engine."""
    model, slots, words, anchor = Transformer(tiny_config(vocab_size=5), min_repeats=2), 1000, 5, 3
    rule = {"draft_rule": acceptance.REJECTION, "draft": "mtp", "draft_tokens": 2}
    engine = Engine(model, drawn(model), **(SIZES | rule | {"slots": slots, "max_length": 128}))
    programs = engine._programs
    variables, lane = programs._variables, programs.fresh_lane()
    _, row = programs.read([1, 2, 4, 0], programs.fresh_row())
    for slot in range(slots):
        token_11 = np.full((1, 1), anchor, np.int32)
        lane = programs.put(lane, slot, row, token_11, no_draws(1, words))
    fixed = {"drafted": 2, "rule": acceptance.REJECTION}
    propose = functools.partial(speculate.propose, width=2, rule=acceptance.REJECTION)
    verify = functools.partial(speculate.verify, kind="mtp", scored=False, width=3, **fixed)
    propose, verify = (jax.jit(f, static_argnames="model") for f in (propose, verify))
    draws = no_draws(slots, words, 3)._replace(active=np.ones(slots, bool))
    ones, limit_S = np.ones(slots, np.float32), np.full(slots, 2, np.int32)
    draws = draws._replace(
        sampling=draws.sampling._replace(temperature=ones), adjust=neutral(slots, words)
    )
    counts, accepted = np.zeros(words * words, int), 0
    for batch in range(DRAWS // slots):
        own = draws._replace(seed=np.arange(slots, dtype=np.uint32) + batch * slots)
        proposal = propose(model, variables, lane, own)
        choice, after = verify(model, variables, lane, proposal, limit_S, own)
        own = own._replace(step=np.asarray(choice.count))
        # The drafts that the first round made for the next.
        again, _ = verify(model, variables, after, after.proposal, limit_S, own)
        count_S, token_SP = np.asarray(choice.count), np.asarray(choice.token)
        second_S = np.where(count_S > 1, token_SP[:, 1], np.asarray(again.token)[:, 0])
        counts += np.bincount(token_SP[:, 0] * words + second_S, minlength=words * words)
        accepted += int((count_S - 1).sum())
    assert 0.5 < accepted / DRAWS < 1.95  # drafts are neither the model nor unlike it
    tokens = np.array([[1, 2, 4, 0, anchor, first] for first in range(words)])
    out = model.apply(variables, tokens, logits="all").logits[:, -2:]
    law = np.asarray(jax.nn.softmax(out), np.float64)
    wanted_VV = law[0, 0][:, None] * law[:, 1]
    wanted = (wanted_VV / wanted_VV.sum()).ravel() * DRAWS
    assert stats.chisquare(counts, wanted).pvalue > 0.001
