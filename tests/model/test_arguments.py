"""`model.apply`, `init_cache` and `rollback` refuse what they cannot mean, in a sentence."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.tiny import drawn, tiny_config
from v4jax.config import CSA, WINDOW
from v4jax.errors import InputError
from v4jax.model import cache
from v4jax.model.transformer import Transformer

MODEL = Transformer(tiny_config(layers=(WINDOW, CSA)))
TOKENS = np.arange(12).reshape(2, 6)
CHOICE = np.zeros((2, 6, 2), np.int32)


def refused(message, tokens=TOKENS, **options):
    """Nothing is computed: the check stands before the model, which has no variables here."""
    with pytest.raises(InputError, match=message):
        MODEL.apply({}, tokens, **options)


@pytest.mark.parametrize(
    "tokens, message",
    [
        (
            TOKENS[0],
            r"tokens has shape \[6\]; expected \[batch, length\]; a single .* tokens\[None\]",
        ),
        (TOKENS[None], r"tokens has shape \[1, 2, 6\]; expected \[batch, length\]"),
        (TOKENS.astype(np.float32), "tokens has type float32; expected whole token ids"),
        (TOKENS > 3, "tokens has type bool; expected whole token ids"),
        (TOKENS[:0], "tokens has no rows"),
        (TOKENS + 330, r"tokens\[0, 1\] is 331; expected 0 to 330, the model's vocabulary"),
        (TOKENS - 1, r"tokens\[0, 0\] is -1; expected 0 to 330"),
        (TOKENS + (1 << 32), r"tokens\[0, 0\] is 4294967296; expected 0 to 330"),
        (jnp.asarray(TOKENS) * 100, r"tokens\[0, 4\] is 400; expected 0 to 330"),
        ([[1, 2], [3]], "tokens is a list that makes no array; .* pad them and give `lengths`"),
        ("text", r"tokens has shape \[\]"),
        (None, "tokens is a NoneType that makes no array"),
    ],
)
def test_tokens(tokens, message):
    refused(message, tokens)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lengths": [3, 7]}, r"lengths\[1\] is 7; expected 0 to 6, the tokens of a row"),
        ({"lengths": [-1, 6]}, r"lengths\[0\] is -1; expected 0 to 6"),
        ({"lengths": [3]}, r"lengths has shape \[1\]; expected \[2\], \[batch\]"),
        ({"lengths": 3}, r"lengths has shape \[\]; expected \[2\]"),
        ({"lengths": [3.0, 2.0]}, "lengths has type float64; expected whole numbers"),
        ({"segment_ids": [0, 0]}, r"segment_ids has shape \[2\]; expected \[2, 6\]"),
        ({"segment_ids": TOKENS.T}, r"segment_ids has shape \[6, 2\]; expected \[2, 6\]"),
        ({"segment_ids": TOKENS / 2}, "segment_ids has type float64; expected whole numbers"),
        ({"aux": "streams"}, r"aux is 'streams'; expected a tuple of names, \('streams',\)"),
        ({"cache": {}}, "cache has type dict; expected what model.init_cache made"),
    ],
)
def test_other_arguments(options, message):
    refused(message, **options)


@pytest.mark.parametrize(
    "replay, message",
    [
        ([CHOICE], "replay is of list; expected a dict with some of"),
        ({"experts": {0: CHOICE}}, r"replay is of \['experts'\]; expected a dict with some of"),
        ({"chosen": CHOICE}, "replay of chosen has type ndarray; expected a dict of layer"),
        ({"chosen": {0: CHOICE}}, r"replay of chosen names layer 0; .* choose so are \[1\]"),
        ({"router_experts": {3: CHOICE}}, r"experts names layer 3; .* are \[0, 1, 2\]"),
        ({"router_experts": {"0": CHOICE}}, "replay of router_experts names layer 0; "),
        (
            {"chosen": {1: CHOICE[:, :4]}},
            r"layer 1 has shape \[2, 4, 2\]; expected \[2, 6, choices",
        ),
        (
            {"chosen": {1: CHOICE[:, :, 0]}},
            r"layer 1 has shape \[2, 6\]; expected \[2, 6, choices\]",
        ),
        ({"chosen": {1: CHOICE + 0.5}}, "in layer 1 has type float64; expected whole indices"),
        ({"chosen": {1: CHOICE + 1}}, r"layer 1\[0, 0, 0\] is 1; expected -1 to 0, the entries"),
        ({"router_experts": {0: CHOICE - 1}}, r"\[0, 0, 0\] is -1; expected 0 to 5, the experts"),
    ],
)
def test_replay(replay, message):
    refused(message, replay=replay)


def test_a_cache_of_other_layers():
    other = Transformer(tiny_config()).init_cache(2, 16)
    refused("the cache has layers layers_0, layers_1, layers_2 and the model", cache=other)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"batch": 0}, "cache batch is 0; expected 1 or more"),
        ({"batch": 1.0}, "cache batch is 1.0; expected 1 or more, a whole number"),
        ({"max_length": 0}, "cache max_length is 0; expected 1 or more"),
        ({"max_length": -4}, "cache max_length is -4; expected 1 or more"),
        ({"max_length": 5000}, "5000, beyond the model's max_position_embeddings 4096"),
        ({"rollback": -1}, "cache rollback is -1; expected 0 or more, a whole number"),
        ({"rollback": None}, "cache rollback is None; expected 0 or more"),
    ],
)
def test_init_cache(sizes, message):
    # Unwrapped: in tests annotations are checked first.
    check = inspect.unwrap(cache.check_sizes)
    with pytest.raises(InputError, match=message):
        check(MODEL.config, **({"batch": 2, "max_length": 16, "rollback": 0} | sizes))


def test_init_cache_checks_first():
    with pytest.raises(InputError, match="cache rollback is -1"):
        MODEL.init_cache(2, 16, rollback=-1)


@pytest.mark.parametrize("count", [1.5, [1, 0, 0], [[1, 1]]])
def test_rollback(count):
    with pytest.raises(InputError, match=r"rollback got .*; expected whole numbers, one or \[2\]"):
        MODEL.init_cache(2, 16, rollback=2).rollback(np.asarray(count))


def test_traced_values_add_nothing_to_a_program():
    """Values inside a program are not checked, shapes are."""
    variables = MODEL.abstract_variables()

    def call(variables, tokens, lengths):
        return MODEL.apply(variables, tokens, lengths=lengths).logits

    arguments = jax.ShapeDtypeStruct((2, 6), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    jax.eval_shape(call, variables, *arguments)
    with pytest.raises(InputError, match=r"lengths has shape \[3\]; expected \[2\]"):
        jax.eval_shape(call, variables, arguments[0], jax.ShapeDtypeStruct((3,), jnp.int32))


@pytest.mark.slow
def test_replay_of_every_choice_that_aux_returns():
    """MTP blocks' experts too: what aux returned is taken, and is what the second call uses."""
    model = Transformer(tiny_config(layers=(WINDOW,)))
    variables = drawn(model)
    first = model.apply(variables, TOKENS, mtp=True, aux=("router_experts",))
    other = {layer: 5 - x for layer, x in first.aux["router_experts"].items()}
    replay = {"router_experts": other}
    again = model.apply(variables, TOKENS, mtp=True, aux=("router_experts",), replay=replay)
    jax.tree.map(np.testing.assert_array_equal, again.aux["router_experts"], other)
