"""The indexer's choice against dense attention, on a tiny model and by hand."""

import jax
import numpy as np
import pytest

from tests.support.tiny import tiny_model
from v4jax.eval import indexer_recall


@pytest.mark.slow  # three compilations
def test_the_choice_is_compared_with_all_that_is_visible():
    model, variables = tiny_model("released")
    tokens = np.asarray(jax.random.randint(jax.random.key(3), (90,), 0, model.config.vocab_size))
    found = indexer_recall.recall(model, variables, tokens.tolist())
    out = jax.jit(lambda v, t: model.apply(v, t, aux=("chosen", "attention")))(
        variables, tokens[None]
    )
    shares = []
    for layer, chosen in out.aux["chosen"].items():
        count = len(tokens) // model.config.layers[layer].ratio
        q, entries = (np.asarray(out.aux[name][layer], np.float64) for name in ("q", "entries"))
        scores = q[0, -1] @ entries[0, :count].T / np.sqrt(model.config.head_dim)
        weights = np.asarray(jax.nn.softmax(scores, axis=-1)).sum(0)
        kept = {int(i) for i in np.asarray(chosen)[0, -1] if i >= 0}
        shares.append(sum(weights[i] for i in kept) / weights.sum())
    assert found["visible_entries"] == len(tokens) // 4
    assert found["chosen_entries"] == model.config.index_topk < found["visible_entries"]
    np.testing.assert_allclose(found["score"], np.mean(shares), atol=1e-4)
    np.testing.assert_allclose(found["worst_layer"], np.min(shares), atol=1e-4)


def test_what_is_kept_by_hand():
    weights = np.array([0.1, 0.5, 0.1, 0.3])
    assert indexer_recall._kept(weights, np.array([1, 0])) == (0.6, 0.5)
    assert indexer_recall._kept(weights, np.array([1, 3])) == (0.8, 1.0)
