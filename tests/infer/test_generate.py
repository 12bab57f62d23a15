import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import compiling
from tests.support.tiny import drawn_wide
from tests.support.toy_model import ToyModel, toy_config
from v4jax.config import CSA, LayerSpec, with_hash_routing
from v4jax.errors import InputError
from v4jax.infer.generate import _bucket, _prefill_chunks, generate
from v4jax.model.transformer import Transformer

MODEL = ToyModel()
PARAMS = jax.jit(MODEL.init)(jax.random.key(3))
# A prompt of one token, and prompts that end inside and at the edge of windows and blocks.
PROMPTS = [
    [5],
    list(range(40)),
    [90, 3, 3, 17],
    np.random.default_rng(0).integers(0, 97, 17).tolist(),
]
# Lengths that no other test uses, so that its programs cannot have been compiled before.
UNSEEN_VOCAB = 89


def greedy_by_full_forward(model, params, prompt, count):
    """The most likely token of the whole sequence read anew, `count` times.

    The sequence is padded to 64 tokens, so that one program serves: the model is causal.
    """
    ids_BT, length = np.zeros((1, 64), np.int32), len(prompt)
    ids_BT[0, :length] = prompt
    for at in range(length, length + count):
        ids_BT[0, at] = np.argmax(full_forward(model, params, ids_BT)[0, at - 1])
    return ids_BT[0, length : length + count].tolist()


def run(prompts, params=PARAMS, **options):
    """Generation with the toy model, with one length of cache so that few programs are compiled."""
    return generate(MODEL, params, prompts, **({"max_length": 64} | options))


@functools.partial(jax.jit, static_argnums=0)
def full_forward(model, params, tokens_BT):
    return model.apply(params, tokens_BT).logits


@pytest.fixture
def compiled_programs():
    """Counts the programs that XLA compiles while the test runs."""
    with compiling.counted() as names:
        yield names


def test_greedy_equals_the_argmax_of_the_full_sequence():
    result = run(PROMPTS, max_new_tokens=12)
    assert result.tokens == [greedy_by_full_forward(MODEL, PARAMS, row, 12) for row in PROMPTS]
    assert result.finish_reason == ["length"] * 4
    assert result.prompt_tokens == [1, 40, 4, 17]
    assert result.time_to_first_token > 0
    assert result.tokens_per_second > 0
    assert result.compile_seconds > 0


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_row_does_not_depend_on_the_other_rows(temperature):
    together = run(PROMPTS, max_new_tokens=9, temperature=temperature).tokens
    others = [PROMPTS[0], [1, 2], PROMPTS[2], [8] * 30]
    changed = run(others, max_new_tokens=9, temperature=temperature).tokens
    assert (changed[0], changed[2]) == (together[0], together[2])
    alone = run(PROMPTS[:1], max_new_tokens=9, temperature=temperature).tokens
    assert alone == together[:1]


@pytest.mark.parametrize("chunk", [1, 3, 16, 39, 40, 41])
def test_prefill_in_chunks_equals_prefill_at_once(chunk):
    whole = run(PROMPTS, max_new_tokens=5)
    assert run(PROMPTS, max_new_tokens=5, prefill_chunk=chunk).tokens == whole.tokens


