"""A step's gradients against transformers' autograd, carried over by the shipping converter."""

import jax
import numpy as np
import pytest

import v4jax
from tests.support.checkpoints import transformers_model
from v4jax.train.batch import make_batch
from v4jax.train.loss import LossWeights
from v4jax.train.step import Rates, StepConfig, TrainState, accumulate

torch = pytest.importorskip("torch")
# Top-k wide enough for every entry: a choice near a tie would flip between the two.
SIZES = {"index_topk": 64, "hc_sinkhorn_iters": 4}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Their gradients and ours, in our tree."""
    theirs = transformers_model(**SIZES)
    with torch.no_grad():
        for name, table in theirs.named_buffers():
            if name.endswith("tid2eid"):  # zeros: every token's experts would be the same one twice
                table.copy_(torch.rand(len(table), 5).argsort(-1)[:, : table.shape[1]])
    weights, gradients = (tmp_path_factory.mktemp(name) for name in ("weights", "gradients"))
    theirs.save_pretrained(weights)
    # Read back: its noise is in the rotary frequencies too, which no file holds.
    theirs = type(theirs).from_pretrained(weights, dtype=torch.float32)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, theirs.config.vocab_size, (2, 61))
    logits = theirs(torch.tensor(rows[:, :-1])).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(rows[:, 1:]).flatten()
    ).backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            gradient = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    theirs.save_pretrained(gradients)
    model, variables = v4jax.load(weights, dtype="float32")
    batch = make_batch(rows, np.zeros_like(rows), np.ones(rows.shape, bool), 1, packed=False)
    config = StepConfig(losses=LossWeights(mtp=0.0, balance=0.0, indexer=0.0), parts=2)
    state = TrainState(variables["params"], variables["buffers"], None, 0)
    ours, _ = jax.jit(lambda state: accumulate(model, config, state, batch, Rates(0.0, 0.0)))(state)
    return v4jax.load(gradients, dtype="float32")[1]["params"], ours


def test_every_parameter(pair):
    theirs, ours = pair
    compared = 0
    for (path, wanted), (_, found) in zip(
        jax.tree_util.tree_leaves_with_path(theirs), jax.tree_util.tree_leaves_with_path(ours),
        strict=True,
    ):  # fmt: skip
        name = jax.tree_util.keystr(path)
        wanted, found = np.asarray(wanted), np.asarray(found)
        if "indexer" in name:
            assert not found.any() and not wanted.any(), name
            continue
        compared += 1
        error = np.abs(found - wanted).max() / np.abs(wanted).max()
        assert error < 1e-4, (name, error)
    assert compared > 60
