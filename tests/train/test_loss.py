"""The whole loss against full logits, packed documents against documents apart, parts that add."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.support.selection import first
from tests.support.train_models import ragged, small_batch, small_model
from v4jax.errors import InputError
from v4jax.train.batch import make_batch
from v4jax.train.loss import LossWeights, count, loss

WEIGHTS = LossWeights(mtp=0.3, balance=1e-4, indexer=1.0)


@functools.partial(jax.jit, static_argnames=("weights", "dense"))
def noted(variables, batch, whole=None, weights=WEIGHTS, dense=False):
    model, _ = small_model()
    counts = count(batch if whole is None else whole, model.config)
    return loss(model, variables, batch, weights, counts, dense=dense)[1]


def rows_of(*documents, ahead=2):
    """One packed row of these documents."""
    tokens = np.concatenate(documents)[None]
    ids = np.concatenate([np.full(len(d), i) for i, d in enumerate(documents)])[None]
    return make_batch(tokens, ids, np.ones(tokens.shape, bool), ahead)


def test_next_token_and_mtp_against_full_logits():
    model, variables = small_model()
    batch = small_batch()
    found = noted(variables, batch)
    out = jax.jit(functools.partial(model.apply, mtp=True))(
        variables, batch.tokens_BT, segment_ids=batch.segment_ids_BT
    )
    for name, logits, column in (("loss", out.logits, 0), ("mtp", out.mtp_logits[0], 1)):
        length = logits.shape[1]
        right = np.take_along_axis(
            np.asarray(jax.nn.log_softmax(logits)), batch.targets_BTJ[:, :length, column, None], -1
        )[..., 0]
        wanted = -(right * batch.weights_BTJ[:, :length, column]).sum()
        wanted /= batch.weights_BTJ[..., column].sum()
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5)


def test_a_documents_last_token_predicts_nothing():
    batch = rows_of(np.arange(5), np.arange(7))
    np.testing.assert_array_equal(batch.weights_BTJ[0, :, 0], [1, 1, 1, 1, 0, 1, 1, 1, 1, 1])
    # The last token's MTP block would read a token that the row has only as a target.
    np.testing.assert_array_equal(batch.weights_BTJ[0, :, 1], [1, 1, 1, 0, 0, 1, 1, 1, 1, 0])


def test_masked_tokens_are_no_targets():
    tokens = np.arange(8)[None]
    says = np.array([[0, 0, 0, 1, 1, 0, 1, 0]], bool)
    batch = make_batch(tokens, np.zeros_like(tokens), says, 1)
    np.testing.assert_array_equal(batch.weights_BTJ[0, :, 0], [0, 0, 1, 1, 0, 1, 0])


def test_packed_documents_lose_what_they_lose_apart():
    _, variables = small_model()
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, 331, 23), rng.integers(0, 331, 43)
    together = noted(variables, rows_of(first, second))
    # Apart, another document that counts for nothing fills the row: one program for all.
    nats = 0.0
    for document, targets in ((first, 22), (second, 41)):  # the row ends before the last of second
        tokens = np.concatenate([document, np.zeros(66 - len(document), int)])[None]
        place = np.arange(66)[None]
        ids = (place >= len(document)).astype(int)
        batch = make_batch(tokens, ids, place <= targets, 2)
        assert batch.weights_BTJ[..., 0].sum() == targets
        nats += float(noted(variables, batch)["loss"]) * targets
    np.testing.assert_allclose(float(together["loss"]) * (22 + 41), nats, rtol=1e-5)


@pytest.mark.parametrize("dense", first([False], [False, True]))
def test_parts_of_a_batch_add_up(dense):
    _, variables = small_model()
    whole = small_batch(rows=2)  # as the batches below, which take the same programs
    wanted = noted(variables, whole, dense=dense)
    halves = [jax.tree.map(lambda x, i=i: x[i : i + 1], whole) for i in range(2)]
    found = [noted(variables, half, whole, dense=dense) for half in halves]
    assert len(set(wanted) - {"load"}) == 5 + dense  # with the indexer's and its companions
    for name in set(wanted) - {"load"}:
        np.testing.assert_allclose(found[0][name] + found[1][name], wanted[name], rtol=1e-5)
    for layer, load in wanted["load"].items():
        np.testing.assert_array_equal(found[0]["load"][layer] + found[1]["load"][layer], load)
        assert load.sum() == 2 * (64 - (layer == 2)) * 2  # layer 2 is the MTP block, a token short


# Documents of 3 tokens close no block of a CSA layer of ratio 4: the parts' counts differ.
RAGGED = {
    "long_and_short": ragged([(66,), (3,) * 22]),
    "no_targets_in_a_part": ragged([(66,), (10, 20)], [[9], [0, 2]]),
    "no_entry_at_all": ragged([(3,) * 22, (2,) * 33]),
    "fractions": dataclasses.replace(
        small_batch(), weights_BTJ=small_batch().weights_BTJ * np.float32(0.001)
    ),
}


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("dense", first([False], [False, True]))
def test_parts_that_differ_add_up(name, dense):
    """Every figure of a batch is the sum of its rows' shares, whatever a row holds."""
    _, variables = small_model()
    whole = RAGGED[name]
    wanted = noted(variables, whole, dense=dense)
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], whole) for i in range(2)]
    found = [noted(variables, row, whole, dense=dense) for row in rows]
    for key in set(wanted) - {"load"}:
        assert np.isfinite(wanted[key])
        np.testing.assert_allclose(found[0][key] + found[1][key], wanted[key], rtol=2e-5)


