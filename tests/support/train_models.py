"""One small model with every kind of layer for the tests of training, made and compiled once."""

import dataclasses
import functools

import numpy as np

from tests.support.tiny import drawn, tiny_config
from v4jax.config import CSA, HCA, with_hash_routing
from v4jax.model.transformer import Transformer
from v4jax.train.batch import make_batch


@functools.cache
def small_model(**changes):
    """A model (CSA by hash, HCA by score and one MTP block) and its variables."""
    options = {name: changes.pop(name) for name in ("numerics", "dtype") if name in changes}
    # Two layers and two streams: as quick to compile as it gets.
    layers = with_hash_routing((CSA, dataclasses.replace(HCA, ratio=16)), 1)
    sizes = {"layers": layers, "hc_mult": 2, "hc_sinkhorn_iters": 2}
    model = Transformer(tiny_config(**(sizes | changes)), **options)
    return model, drawn(model)


def small_batch(rows=2, length=64, ahead=2, seed=0, packed=True, vocab_size=331):
    """Random rows of two documents each."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (rows, length + ahead))
    ends = rng.integers(length // 4, 3 * length // 4, rows)
    documents = (np.arange(length + ahead)[None] >= ends[:, None]).astype(np.int32)
    counts = np.ones(tokens.shape, bool)
    return make_batch(tokens, documents, counts, ahead, packed)


def ragged(documents, targets=None, ahead=2, seed=0, vocab_size=331):
    """Rows of documents of given lengths, the rest of a row one more; only some are targets."""
    length = 64 + ahead
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (len(documents), length))
    ids = np.stack(
        [np.repeat(np.arange(len(d) + 1), [*d, length - sum(d)])[:length] for d in documents]
    )
    counts = np.ones(tokens.shape, np.float32)
    for row, kept in enumerate(targets or ()):
        counts[row] *= np.isin(ids[row], kept)
    return make_batch(tokens, ids, counts, ahead)
