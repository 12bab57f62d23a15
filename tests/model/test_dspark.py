"""DSpark drafts against a second implementation in numpy, and the mistakes that it would show."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v4jax
from tests.support.dspark_numpy import BUGS, Reference
from tests.support.tiny import drawn, tiny_config
from v4jax.config import CSA, HCA, WINDOW, DSpark, with_hash_routing
from v4jax.model import draft
from v4jax.model.transformer import Transformer
from v4jax.sharding.mesh import make_mesh
from v4jax.sharding.rules import ONE_DEVICE, STRATEGIES, Layout

W = 8
GAMMA = 5
LENGTH = 40
# Two of the target layers in one scanned segment, at its two places and in two of its repeats.
LAYERS = with_hash_routing((WINDOW, CSA, HCA, CSA, HCA), 1)
SIZES = DSpark(block_size=GAMMA, markov_rank=10, noise_token_id=330, target_layer_ids=(0, 2, 3))


def dspark_config(**changes):
    sizes = {"layers": LAYERS, "sliding_window": W, "mtp_layers": (), "draft_layers": 3}
    return tiny_config(**(sizes | {"dspark": SIZES} | changes))


def greedy(i, logits):
    return jnp.argmax(logits, axis=-1)


class Lane:
    """A model with its cache and draft, and the features that its rows should have had."""

    def __init__(self):
        self.model = Transformer(dspark_config(), min_repeats=2)
        self.variables = drawn(self.model)
        rng = np.random.default_rng(1)
        self.row = rng.integers(0, 331, (3, LENGTH), np.int32)
        self.run = jax.jit(
            functools.partial(self.model.apply, aux=draft.aux("dspark"), logits="last")
        )
        self.seed = jax.jit(functools.partial(draft.seed, self.model))
        self.commit = jax.jit(functools.partial(draft.commit, self.model))
        whole = jax.jit(functools.partial(self.model.apply, aux=("streams",), logits="none"))
        streams = whole(self.variables, self.row).aux["streams"]
        means = [np.asarray(streams[i]).mean(axis=2) for i in SIZES.target_layer_ids]
        self.features = np.concatenate(means, axis=-1)
        self.arrays = jax.tree.map(np.asarray, self.variables)

        @jax.jit
        def propose(variables, state, anchor):
            seen = []

            def pick(i, logits):
                seen.append(logits)
                return jnp.argmax(logits, axis=-1)

            found = draft.propose(self.model, variables, state, anchor, GAMMA, pick)
            return *found, jnp.stack(seen, axis=1)

        self.propose = propose

    def fresh(self):
        cache = self.model.init_cache(3, LENGTH + GAMMA + 1, rollback=GAMMA)
        return cache, draft.init_state(self.model, 3, "dspark")

    def next_tokens(self, lengths):
        padded = np.pad(self.row, ((0, 0), (0, GAMMA + 1)))
        starts = np.asarray(lengths)
        return np.stack([padded[b, s : s + GAMMA + 1] for b, s in enumerate(starts)])

    def anchor(self, lengths):
        return self.row[np.arange(3), np.minimum(np.asarray(lengths), LENGTH - 1)]

    def read(self, cache, state, counts):
        counts = np.array(counts, np.int32)
        tokens = self.next_tokens(cache.lengths)
        out = self.run(self.variables, tokens, cache=cache, lengths=counts)
        taps = draft.taps(out, "dspark")
        for b, n in enumerate(counts):
            at = int(cache.lengths[b])
            np.testing.assert_allclose(
                taps[b, :n], self.features[b, at : at + n], rtol=1e-4, atol=1e-4
            )
        return out.cache, self.seed(self.variables, state, taps, tokens, counts)

    def check(self, state, rows=(0, 1, 2), bug=None):
        """Whether drafts, their logits and confidences are those of the reference."""
        anchor = self.anchor(state.lengths)
        found = [np.asarray(x) for x in self.propose(self.variables, state, anchor)]
        reference = Reference(self.model.config, self.arrays, bug)
        for b in rows:
            n = int(state.lengths[b])
            drafts, logits, confidences = reference.propose(
                self.features[b, :n], int(anchor[b]), lambda logits: int(np.argmax(logits))
            )
            np.testing.assert_array_equal(found[0][b], drafts)
            np.testing.assert_allclose(found[1][b], confidences, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(found[2][b], logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def lane():
    return Lane()


@pytest.fixture(scope="module")
def states(lane):
    """States after ragged prompts: p = 0, p < W and p > W; and one with idle rows between."""
    cache, state = lane.read(*lane.fresh(), [1, 6, 6])
    found = [state]
    for counts in ([0, 1, 6], [0, 2, 1], [6, 0, 6], [2, 6, 6]):
        cache, state = lane.read(cache, state, counts)
        found.append(state)
    return found, cache


def test_the_draft_agrees_with_the_reference(lane, states):
    for state in states[0]:
        lane.check(state)


@pytest.mark.parametrize("bug", BUGS)
def test_the_mistakes_of_others_would_be_seen(lane, states, bug):
    with pytest.raises(AssertionError, match="Mismatched elements"):
        lane.check(states[0][-1], rows=(2,), bug=bug)


def test_rings_never_advance_over_rejected_tokens(lane, states):
    """Rounds of any counts, whose verification runs wrong drafts, leave the true rings."""
    rng = np.random.default_rng(3)
    cache, state = states[1], states[0][-1]
    kept = [np.array([1, 1, 1]), np.array([1, 0, 1]), np.array([6, 3, 0])]
    kept += [rng.integers(0, 4, 3) for _ in range(3)]
    for counts in kept:
        counts = counts.astype(np.int32)
        tokens = lane.next_tokens(cache.lengths)
        wrong = rng.integers(0, 331, tokens.shape, np.int32)
        tokens = np.where(np.arange(GAMMA + 1)[None] < counts[:, None], tokens, wrong)
        ran = np.where(counts > 0, GAMMA + 1, 0).astype(np.int32)
        out = lane.run(lane.variables, tokens, cache=cache, lengths=ran)
        before, cache = state, out.cache.rollback(ran - counts)
        taps = draft.taps(out, "dspark")
        state = lane.commit(lane.variables, state, taps, lane.next_tokens(cache.lengths), counts)
        np.testing.assert_array_equal(state.lengths, cache.lengths)
        lane.check(state)
        idle = counts == 0
        rows = [jax.tree.map(lambda x, idle=idle: x[idle], each) for each in (before, state)]
        jax.tree.map(np.testing.assert_array_equal, *rows)


def test_more_drafts_than_the_block_has_are_refused(lane, states):
    with pytest.raises(v4jax.InputError, match="6 drafts were asked of a DSpark draft of 5"):
        draft.propose(lane.model, lane.variables, states[0][0], np.zeros(3, np.int32), 6, greedy)


@pytest.mark.slow
def test_fewer_drafts_are_the_first_of_the_block(lane, states):
    state = states[0][-1]
    anchor = lane.anchor(state.lengths)

    @jax.jit
    def two(variables, state):
        return draft.propose(lane.model, variables, state, anchor, 2, greedy)

    drafts, confidences = two(lane.variables, state)
    all_drafts, all_confidences, _ = lane.propose(lane.variables, state, anchor)
    np.testing.assert_array_equal(drafts, all_drafts[:, :2])
    np.testing.assert_allclose(confidences, all_confidences[:, :2], rtol=1e-5, atol=1e-5)


def test_a_row_is_taken_out_and_put_in(lane, states):
    state = states[0][-1]
    one = jax.tree.map(lambda x: x[1:2], state)
    assert jax.tree.structure(one) == jax.tree.structure(draft.init_state(lane.model, 1, "dspark"))
    moved = jax.tree.map(lambda x, y: x.at[2].set(y[0]), state, one)
    _, _, logits = lane.propose(lane.variables, moved, np.array([1, 5, 5], np.int32))
    np.testing.assert_array_equal(logits[1], logits[2])
    jax.tree.map(
        np.testing.assert_array_equal, jax.tree.map(jnp.zeros_like, state), lane.fresh()[1]
    )


def test_features_are_summed_in_float32_and_rounded_once():
    sizes = dataclasses.replace(SIZES, target_layer_ids=(0,))
    config = dspark_config(layers=(WINDOW,), dspark=sizes, draft_layers=1)
    model = Transformer(config, dtype="bfloat16")
    call = functools.partial(model.apply, aux=("streams", "features"), logits="none")
    out = jax.jit(call)(drawn(model, moved=1.0), np.arange(30, dtype=np.int32)[None])
    streams = np.asarray(out.aux["streams"][0], np.float64)
    assert out.aux["features"].dtype == jnp.bfloat16
    found = np.asarray(out.aux["features"], np.float64)
    np.testing.assert_array_equal(found, (streams.sum(2) / 4).astype(jnp.bfloat16))


def test_a_fresh_model_has_the_declared_variables():
    sizes = dataclasses.replace(SIZES, target_layer_ids=(0,))
    model = Transformer(dspark_config(layers=(WINDOW,), dspark=sizes, draft_layers=2))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    declared = model.abstract_variables()
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, declared)


def test_a_model_without_a_draft_says_so(lane):
    carried = lane.model.clone(config=dspark_config(dspark=None))
    with pytest.raises(v4jax.InputError, match="no DSpark draft: config.json, and its 3 draft bl"):
        draft.init_state(carried, 1, "dspark")
    assert draft.kinds(lane.model.config) == ("dspark",)
    assert draft.kinds(carried.config) == ()
    assert draft.kinds(tiny_config()) == ("mtp",)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"target_layer_ids": (2, 5)}, r"target_layer_ids is \[2, 5\]; expected layers below 5"),
        ({"target_layer_ids": (2, 1)}, r"target_layer_ids is \[2, 1\]; expected ascending"),
        ({"noise_token_id": 331}, "noise_token_id is 331; expected a token id below vocab_size"),
        ({"block_size": 0}, "dspark_block_size is 0; expected a positive number"),
    ],
)
def test_sizes_that_no_model_has(sizes, message):
    with pytest.raises(v4jax.InputError, match=message):
        dspark_config(dspark=DSpark(**({"target_layer_ids": (0,), "noise_token_id": 1} | sizes)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, sizes, near",
    [
        ({"hc_mult": 1, "n_shared_experts": 0, "draft_layers": 1}, {"block_size": 1}, 1e-4),
        ({"sliding_window": 1, "draft_layers": 2}, {"block_size": 7}, 1e-4),
        ({"sliding_window": 128, "hc_mult": 2}, {"block_size": 3, "markov_rank": 1}, 1e-4),
        # bf16 activations against float64.
        ({"dtype": "bfloat16"}, {}, 5e-2),
    ],
)
def test_any_sizes_and_chunks(changes, sizes, near):
    """Random features in random chunks, ragged rows; the noise and the anchor at random too."""
    rng = np.random.default_rng(len(changes))
    sizes = dataclasses.replace(SIZES, **sizes, noise_token_id=int(rng.integers(331)))
    config = dspark_config(layers=(WINDOW,) * 4, **changes, dspark=sizes)
    model, width = Transformer(config), 3 * config.hidden_size
    variables = drawn(model)
    features = rng.standard_normal((3, 180, width), np.float32)
    padded = jnp.asarray(np.pad(features, ((0, 0), (0, 32), (0, 0))), config.dtype)
    seed = jax.jit(functools.partial(draft.seed, model))
    commit = jax.jit(functools.partial(draft.commit, model))
    state, seen = draft.init_state(model, 3, "dspark"), np.zeros(3, np.int32)
    for step in range(14):
        long = step < 5
        counts = rng.integers(0, 33 if long else 4, 3).astype(np.int32)
        taps = jnp.stack([padded[b, s : s + 32] for b, s in enumerate(seen)])
        move = seed if long else commit
        state = move(variables, state, taps, np.zeros((3, 32), np.int32), counts)
        seen += counts
    anchor, found = rng.integers(0, 331, 3, np.int32), []

    def pick(i, logits):
        found.append(logits)
        return jnp.asarray(forced[:, i])  # near ties may fall either way

    forced = rng.integers(0, 331, (3, sizes.block_size), np.int32)
    given = draft.propose(model, variables, state, anchor, sizes.block_size, pick)
    reference = Reference(config, jax.tree.map(np.asarray, variables))
    for b, n in enumerate(seen):
        left = iter(forced[b])
        taps = np.asarray(padded[b, :n].astype(jnp.float32))
        _, logits, confidences = reference.propose(
            taps, int(anchor[b]), lambda _, left=left: next(left)
        )
        ours = np.stack([np.asarray(each[b]) for each in found])
        np.testing.assert_allclose(ours, logits, rtol=near, atol=near)
        np.testing.assert_allclose(given[1][b], confidences, rtol=near, atol=near)


@pytest.mark.slow
def test_drafts_on_a_mesh_are_those_of_one_device(lane, states):
    """Rows over data, heads, experts' widths and the vocabulary over tensor."""
    mesh = make_mesh(jax.devices()[:4], data=2, tensor=2)
    state = jax.tree.map(lambda x: x[1:], states[0][-1])
    anchor = lane.anchor(states[0][-1].lengths)[1:]
    features = jnp.asarray(lane.features[1:, :6])
    config = dspark_config(vocab_size=332, hidden_size=48)
    found = []
    for layout in (ONE_DEVICE, Layout(mesh, STRATEGIES["decode"])):
        model = lane.model.clone(config=config, sharding=layout)
        variables = drawn(model.clone(sharding=ONE_DEVICE))

        @jax.jit
        def both(variables, state, model=model):
            counts = jnp.array([3, 0], jnp.int32)
            state = draft.commit(model, variables, state, features, features[:, :, 0], counts)
            return state, draft.propose(model, variables, state, anchor, GAMMA, greedy)

        found.append(both(variables, state))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *found)
