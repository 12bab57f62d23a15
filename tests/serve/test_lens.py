"""The lens: its figures are those of the model, whatever split of calls they are made by."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.tiny import tiny_model
from v4jax.errors import InputError
from v4jax.serve.lens import ASKED, Lens

LENGTH = 300
TOKENS = np.random.default_rng(5).integers(0, 331, LENGTH).tolist()


@pytest.fixture(scope="module")
def made():
    """A model, some of whose layers are scanned, its lens, and one pass over all tokens at once."""
    model, params = tiny_model("scanned")
    apply = jax.jit(model.apply, static_argnames=("aux",))
    whole = apply(params, jnp.asarray([TOKENS], jnp.int32), aux=ASKED)
    return model, Lens(model, params, chunk=64, top=5), jax.tree.map(np.asarray, whole)


@pytest.mark.parametrize("position", [0, 1, 3, 22, 23, 24, 127, 128, 129, 200, LENGTH - 1])
def test_figures_are_those_of_one_pass_over_everything(made, position):
    model, lens, whole = made
    found = lens.figures(TOKENS, position)
    assert found["token"] == TOKENS[position]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for layer, spec in zip(found["layers"], model.config.layers, strict=True):
        number = layer["layer"]
        assert layer["kind"] == spec.attention and layer["routing"] == spec.routing
        experts = whole.aux["router_experts"][number][0, position]
        assert layer["experts"]["index"] == experts.tolist()
        near(layer["experts"]["weight"], whole.aux["router_weights"][number][0, position])
        near(layer["mhc"]["attention"], whole.aux["mhc_attn"][number][0, position])
        near(layer["mhc"]["experts"], whole.aux["mhc_ffn"][number][0, position])
        if spec.attention == "csa":
            chosen = whole.aux["chosen"][number][0, position]
            assert layer["entries"]["index"] == sorted(chosen[chosen >= 0].tolist())
        elif spec.attention == "hca":
            assert layer["entries"]["index"] == list(range((position + 1) // spec.ratio))
        else:
            assert layer["entries"] is None


@pytest.mark.parametrize("position", [0, 5, 150, LENGTH - 1])
def test_the_weights_are_those_that_made_the_attention_output(made, position):
    """Rows of the window and entries, times their weights, give the mean of o over the heads."""
    model, lens, whole = made
    found = lens.figures(TOKENS, position)
    for layer in found["layers"]:
        heads = layer["heads"]
        total = np.sum([heads["window"], heads["entries"], heads["sink"]], axis=0)
        np.testing.assert_allclose(total, 1, atol=1e-5)
        near(np.sum(layer["window"]["weight"]), np.mean(heads["window"]), 1e-3)
        # o is linear in the weights, and every head has the same keys: means over heads agree.
        number, first = layer["layer"], layer["window"]["first"]
        rows = whole.aux["kv"][number][0, first : position + 1]
        o = np.asarray(layer["window"]["weight"]) @ rows
        if layer["entries"] and layer["entries"]["index"]:
            entries = whole.aux["entries"][number][0][layer["entries"]["index"]]
            o = o + np.asarray(layer["entries"]["weight"]) @ entries
        near(o, whole.aux["o"][number][0, position].mean(axis=0), 2e-4)


def test_log_probabilities_of_a_token_and_of_what_follows(made):
    _, lens, whole = made
    logprobs = np.asarray(jax.nn.log_softmax(whole.logits[0], axis=-1))
    for position in (0, 1, 77, LENGTH - 1):
        found = lens.figures(TOKENS, position)
        top = np.sort(logprobs[position])[::-1][:5]
        near([each["logprob"] for each in found["next"]["top"]], top, 1e-4)
        if position == 0:
            assert found["before"] is None
            continue
        before = logprobs[position - 1]
        near(found["before"]["logprob"], before[TOKENS[position]], 1e-4)
        assert found["before"]["rank"] == 1 + (before > before[TOKENS[position]]).sum()
        near(found["before"]["entropy"], -(np.exp(before) * before).sum(), 1e-4)


def test_the_best_entry_left_out_scores_no_higher_than_those_chosen(made):
    _, lens, _ = made
    for layer in lens.figures(TOKENS, LENGTH - 1)["layers"]:
        if layer["kind"] == "csa":
            assert layer["entries"]["visible"] == LENGTH // 4
            assert layer["entries"]["best_left_out"] <= min(layer["entries"]["score"])


def test_a_model_without_streams_and_one_with_full_attention():
    for variant, position in (("ablated", 48), ("all_visible", 20)):
        model, params = tiny_model(variant)
        for layer in Lens(model, params, chunk=64).figures(TOKENS, position)["layers"]:
            heads = layer["heads"]
            total = np.sum([heads["window"], heads["entries"], heads["sink"]], axis=0)
            np.testing.assert_allclose(total, 1, atol=1e-5)
            assert (layer["mhc"] is None) == (model.config.hc_mult == 1)
            if layer["kind"] == "full":
                assert layer["window"] is None and layer["entries"]["index"] == list(range(21))


@pytest.mark.parametrize("position", [-1, LENGTH])
def test_a_position_that_is_none(made, position):
    with pytest.raises(InputError, match="position"):
        made[1].figures(TOKENS, position)


def test_ids_out_of_range(made):
    with pytest.raises(InputError):
        made[1].figures([0, 331], 0)


def near(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)