def test_means_are_over_the_weights_of_targets():
    _, variables = small_model()
    wanted, found = noted(variables, small_batch()), noted(variables, RAGGED["fractions"])
    for key in ("loss", "mtp"):
        np.testing.assert_allclose(found[key], wanted[key], rtol=1e-5)


def test_balance_loss_by_hand():
    model, variables = small_model()
    batch = small_batch(packed=False)
    out = jax.jit(functools.partial(model.apply, aux=("router_experts", "router_scores")))(
        variables, batch.tokens_BT
    )
    experts, k, wanted = 6, 2, 0.0
    for layer in (1,):  # layer 0 is routed by hash
        chosen = np.asarray(out.aux["router_experts"][layer])
        scores = np.asarray(out.aux["router_scores"][layer], np.float64)
        for row in range(2):
            f = experts / (k * 64) * np.bincount(chosen[row].ravel(), minlength=experts)
            share = (scores[row] / scores[row].sum(-1, keepdims=True)).mean(0)
            wanted += (f * share).sum() / 2
    found = noted(variables, batch, weights=LossWeights(mtp=0.0, indexer=0.0))
    np.testing.assert_allclose(found["balance"], wanted, rtol=1e-5)
    assert set(found) == {"loss", "balance", "load"}


def test_weight_zero_leaves_the_indexer_without_gradient():
    model, variables = small_model()
    batch = small_batch()

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(indexer, weight):
        params = unflatten_dict(flatten_dict(variables["params"]) | indexer)
        counts = count(batch, model.config)
        found = loss(
            model, variables | {"params": params}, batch, LossWeights(indexer=weight), counts
        )
        return found[0]

    indexer = {
        path: leaf for path, leaf in flatten_dict(variables["params"]).items() if "indexer" in path
    }
    assert len(indexer) > 5
    assert all(np.all(np.asarray(g) == 0) for g in gradient(indexer, 0.0).values())
    assert all(np.any(np.asarray(g) != 0) for g in gradient(indexer, 1.0).values())


def test_bad_weights():
    with pytest.raises(InputError, match="loss weight mtp is -1.0; expected 0 or more"):
        LossWeights(mtp=-1.0)
