"""generation_config.json: its end tokens and how its authors draw are defaults; flags win."""

import dataclasses
import json

import pytest

from tests.cli.test_generate import continuation, directory, run  # noqa: F401  (fixtures)
from v4jax.errors import InputError
from v4jax.infer.generation_config import GenerationDefaults, end_ids, read_generation_config
from v4jax.infer.tokenizer import Tokenizer
from v4jax.named_configs import get_config


def write(path, **keys):
    (path / "generation_config.json").write_text(json.dumps(keys))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {}),
        ({"eos_token_id": 7, "transformers_version": "5"}, {"eos_token_id": (7,)}),
        ({"eos_token_id": [7, 9], "pad_token_id": 0}, {"eos_token_id": (7, 9)}),
        ({"eos_token_id": None, "temperature": 0.5}, {}),  # does not draw
        ({"do_sample": False, "temperature": 0.5}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 40, "min_p": 0.1},
            {"temperature": 0.6, "top_p": 0.95, "top_k": 40, "min_p": 0.1},
        ),
        ({"max_new_tokens": 5, "max_length": 9}, {"max_new_tokens": 5}),
    ],
)
def test_what_the_file_says(tmp_path, keys, expected):
    write(tmp_path, **keys)
    assert read_generation_config(tmp_path) == GenerationDefaults(**expected)


def test_no_file_says_nothing(tmp_path):
    assert read_generation_config(tmp_path) == GenerationDefaults()


@pytest.mark.parametrize(
    "keys",
    [
        {"eos_token_id": "7"},
        {"eos_token_id": [7, None]},
        {"eos_token_id": -1},
        {"do_sample": 1},
        {"do_sample": True, "temperature": "hot"},
        {"do_sample": True, "temperature": -1},
        {"do_sample": True, "top_p": 0},
        {"do_sample": True, "top_k": 1.5},
        {"max_new_tokens": 0},
    ],
)
def test_values_that_cannot_be(tmp_path, keys):
    write(tmp_path, **keys)
    with pytest.raises(InputError, match="generation_config.json"):
        read_generation_config(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"eos_token_id": NaN}', "[" * 100_000])
def test_damage_is_a_sentence(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match="generation_config.json"):
        read_generation_config(tmp_path)


def test_flags_win(run, directory):  # noqa: F811
    command = ["--format=json", "--prompt=ab", "--max_new_tokens=6"]
    tokens = continuation(Tokenizer(directory), "ab", max_new_tokens=6)
    write(directory, eos_token_id=tokens[3], do_sample=True, temperature=9.0, max_new_tokens=2)
    found = json.loads(run(*command, "--temperature=0")[1])
    assert found["tokens"] == [tokens[: tokens.index(tokens[3])]]
    assert json.loads(run(*command, "--temperature=0", "--stop_ids=")[1])["tokens"] == [tokens]
    drawn = json.loads(run(*command, "--stop_ids=")[1])["tokens"]
    wanted = continuation(Tokenizer(directory), "ab", max_new_tokens=6, temperature=9.0)
    assert drawn == [wanted] != [tokens]
    assert len(json.loads(run("--format=json", "--prompt=ab", "--stop_ids=")[1])["tokens"][0]) == 2


def test_the_ids_that_end_an_answer(tmp_path):
    for own, expected in ((None, ()), (0, (0,)), (3, (3,)), ((3, 4), (3, 4))):
        config = dataclasses.replace(get_config("flash"), eos_token_id=own)
        assert end_ids(tmp_path, config) == expected
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert end_ids(tmp_path, config) == (5, 6)
