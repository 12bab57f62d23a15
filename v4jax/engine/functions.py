"""What the engine's programs compute, one jitted function each; `programs` gives them shapes."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from v4jax.engine import slots as slots_lib
from v4jax.engine import speculate
from v4jax.engine.choice import choose, logprobs
from v4jax.engine.speculate import Lane
from v4jax.infer.placement import replicated
from v4jax.model import draft as draft_lib
from v4jax.model import sharded
from v4jax.model.mtp_draft import MTPState

_SCORED_AT_ONCE = 128  # tokens whose logits stand in memory together


class Row(NamedTuple):
    """The state of a prompt that is being read: a cache of one row, and the draft's or None."""

    cache: Any
    draft: Any = None


# The same for engines of one model, which then share what is compiled.
@functools.lru_cache(maxsize=16)
def jitted(decoder, kind, drafted, rounds, rule):
    """The jitted functions by name and whether log-probabilities are wanted."""

    def of(function, donated, **fixed):
        bound = functools.partial(function, **fixed)
        return jax.jit(bound, static_argnames="model", donate_argnames=donated)

    drafting = {"decoder": decoder, "kind": kind}
    proposing = {"drafted": drafted, "rule": rule}
    functions = {
        ("read", False): of(_read, "row", **drafting),
        ("read_scored", False): of(_read_scored, "row", **drafting),
        ("put", False): of(_put, "lane", **proposing),
        ("read_page", False): of(read_page, ()),
        ("write_page", False): of(_write_page, "row"),
        ("read_rest", False): of(read_rest, ()),
        ("write_rest", False): of(_write_rest, "row"),
    }
    for scored in (False, True):
        functions["first", scored] = of(_first, (), scored=scored)
        for width in rounds:
            fixed = {"kind": kind, "scored": scored, "width": width, **proposing}
            functions[f"verify {width}", scored] = of(speculate.verify, "lane", **fixed)
    return functions


def _read(model, variables, row: Row, tokens_1T, lengths_1, *, decoder, kind):
    aux = () if kind is None else draft_lib.aux(kind)
    out = model.apply(
        variables, tokens_1T, cache=row.cache, lengths=lengths_1, logits="last", aux=aux
    )
    row = _after(row, out, variables, tokens_1T, lengths_1, decoder, kind)
    return replicated(model, out.logits[:, 0]), row


def _after(row, out, variables, tokens_1T, lengths_1, decoder, kind):
    """The row after a chunk."""
    if kind is None:
        return row._replace(cache=out.cache)
    taps = replicated(decoder, draft_lib.taps(out, kind))
    state = draft_lib.seed(decoder, variables, row.draft, taps, tokens_1T, lengths_1)
    return Row(out.cache, replicated(decoder, state))


def _read_scored(model, variables, row: Row, tokens_1T, lengths_1, following_1T, *, decoder, kind):
    """A chunk with the log-probability of each next token, a block of tokens after the other."""
    aux = () if kind is None else draft_lib.aux(kind)
    out = model.apply(
        variables, tokens_1T, cache=row.cache, lengths=lengths_1, logits="normed", aux=aux
    )
    row = _after(row, out, variables, tokens_1T, lengths_1, decoder, kind)
    normed_TD, following_T = replicated(model, out.normed[0]), following_1T[0]
    head_VD = variables["params"]["head"]["weight"].astype(jnp.float32)

    def logits(normed_XD):
        return jnp.einsum("xd,vd->xv", normed_XD.astype(jnp.float32), head_VD)

    size = min(_SCORED_AT_ONCE, len(following_T))
    blocks = (normed_TD.reshape(-1, size, normed_TD.shape[1]), following_T.reshape(-1, size))
    scores = jax.lax.map(lambda block: logprobs(logits(block[0]), block[1]), blocks)
    scores = tuple(replicated(model, x.reshape(-1, *x.shape[2:])) for x in scores)
    last_1D = jax.lax.dynamic_slice_in_dim(normed_TD, lengths_1[0] - 1, 1)
    return replicated(model, logits(last_1D)), row, scores


def _first(model, logits_1V, draws, scored):
    choice = choose(logits_1V[:, None], draws, scored)
    return replicated(model, choice)


def _put(model, variables, lane: Lane, slot, row: Row, token_11, draws_1, *, drafted, rule):
    """The row in its slot; its draft is told of the first new token, and proposes the next ones."""
    token_1 = jnp.maximum(token_11[:, 0], 0)
    cache, state, proposal = slots_lib.put(lane.cache, slot, row.cache), lane.draft, lane.proposal
    if state is not None:
        began = draft_lib.begin(model, variables, row.draft, token_1, jnp.ones(1, bool))
        alone = Lane(row.cache, token_1, began)
        ahead = speculate.propose(model, variables, alone, draws_1, drafted, rule)
        state = replicated(model, slots_lib.put_row(state, slot, began))
        proposal = replicated(model, slots_lib.put_row(proposal, slot, ahead))
    if model.sharding.mesh is not None:
        places = sharded.cache_shardings(model.sharding, cache)
        cache = jax.lax.with_sharding_constraint(cache, places)
    anchor_S = slots_lib.put_row(lane.anchor_S, slot, token_1)
    return Lane(cache, replicated(model, anchor_S), state, proposal)


def read_page(model, state: Row | Lane, slot, number):
    page = slots_lib.read_page(model.config, model.min_repeats, state.cache, slot, number)
    return replicated(model, page)


def _write_page(model, row: Row, number, page):
    cache = slots_lib.write_page(model.config, model.min_repeats, row.cache, number, page)
    return row._replace(cache=cache)


def read_rest(model, state: Row | Lane, slot):
    draft = {
        name: jax.lax.dynamic_slice_in_dim(getattr(state.draft, name), slot, 1, 0)
        for name in _kept(state.draft)
    }
    if isinstance(state, Lane) and isinstance(state.draft, MTPState):
        # A slot has the row of its last position, which reading would make with the next token;
        # the streams that it is made of are gone, and the block's own stand in for them.
        draft["window"] = jnp.roll(draft["window"], 1, axis=1)
    cache = slots_lib.read_rest(model.config, model.min_repeats, state.cache, slot)
    rest = {"cache": cache, "draft": draft}
    return replicated(model, rest)


def _write_rest(model, row: Row, rest, length):
    cache = slots_lib.write_rest(model.config, model.min_repeats, row.cache, rest["cache"], length)
    state = row.draft
    if state is not None:
        lengths = jnp.full_like(state.lengths, length)
        state = state.replace(**rest["draft"], lengths=lengths)
    return Row(cache, state)


def _kept(state):
    """Names of a draft's arrays that a prefix keeps: its logits are made anew."""
    names = [] if state is None else [field.name for field in dataclasses.fields(state)]
    return [name for name in names if name not in ("lengths", "logits")]
