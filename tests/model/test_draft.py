"""Drafts of the model itself: the MTP chain against the MTP block on the whole row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v4jax
from tests.support.tiny import drawn, tiny_config
from v4jax.config import CSA, HCA
from v4jax.model import draft
from v4jax.model.transformer import Transformer
from v4jax.sharding.mesh import make_mesh
from v4jax.sharding.rules import ONE_DEVICE, STRATEGIES, Layout

W = 8
LENGTH = 150
CHUNK = 16
GAMMA = 3


class Lane:
    """A model with its cache and draft, whose rows go on by any number of tokens each."""

    def __init__(self, model, variables, rows=3):
        self.model, self.variables, self.rows = model, variables, rows
        self.run = jax.jit(functools.partial(model.apply, aux=draft.aux("mtp"), logits="last"))
        self.seed = jax.jit(functools.partial(draft.seed, model))
        self.begin = jax.jit(functools.partial(draft.begin, model))
        self.commit = jax.jit(functools.partial(draft.commit, model))

    def fresh(self):
        cache = self.model.init_cache(self.rows, LENGTH + CHUNK, rollback=GAMMA)
        return cache, draft.init_state(self.model, self.rows, "mtp")

    def read(self, cache, state, row, counts, width=CHUNK):
        """The next `counts` tokens of each row of `row`, as a chunk of their prompts."""
        tokens = self.slices(row, cache.lengths, width)
        out = self.run(self.variables, tokens, cache=cache, lengths=counts)
        return out.cache, self.seed(self.variables, state, taps(out), tokens, counts)

    def slices(self, row, starts, width):
        padded = np.pad(row, ((0, 0), (0, CHUNK)))
        return np.stack([padded[b, s : s + width] for b, s in enumerate(np.asarray(starts))])


def taps(out):
    return draft.taps(out, "mtp")


def made(**changes):
    """A lane, rows of tokens, and what the model says of these rows read at once."""
    model = Transformer(tiny_config(layers=(CSA, HCA), sliding_window=W, **changes))
    variables = drawn(model)
    rng = np.random.default_rng(1)
    row = rng.integers(0, model.config.vocab_size, (3, LENGTH), np.int32)
    whole = jax.jit(functools.partial(model.apply, mtp=True, aux=("streams",)))(variables, row)
    return Lane(model, variables), row, jax.tree.map(np.asarray, whole)


@pytest.fixture(scope="module")
def lane():
    return made()


def token_after(row, lengths):
    """The token behind the last one that each row has read; any behind the end."""
    rows = np.arange(len(row))
    return row[rows, np.minimum(np.asarray(lengths), row.shape[1] - 1)]


def check(state, whole, lengths):
    """The logits behind `lengths` tokens and the next one are those of the whole row."""
    for b, n in enumerate(np.asarray(lengths)):
        if 0 < n < LENGTH:
            np.testing.assert_allclose(
                state.logits[b], whole.mtp_logits[0][b, n - 1], rtol=1e-4, atol=1e-4
            )


def test_prompts_in_any_chunks_give_the_first_draft_of_the_whole_row(lane):
    lane, row, whole = lane
    rng = np.random.default_rng(2)
    cache, state = lane.fresh()
    # One token at first, then borders of the window and of compression blocks, then anything.
    steps = [np.array(s, np.int32) for s in ([1, 2, 0], [3, 1, 1], [4, 5, 8], [8, 9, 7])]
    steps += [rng.integers(0, CHUNK + 1, 3, np.int32) for _ in range(20)]
    for step in steps:
        counts = np.minimum(step, LENGTH - np.asarray(cache.lengths))
        cache, state = lane.read(cache, state, row, counts)
        first = lane.begin(lane.variables, state, token_after(row, cache.lengths), np.ones(3, bool))
        check(first, whole, cache.lengths)
    assert int(cache.lengths.max()) == LENGTH


@pytest.mark.parametrize("prompt", [[1, 2, 7], [5, 8, 9], [3, 4, 16]])
def test_rounds_give_the_first_draft_of_the_whole_row(lane, prompt):
    """Rounds that keep 0 (idle) to all positions, whatever the rejected drafts were."""
    lane, row, whole = lane
    rng = np.random.default_rng(sum(prompt))
    cache, state = lane.read(*lane.fresh(), row, np.array(prompt, np.int32))
    state = lane.begin(lane.variables, state, token_after(row, cache.lengths), np.ones(3, bool))
    kept = [np.array([1, 1, 1]), np.array([1, 1, 4]), np.array([4, 0, 2]), np.array([4, 1, 0])]
    kept += [rng.integers(0, GAMMA + 2, 3) for _ in range(8)]
    for counts in kept:
        counts = counts.astype(np.int32)
        tokens = lane.slices(row, cache.lengths, GAMMA + 1)
        wrong = rng.integers(0, 331, tokens.shape, np.int32)
        tokens = np.where(np.arange(GAMMA + 1)[None] < counts[:, None], tokens, wrong)
        ran = np.where(counts > 0, GAMMA + 1, 0).astype(np.int32)
        out = lane.run(lane.variables, tokens, cache=cache, lengths=ran)
        following = lane.slices(row, np.asarray(cache.lengths) + 1, GAMMA + 1)
        following = np.where(np.arange(GAMMA + 1)[None] < counts[:, None], following, wrong)
        before, cache = state, out.cache.rollback(ran - counts)
        state = lane.commit(lane.variables, state, taps(out), following, counts)
        check(state, whole, cache.lengths)
        idle = counts == 0
        kept = [jax.tree.map(lambda x, idle=idle: x[idle], each) for each in (before, state)]
        jax.tree.map(np.testing.assert_array_equal, *kept)


def test_the_chain_feeds_the_block_with_its_own_streams(lane):
    """Draft i + 1 is what the block says of its own output and draft i, and nothing stays."""
    lane, row, _ = lane
    cache, state = lane.read(*lane.fresh(), row, np.array([9, 4, 13], np.int32))
    anchor = token_after(row, cache.lengths)
    state = lane.begin(lane.variables, state, anchor, np.ones(3, bool))
    kept = jax.tree.map(np.asarray, state)
    seen = []

    def pick(i, logits):
        seen.append(logits)
        return jnp.argmax(logits, axis=-1)

    @jax.jit
    def chain(variables, state, anchor):
        drafts, confidences = draft.propose(lane.model, variables, state, anchor, GAMMA, pick)
        assert confidences is None
        return drafts, list(seen)

    drafts, seen = chain(lane.variables, state, anchor)
    assert drafts.shape == (3, GAMMA)
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    # The same by commits of true rows, whose streams are the block's own output.
    for i in range(1, GAMMA):
        z, token = state.streams[:, None], drafts[:, i - 1 : i]
        z, token = (jnp.pad(x, ((0, 0), (0, GAMMA), *[(0, 0)] * (x.ndim - 2))) for x in (z, token))
        state = lane.commit(lane.variables, state, z, token, np.ones(3, np.int32))
        np.testing.assert_allclose(state.logits, seen[i], rtol=1e-5, atol=1e-5)


def test_a_row_is_taken_out_and_put_in(lane):
    lane, row, _ = lane
    _, state = lane.read(*lane.fresh(), row, np.array([9, 4, 13], np.int32))
    one = jax.tree.map(lambda x: x[1:2], state)
    assert jax.tree.structure(one) == jax.tree.structure(draft.init_state(lane.model, 1, "mtp"))
    moved = jax.tree.map(lambda x, y: x.at[2].set(y[0]), state, one)
    token = np.array([1, 5, 5], np.int32)
    moved = lane.begin(lane.variables, moved, token, np.ones(3, bool))
    np.testing.assert_array_equal(moved.logits[1], moved.logits[2])
    fresh = jax.tree.map(jnp.zeros_like, state)
    jax.tree.map(np.testing.assert_array_equal, fresh, lane.fresh()[1])


def test_a_restored_row_makes_the_row_behind_the_cut_itself(lane):
    """What a prefix cache keeps of a row is all that later calls read of it."""
    lane, row, whole = lane
    cut, step = np.full(3, CHUNK, np.int32), np.array([5, 16, 1], np.int32)
    cache, state = lane.read(*lane.fresh(), row, cut)
    garbage = jnp.full_like(state.logits, 1e9)
    restored = lane.fresh()[1].replace(
        window=state.window, streams=state.streams, lengths=state.lengths, logits=garbage
    )
    found = []
    for each in (state, restored):
        after, each = lane.read(cache, each, row, step)
        token = token_after(row, after.lengths)
        found.append(lane.begin(lane.variables, each, token, np.ones(3, bool)))
    check(found[0], whole, after.lengths)
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_the_last_streams_come_with_a_cache(lane):
    lane, row, whole = lane
    counts = np.array([CHUNK, 1, 7], np.int32)
    cache, _ = lane.fresh()
    out = lane.run(lane.variables, row[:, :CHUNK], cache=cache, lengths=counts)
    for b, n in enumerate(counts):
        np.testing.assert_allclose(out.logits[b, 0], whole.logits[b, n - 1], rtol=1e-4, atol=1e-4)
        streams = whole.aux["streams"][1][b, :n]
        np.testing.assert_allclose(out.streams[b, :n], streams, rtol=1e-4, atol=1e-5)


def test_a_prompt_is_read_without_queries_or_experts(lane):
    """Window rows need neither, whatever the block computes when it proposes."""
    lane, row, _ = lane
    counts = jax.ShapeDtypeStruct((3,), jnp.int32)
    streams = jax.ShapeDtypeStruct((3, CHUNK, 4, 48), jnp.float32)
    state = jax.eval_shape(lambda: lane.fresh()[1])
    arguments = (lane.variables, state, streams, row[:, :CHUNK], counts)
    experts = "tensor<6x28x48xf32>"
    assert experts not in lane.seed.lower(*arguments).as_text()
    assert experts in lane.commit.lower(*arguments).as_text()


def test_a_model_without_a_draft_says_so(lane):
    model = lane[0].model
    without = model.clone(config=tiny_config(mtp_layers=()))
    with pytest.raises(v4jax.InputError, match="draft is 'mtp' and the model has no MTP block"):
        draft.init_state(without, 1, "mtp")
    with pytest.raises(v4jax.InputError, match="draft is 'eagle'; expected one of"):
        draft.init_state(model, 1, "eagle")
    with pytest.raises(v4jax.InputError, match="aux names features and the model has no DSpark"):
        model.apply(lane[0].variables, lane[1][:, :2], aux=("features",))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, options, near",
    [
        ({"hc_mult": 1, "n_shared_experts": 0, "scoring_func": "softmax"}, {}, 1e-4),
        ({"sliding_window": 1}, {}, 1e-4),
        ({"sliding_window": 128, "head_dim": 64}, {}, 1e-4),
        # The window's rows and the head round alike; other widths sum in another order.
        ({}, {"dtype": "bfloat16"}, 3e-2),
        ({"head_dim": 72}, {"numerics": "native"}, 3e-2),
    ],
)
def test_any_chunks_of_given_streams(changes, options, near):
    """Seeds and commits of random widths over the streams of one call, ragged rows."""
    config = tiny_config(**({"layers": (CSA,), "sliding_window": W} | changes))
    model = Transformer(config, **options)
    variables, rng = drawn(model), np.random.default_rng(5)
    row = rng.integers(0, 331, (3, LENGTH), np.int32)
    call = functools.partial(model.apply, mtp=True, aux=("last_streams",))
    whole = jax.jit(call)(variables, row)
    padded = jnp.pad(whole.streams, ((0, 0), (0, CHUNK), (0, 0), (0, 0)))
    lane, state = Lane(model, variables), draft.init_state(model, 3, "mtp")
    prompt = rng.integers(1, 60, 3)
    seen = np.zeros(3, np.int32)

    def cut(starts):
        return jnp.stack([padded[b, s : s + CHUNK] for b, s in enumerate(starts)])

    while (seen < prompt).any():
        counts = np.minimum(rng.integers(0, CHUNK + 1, 3), prompt - seen).astype(np.int32)
        tokens = lane.slices(row, seen, CHUNK)
        state, seen = lane.seed(variables, state, cut(seen), tokens, counts), seen + counts
    state = lane.begin(variables, state, token_after(row, seen), np.ones(3, bool))
    largest = np.abs(whole.mtp_logits[0]).max()
    while (seen < LENGTH - CHUNK).all():
        for b, n in enumerate(seen):
            expected = whole.mtp_logits[0][b, n - 1]
            np.testing.assert_allclose(state.logits[b], expected, rtol=near, atol=near * largest)
        counts = rng.integers(0, 6, 3).astype(np.int32)
        following = lane.slices(row, seen + 1, CHUNK)
        state, seen = lane.commit(variables, state, cut(seen), following, counts), seen + counts


@pytest.mark.slow
def test_the_chain_on_a_mesh_is_that_of_one_device():
    mesh = make_mesh(jax.devices()[:4], data=2, tensor=2)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 332, (2, 6), np.int32)
    found = []
    for layout in (ONE_DEVICE, Layout(mesh, STRATEGIES["decode"])):
        config = tiny_config(layers=(CSA,), sliding_window=W, vocab_size=332)
        model = Transformer(config, sharding=layout)
        variables = drawn(model.clone(sharding=ONE_DEVICE))

        @jax.jit
        def both(variables, model=model):
            cache, state = model.init_cache(2, 16), draft.init_state(model, 2, "mtp")
            counts = jnp.array([6, 3], jnp.int32)
            out = model.apply(variables, tokens, cache=cache, lengths=counts, aux=draft.aux("mtp"))
            state = draft.seed(model, variables, state, taps(out), tokens, counts)
            first = draft.begin(model, variables, state, tokens[:, 0], counts > 0)
            pick = functools.partial(jnp.argmax, axis=-1)
            drafts, _ = draft.propose(
                model, variables, first, tokens[:, 0], GAMMA, lambda i, logits: pick(logits)
            )
            return drafts, first

        found.append(both(variables))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *found)


def test_a_strategy_that_cuts_rows_is_refused():
    mesh = make_mesh(jax.devices()[:2], sequence=2)
    model = Transformer(tiny_config(), sharding=Layout(mesh, STRATEGIES["prefill"]))
    state = draft.init_state(model, 2, "mtp")
    with pytest.raises(v4jax.InputError, match="came with strategy 'prefill', which cuts rows"):
        draft.begin(model, {}, state, np.zeros(2, np.int32), np.ones(2, bool))
