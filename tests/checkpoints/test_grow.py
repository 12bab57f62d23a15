"""A larger vocabulary: old ids as before, new ones that are there and not likelier."""

import numpy as np
import pytest

from tests.support.tiny import tiny_model
from v4jax.checkpoints import load as checkpoint
from v4jax.checkpoints.grow import with_more_ids
from v4jax.errors import InputError
from v4jax.model.transformer import Transformer


def test_logits_of_old_ids_do_not_change(tmp_path):
    model, variables = tiny_model()
    old = model.config.vocab_size
    config, grown = with_more_ids(model.config, variables, old + 7)
    ids = np.random.default_rng(0).integers(0, old, (2, 24))
    before = model.apply(variables, ids).logits
    after = Transformer(config).apply(grown, ids).logits
    assert after.shape[-1] == old + 7
    np.testing.assert_array_equal(after[..., :old], before)
    assert (after[..., old:].max(-1) < before.max(-1)).all()
    checkpoint.save_official(tmp_path / "grown", config, grown)
    again, loaded = checkpoint.load_variables(tmp_path / "grown", "float32")
    assert again.vocab_size == old + 7
    new = np.asarray(loaded["params"]["embed"]["weight"])[old:]
    assert np.unique(new, axis=0).shape == new.shape


def test_a_vocabulary_does_not_shrink():
    model, variables = tiny_model()
    with pytest.raises(InputError, match="expected no fewer"):
        with_more_ids(model.config, variables, model.config.vocab_size - 1)
