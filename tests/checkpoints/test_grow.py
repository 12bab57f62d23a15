"""A larger vocabulary: everything of old ids as before, new ones that are there."""

import jax
import numpy as np
import pytest

from tests.support.tiny import tiny_model
from v4jax.checkpoints import load as checkpoint
from v4jax.checkpoints.grow import with_more_ids
from v4jax.errors import InputError
from v4jax.train.tree_paths import tree_path

BY_ID = ("embed/weight", "head/weight", "tid2eid")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_old_ids_keep_their_rows_and_all_else_is_the_same(model):
    """So the logits of the old ids are the same products as before."""
    of, variables = model
    old = of.config.vocab_size
    config, grown = with_more_ids(of.config, variables, old + 7)
    assert config.vocab_size == old + 7
    before = {tree_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(variables)}
    after = {tree_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(grown)}
    assert before.keys() == after.keys()
    longer = [path for path in before if before[path].shape != after[path].shape]
    assert longer and all(path.endswith(BY_ID) for path in longer)
    assert {path for path in before if path.endswith(BY_ID)} == set(longer)
    for path in before:
        rows = np.asarray(after[path])
        np.testing.assert_array_equal(rows[:old] if path in longer else rows, before[path])
        assert path not in longer or len(rows) == old + 7


def test_new_ids_can_be_told_apart_and_none_is_likelier(model):
    of, variables = model
    old = of.config.vocab_size
    _, grown = with_more_ids(of.config, variables, old + 7)
    embedded = np.asarray(grown["params"]["embed"]["weight"])[old:]
    assert np.unique(embedded, axis=0).shape == embedded.shape
    head = np.asarray(grown["params"]["head"]["weight"])
    normed = np.random.default_rng(0).standard_normal((50, head.shape[1]))
    logits = normed @ head.T
    np.testing.assert_allclose(logits[:, old:].T, 7 * [logits[:, :old].mean(-1)], atol=1e-5)


def test_it_is_a_checkpoint_like_any_other(model, tmp_path):
    of, variables = model
    config, grown = with_more_ids(of.config, variables, of.config.vocab_size + 7)
    checkpoint.save_official(tmp_path / "grown", config, grown)
    again, loaded = checkpoint.load_variables(tmp_path / "grown", "float32")
    assert again.vocab_size == of.config.vocab_size + 7
    assert loaded["params"]["embed"]["weight"].shape[0] == again.vocab_size


def test_a_vocabulary_does_not_shrink(model):
    of, variables = model
    with pytest.raises(InputError, match="expected no fewer"):
        with_more_ids(of.config, variables, of.config.vocab_size - 1)