def test_the_same_seed_draws_the_same_tokens():
    draws = [
        run(PROMPTS, max_new_tokens=6, temperature=1.0, seed=seed).tokens for seed in (7, 7, 8)
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_top_k_of_one_is_greedy():
    greedy = run(PROMPTS, max_new_tokens=6).tokens
    drawn = run(PROMPTS, max_new_tokens=6, temperature=3.0, top_k=1).tokens
    assert drawn == greedy


def test_a_stop_token_ends_its_row_only_and_is_left_out():
    free = run(PROMPTS, max_new_tokens=12).tokens
    stop = free[1][4]
    result = run(PROMPTS, max_new_tokens=12, stop_ids={stop})
    for row, tokens in enumerate(free):
        cut = tokens.index(stop) if stop in tokens else 12
        assert result.tokens[row] == tokens[:cut]
        assert result.finish_reason[row] == ("stop" if stop in tokens else "length")
    assert "stop" in result.finish_reason


def test_a_stop_token_at_once_leaves_nothing():
    first = run([[5]], max_new_tokens=1).tokens[0][0]
    result = run([[5]], max_new_tokens=8, stop_ids=first)
    assert result.tokens == [[]]
    assert result.finish_reason == ["stop"]
    assert result.tokens_per_second == 0.0


def test_on_token_sees_each_token_once_and_in_order():
    seen = []
    stop = run(PROMPTS, max_new_tokens=8).tokens[2][3]
    result = run(
        PROMPTS,
        max_new_tokens=8,
        stop_ids=[stop],
        on_token=lambda row, token: seen.append((row, token)),
    )
    for row, tokens in enumerate(result.tokens):
        assert [token for at, token in seen if at == row] == tokens
    assert all(type(number) is int for pair in seen for number in pair)


def test_an_error_in_on_token_comes_out():
    def fail(row, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(PROMPTS, max_new_tokens=4, on_token=fail)


@pytest.mark.parametrize(
    "prompts",
    [
        PROMPTS[3],
        [PROMPTS[3]],
        (tuple(PROMPTS[3]),),
        np.array(PROMPTS[3], np.int64),
        np.array([PROMPTS[3]], np.uint8),
        jnp.array(PROMPTS[3]),
        [jnp.array(PROMPTS[3])],
    ],
)
def test_prompts_in_every_form(prompts):
    expected = run([PROMPTS[3]], max_new_tokens=4).tokens
    assert run(prompts, max_new_tokens=4).tokens == expected


def test_one_token_is_made_by_the_prefill_alone():
    result = run(PROMPTS, max_new_tokens=1)
    assert [len(tokens) for tokens in result.tokens] == [1] * 4
    assert result.tokens_per_second == 0.0


def test_generation_fills_the_cache_to_its_last_place():
    result = run([[1] * 30], max_new_tokens=11, max_length=41)
    assert result.tokens == [greedy_by_full_forward(MODEL, PARAMS, [1] * 30, 11)]
    model = ToyModel(toy_config(max_position_embeddings=41))
    assert generate(model, PARAMS, [[1] * 30], max_new_tokens=11).tokens == result.tokens


def test_tensors_that_are_only_carried_along_are_left_alone():
    params = PARAMS | {"carried": {"mtp.0.main_proj.weight": object()}}
    expected = run([[4, 5]], max_new_tokens=3).tokens
    assert run([[4, 5]], params, max_new_tokens=3).tokens == expected


def test_weights_may_be_numpy_arrays():
    params = jax.tree.map(np.asarray, PARAMS)
    expected = run([[4, 5]], max_new_tokens=3).tokens
    assert run([[4, 5]], params, max_new_tokens=3).tokens == expected


def test_three_programs_are_compiled_once(compiled_programs):
    model = ToyModel(toy_config(vocab_size=UNSEEN_VOCAB))
    params = jax.jit(model.init)(jax.random.key(0))
    compiled_programs.clear()
    generate(model, params, [[1, 2], [3]], max_new_tokens=9)
    programs = ["jit(_decode)", "jit(_pick)", "jit(_prefill)"]
    assert sorted(name for name in compiled_programs if name in programs) == programs
    compiled_programs.clear()
    # Other lengths in the same bucket, other settings of the sampler, an equal model.
    again = ToyModel(toy_config(vocab_size=UNSEEN_VOCAB))
    generate(again, params, [[1, 2, 3], [3] * 9], max_new_tokens=7, temperature=0.7, top_p=0.9)
    generate(again, params, [[1, 2, 3], [3] * 9], max_new_tokens=3, top_k=4, min_p=0.1, seed=9)
    assert compiled_programs == []


def test_chunks_hold_each_token_once():
    prompts = [np.arange(1, 8), np.arange(1, 3), np.arange(1, 21)]
    chunks = _prefill_chunks(prompts, 8, 22)
    assert [tokens_BT.shape for tokens_BT, _ in chunks] == [(3, 8), (3, 8), (3, 6)]
    assert [lengths_B.tolist() for _, lengths_B in chunks] == [[7, 2, 8], [0, 0, 8], [0, 0, 4]]
    for row, prompt in enumerate(prompts):
        parts = [tokens_BT[row, : lengths_B[row]] for tokens_BT, lengths_B in chunks]
        np.testing.assert_array_equal(np.concatenate(parts), prompt)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 16), (16, 16), (17, 32), (200, 256), (256, 256), (257, 512), (513, 768), (2000, 2048)],
)
def test_lengths_are_rounded_up_to_a_few(length, expected):
    assert _bucket(length, 256) == expected


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there are no prompts"),
        ([[]], "prompt 0 is empty"),
        ([[1], []], "prompt 1 is empty"),
        ([[1], [2, 97]], r"token 1 of prompt 1 is 97; expected 0 to 96"),
        ([[-1]], r"token 0 of prompt 0 is -1; expected 0 to 96"),
        ([[2**40]], f"token 0 of prompt 0 is {2**40}"),
        ([[1.0, 2.0]], "prompt 0 has shape .* float64; expected a flat list of whole numbers"),
        ([[[1, 2]]], "prompt 0 has shape .*expected a flat list"),
        ([[1, [2]]], "prompt 0 has shape .*expected a flat list"),
        ([[1], None], "prompt 1 has shape .*expected a flat list"),
        ("def ", "prompts has type str; expected lists of token ids"),
        (["def "], "prompt 0 has shape .*expected a flat list"),
        (7, "prompts has type int; expected lists of token ids"),
        ({"text": [1, 2]}, "prompts has type dict; expected lists of token ids"),
        ({1, 2}, "prompts has type set; expected lists of token ids"),
        (b"def ", "prompts has type bytes; expected lists of token ids"),
        (None, "prompts has type NoneType; expected lists of token ids"),
        (np.int32(3), "prompts has type int32; expected lists of token ids"),
        (np.array(3), "prompts has type ndarray; expected lists of token ids"),
        ([{"role": "user"}], "prompt 0 has shape .*expected a flat list"),
    ],
)
def test_bad_prompts(prompts, message):
    with pytest.raises(InputError, match=message):
        generate(MODEL, PARAMS, prompts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected a whole number, 1 or more"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"seed": -1}, "seed is -1; expected a whole number, 0 to 4294967295"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": None}, "temperature is None; expected a number: leave it out .* 0.0"),
        ({"temperature": "0.7"}, "temperature is '0.7'; expected a number"),
        ({"top_p": None}, "top_p is None; expected a number: leave it out for the default, 1.0"),
        ({"top_k": None}, "top_k is None; expected a number"),
        ({"top_k": math.nan}, "top_k is nan"),
        ({"top_k": math.inf}, "top_k is inf"),
        ({"min_p": [0.1]}, r"min_p is \[0.1\]; expected a number"),
        ({"min_p": True}, "min_p is True; expected a number"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -3}, "top_k is -3"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"stop_ids": [97]}, "a stop id is 97; expected a whole number, 0 to 96"),
        ({"stop_ids": ["x"]}, "a stop id is x"),
        ({"max_length": 5000}, "max_length is 5000; expected at most .* 4096"),
        ({"max_length": 12}, "prompt 0 has 3 tokens .* 13 together; expected .* max_length = 12"),
        ({"max_new_tokens": 4094}, "expected at most max_position_embeddings = 4096"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(InputError, match=message):
        generate(MODEL, PARAMS, [[1, 2, 3]], **({"max_new_tokens": 10} | arguments))


def with_broken_embedding(token):
    embed = PARAMS["params"]["embed"].at[token].set(jnp.nan)
    return PARAMS | {"params": PARAMS["params"] | {"embed": embed}}


def test_logits_that_are_not_finite_are_reported_with_their_step():
    params = with_broken_embedding(run(PROMPTS, max_new_tokens=3).tokens[1][1])
    with pytest.raises(InputError, match="prompt 1 are not finite at new token 2"):
        run(PROMPTS, params, max_new_tokens=6)
    with pytest.raises(InputError, match="prompt 0 are not finite at new token 0"):
        run([[5]], with_broken_embedding(5), max_new_tokens=6)


def test_a_row_that_is_done_may_go_astray():
    free = run(PROMPTS, max_new_tokens=8).tokens
    elsewhere = {*sum(PROMPTS, []), *free[0], *free[2], *free[3]}
    stop = next(token for token in free[1] if token not in elsewhere)
    params = with_broken_embedding(stop)
    result = run(PROMPTS, params, max_new_tokens=8, stop_ids=stop)
    assert result.tokens == [free[0], free[1][: free[1].index(stop)], free[2], free[3]]


def test_the_result_cannot_be_changed():
    result = run([[5]], max_new_tokens=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.tokens = []


@pytest.fixture(scope="module")
def transformer():
    """Both kinds of compressed layer, with windows and blocks that a short text crosses often."""
    config = toy_config(
        layers=with_hash_routing((CSA, LayerSpec("hca", ratio=8)), 1),
        mtp_layers=(),
        sliding_window=8,
        index_topk=4,
    )
    model = Transformer(config, dtype="float32")
    return model, drawn_wide(model)


def test_the_model_generates_the_argmax_of_the_full_sequence(transformer, compiled_programs):
    """Prompts of unequal length in one batch, each beside itself alone."""
    model, params = transformer
    expected = [greedy_by_full_forward(model, params, prompt, 20) for prompt in PROMPTS]
    assert len({token for tokens in expected for token in tokens}) > 20
    compiled_programs.clear()
    # 16 tokens at a time: a row ends in each chunk, two rows within the first. The longest row
    # fills its cache.
    result = generate(model, params, PROMPTS, max_new_tokens=20, max_length=60, prefill_chunk=16)
    assert result.tokens == expected
    assert compiled_programs.count("jit(_decode)") == 1
    assert compiled_programs.count("jit(_prefill)") == 1
