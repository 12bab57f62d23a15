import json
import os

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from v4jax.errors import InputError
from v4jax.infer.tokenizer import Tokenizer

TEXTS = ["def f(x):\n    return x", "naïve café", "日本語 🦊🦊", " leading space", "a\ufffdb", ""]


def save(tokenizer, directory, config=None):
    tokenizer.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer(directory)


def byte_level():
    """One token a byte, as in GPT-2 and DeepSeek without their merges, and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    return tokenizer


def byte_fallback():
    """Words where it knows them and bytes elsewhere; the first word's space is dropped."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "▁b", "c"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer, vocab


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(text, tmp_path):
    tokenizer = save(byte_level(), tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_joins_to_the_text(text, tmp_path):
    tokenizer = save(byte_level(), tmp_path)
    stream = tokenizer.stream()
    pieces = [stream.add(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.flush() == text


def test_a_stream_holds_a_character_back_until_it_is_whole(tmp_path):
    tokenizer = save(byte_level(), tmp_path)
    stream = tokenizer.stream()
    pieces = [stream.add(token) for token in tokenizer.encode("é🦊!")]
    assert pieces == ["", "é", "", "", "", "🦊", "!"]


def test_a_stream_shows_a_character_that_never_ends(tmp_path):
    tokenizer = save(byte_level(), tmp_path)
    stream = tokenizer.stream()
    fox = tokenizer.encode("🦊")
    assert [stream.add(token) for token in fox[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_any_bytes_stream_to_what_decode_gives(tmp_path):
    tokenizer = save(byte_level(), tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, 256, 30).tolist()
        stream = tokenizer.stream()
        assert "".join(map(stream.add, ids)) + stream.flush() == tokenizer.decode(ids)


def test_a_stream_keeps_spaces_that_the_start_of_a_text_drops(tmp_path):
    tokenizer, vocab = byte_fallback()
    tokenizer = save(tokenizer, tmp_path)
    ids = [vocab[piece] for piece in ("▁a", "▁b", "<0xC3>", "<0xA9>", "c", "▁a")]
    stream = tokenizer.stream()
    assert [stream.add(token) for token in ids] == ["a", " b", "", "é", "c", " a"]
    assert tokenizer.decode(ids) == "a béc a"


def test_special_tokens_are_no_text(tmp_path):
    tokenizer = save(byte_level(), tmp_path)
    ids = [256, *tokenizer.encode("é"), 257]
    stream = tokenizer.stream()
    assert tokenizer.decode(ids) == "é"
    assert "".join(map(stream.add, ids)) + stream.flush() == "é"


@pytest.mark.parametrize("token", ["<bos>", {"content": "<bos>", "lstrip": False}])
def test_the_first_token_that_the_config_asks_for(token, tmp_path):
    tokenizer = save(byte_level(), tmp_path, {"add_bos_token": True, "bos_token": token})
    plain = save(byte_level(), tmp_path, {"add_bos_token": False, "bos_token": token}).encode("ab")
    assert tokenizer.encode("ab") == [256, *plain]
    assert tokenizer.encode("<bos>ab", special_tokens=True) == [256, *plain]
    assert tokenizer.encode("<bos>ab")[0] == 256 and 256 not in tokenizer.encode("<bos>ab")[1:]
    assert tokenizer.encode("") == [256]


def test_a_missing_tokenizer_names_the_way_round(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer at .*tokenizer.json.*--prompt_ids"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "Nonsense"}}'])
def test_a_broken_tokenizer_is_named(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer.json: cannot be read as a tokenizer"):
        Tokenizer(tmp_path)


def test_a_broken_tokenizer_config_is_named(tmp_path):
    save(byte_level(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config.json: not valid JSON"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        [],
        "x",
        7,
        None,
        {"add_bos_token": "yes"},
        {"add_bos_token": 1},
        {"add_bos_token": True, "bos_token": ["<bos>"]},
        {"add_bos_token": True, "bos_token": {"text": "<bos>"}},
        {"add_bos_token": True, "bos_token": {"content": None}},
        {"add_bos_token": True, "bos_token": {"content": "\ud83d"}},
        {"add_bos_token": True, "bos_token": "x" * 10**5},
    ],
)
def test_a_tokenizer_config_of_the_wrong_kind_is_named(config, tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="tokenizer_config.json.*(expected|half of)") as caught:
        Tokenizer(tmp_path)
    assert len(str(caught.value)) < 600
    (tmp_path / "tokenizer_config.json").write_text('{"a": ' * 10**5)
    with pytest.raises(InputError, match="tokenizer_config.json: is JSON nested deeper"):
        Tokenizer(tmp_path)


def test_special_tokens_spelt_out_are_text_unless_asked_otherwise(tmp_path):
    tokenizer = save(byte_level(), tmp_path)
    text = "a<eos>b<bos>"
    assert tokenizer.encode(text, special_tokens=True) == [64, 257, 65, 256]
    assert max(tokenizer.encode(text)) < 256
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_pipe_in_place_of_a_tokenizer(name, tmp_path):
    save(byte_level(), tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: is a pipe; expected a regular file"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("config", [{}, {"bos_token": None}, {"bos_token": "<nobody>"}])
def test_a_first_token_that_is_not_there_is_named(config, tmp_path):
    with pytest.raises(InputError, match="sets add_bos_token with the bos_token"):
        save(byte_level(), tmp_path, config | {"add_bos_token": True})


def test_text_that_is_not_unicode_is_named(tmp_path):
    tokenizer = save(byte_level(), tmp_path)
    with pytest.raises(InputError, match="is not valid Unicode"):
        tokenizer.encode("a\udcff")
