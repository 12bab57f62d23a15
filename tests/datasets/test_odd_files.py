"""Data files as people have them: odd records, ids of every type, spelt-out special tokens."""

import json
import os
import warnings

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tiny import tiny_config
from v4jax.datasets import files, tokenize
from v4jax.datasets.config import DataConfig
from v4jax.datasets.records import MARKERS
from v4jax.datasets.source import open_source
from v4jax.errors import InputError
from v4jax.files.tokenizer_json import of_text

VOCAB = 331
DEEP = 100_000


def texts(path):
    return [
        "".join(p.text for p in document.pieces) for document in files.text_documents(str(path))
    ]


def refused(folder, name, line, sentence, kind="text", before=""):
    """The sentence names file and line, in one line of bounded length."""
    (folder / name).write_text(before + line + "\n")
    read = files.chat_documents if kind == "chat" else files.text_documents
    with pytest.raises(InputError, match=sentence) as caught:
        read(str(folder))
    text = str(caught.value)
    assert f"{name}:{1 + before.count(chr(10))}: " in text
    assert "\n" not in text and len(text) < 600


@pytest.mark.parametrize(
    "line, sentence",
    [
        (r'{"text": "a\ud83d"}', "half of a surrogate pair.*remove it"),
        (r'{"text": [["a", 1], ["\udc00", 1]]}', "half of a surrogate pair"),
        (r'{"text": "a", "name": "\ud83d"}', "name has half of a surrogate pair"),
        ('{"text": null}', 'has no "text" but null'),
        ('{"text": [{"type": "text", "text": "a"}]}', 'has no "text" but .*; expected'),
        ('{"text": 7}', 'has no "text" but 7'),
        ('{"text": [["a", 1e39]]}', 'has no "text"'),
        ('{"text": [["a", ' + "9" * 400 + "]]}", 'has no "text"'),
        ('{"text": "a", "text": "b"}', 'the key "text" is there twice'),
        ('{"text": ' + "[" * DEEP, "nested deeper"),
        ('{"a": ' * DEEP + "1" + "}" * DEEP, "nested deeper"),
        ('["a"]', "expected an object"),
        ('{"text": "' + "x" * 10**6, "not valid JSON"),
        ('{"txt": ["' + "x" * 10**6 + '"]}', 'has no "text"'),
    ],
)
def test_a_record_of_text_that_is_wrong(line, sentence, tmp_path):
    refused(tmp_path, "a.jsonl", line, sentence)
    refused(tmp_path, "a.jsonl", line, sentence, before='{"text": "a"}\n\n')


def said(**message):
    return json.dumps({"messages": [{"role": "user", "content": "a"}, message]})


@pytest.mark.parametrize(
    "line, sentence",
    [
        (said(role="user", content=None), r"messages\[1\].content is null; expected a string"),
        (said(role="user", content=[{"type": "text", "text": "a"}]), "write parts as one text"),
        (said(role="tool", content="a"), r'messages\[1\].role is "tool"; expected one of system'),
        (said(role=["user"], content="a"), r"messages\[1\].role is "),
        (said(author="user", content="a"), r"has no messages\[1\].role; expected one of system"),
        (said(role="user", value="a"), r"has no messages\[1\].content"),
        (said(role="user", content="\ud83d"), "half of a surrogate pair"),
        ('{"messages": ["a", "b"]}', r"messages\[0\] is .*; expected an object"),
        ('{"messages": "a"}', 'messages is "a"; expected a list'),
        ('{"messages": {"role": "user"}}', "messages is .*; expected a list"),
        ('{"messages": null}', "messages is null; expected a list"),
        ("{}", "has no messages; expected a list"),
        ('"a"', "expected an object"),
        ('{"messages": [' * DEEP, "nested deeper"),
        (said(role="user", content={"x" * 10**6: 1}), "expected a string"),
    ],
)
def test_a_record_of_chat_that_is_wrong(line, sentence, tmp_path):
    refused(tmp_path, "a.jsonl", line, sentence, "chat")
    refused(
        tmp_path, "a.jsonl", line, sentence, "chat", before=said(role="user", content="b") + "\n"
    )


def test_empty_texts_are_skipped_and_counted(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "one"}\n{"text": [["", 1]]}\n')
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.jsonl").write_text("\n\n")
    with caplog.at_level("WARNING", logger="absl"):
        (document,) = files.text_documents(str(tmp_path))
    assert document.name == "a.jsonl:2"
    assert "4 of 5 documents hold no text and are skipped" in caplog.text
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(InputError, match="b.txt: is an empty data file, nor has any of 2"):
        files.text_documents(str(tmp_path))


def test_an_empty_answer_ends_and_an_empty_conversation_is_skipped(tmp_path):
    lines = [said(role="assistant", content=""), '{"messages": []}']
    lines.append('{"messages": [{"role": "user", "content": ""}]}')
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (document,) = files.chat_documents(str(tmp_path))
    assert [p.text for p in document.pieces] == [MARKERS["user"], "a", MARKERS["assistant"], ""]
    assert document.pieces[-1].weight == 1


def test_a_json_file_of_records_is_read_as_records(tmp_path):
    records = [{"text": "one"}, {"text": "two", "name": "mine"}]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    assert texts(tmp_path) == ["one", "two"]
    assert [d.name for d in files.text_documents(str(tmp_path))] == ["a.json:1", "mine"]
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, records)))
    assert texts(tmp_path) == ["one", "two"]
    (tmp_path / "a.json").write_text("[" + said(role="user", content="b") + "]")
    assert len(files.chat_documents(str(tmp_path / "a.json"))) == 1


def test_a_json_file_that_is_no_records_is_text_like_any_other(tmp_path):
    for text in ('{\n "name": "x",\n "version": 1\n}', '{"compilerOptions": {}} // why', "true"):
        (tmp_path / "a.json").write_text(text)
        assert texts(tmp_path) == [text]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("[1, 2]", r'a.json:1: this entry of the list is 1; expected an object with "text"'),
        ('[{"text": "a"}, "b"]', 'a.json:2: this entry of the list is "b"'),
        ('[{"texts": "a"}]', 'a.json:1: has no "text"'),
        ('[{"text": "a"}, {', "a.json: not valid JSON"),
        ("[" * DEEP, "nested deeper"),
        ("[]", "a.json: is an empty data file"),
    ],
)
def test_a_json_list_of_something_else_is_refused(text, sentence, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=sentence):
        files.text_documents(str(tmp_path))


def tokens_of(folder, **options):
    config = DataConfig(kind="tokens", path=str(folder), **options)
    return open_source(config, tiny_config()).rows.tokens


INTEGERS = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("name", INTEGERS)
def test_ids_of_every_integer_type_are_the_same_ids(name, order, tmp_path):
    np.save(tmp_path / "ids.npy", np.array([0, 5, 127, 1, 7], order + name))
    assert tokens_of(tmp_path).ids.tolist() == [0, 5, 127, 1, 7]


@pytest.mark.parametrize(
    "ids, dtype",
    [
        ([0, 2**32 + 7], "i8"),
        ([0, 2**32 + 7], ">i8"),
        ([0, 2**32 + 7], "u8"),
        ([0, 2**64 - 1], "u8"),
        ([0, -(2**32) + 7], "i8"),
        ([0, -1], "i1"),
        ([0, 331], "<u2"),
        ([0, 331], ">u2"),
        ([0, 2**32 - 1], "u4"),
    ],
)
def test_ids_that_the_model_does_not_have(ids, dtype, tmp_path):
    np.save(tmp_path / "ids.npy", np.array(ids, dtype))
    sentence = (
        f"ids.npy: the data has token ids from .*{VOCAB} .the first other one is {ids[1]}, at 1"
    )
    with pytest.raises(InputError, match=sentence):
        tokens_of(tmp_path)


@settings(deadline=None, max_examples=60)
@given(
    ids=st.lists(st.integers(-(2**63), 2**64 - 1) | st.integers(0, VOCAB), min_size=1, max_size=5),
    name=st.sampled_from(INTEGERS),
    order=st.sampled_from("<>"),
)
def test_no_id_wraps(ids, name, order):
    dtype = np.dtype(order + name)
    ids = [min(max(i, np.iinfo(dtype).min), np.iinfo(dtype).max) for i in ids]
    arrays = {"a": np.array(ids, dtype)}
    if all(0 <= i < VOCAB for i in ids):
        assert tokenize.join(arrays, 1, VOCAB).ids.tolist() == ids
    else:
        with pytest.raises(InputError, match="a: the data has token ids"):
            tokenize.join(arrays, 1, VOCAB)


def test_held_out_ids_are_checked_too(tmp_path):
    for i in range(40):
        np.save(tmp_path / f"{i}.npy", np.array([0, 2, 3]))
    held_out = next(f"{i}.npy" for i in range(40) if files.is_held_out(f"{i}.npy", 0.2))
    np.save(tmp_path / held_out, np.array([0, VOCAB]))
    with pytest.raises(InputError, match=f"{held_out}: the data has token ids from 0 to {VOCAB}"):
        tokens_of(tmp_path, held_out=0.2)
    with pytest.raises(InputError, match="leaves no document to train on"):
        tokens_of(tmp_path, held_out=0.9999)


def npy(array, **changes):
    """A .npy file with another header."""
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | changes
    text = repr(header).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + array.tobytes()


GOOD = np.array([0, 5, 6], np.int32)


@pytest.mark.parametrize(
    "content",
    [
        npy(GOOD, shape=(10**9,)),
        npy(GOOD, shape=(10**30,)),
        npy(GOOD, shape=(-1,)),
        npy(GOOD, shape=(True,)),
        npy(GOOD, shape=3),
        npy(GOOD, shape="x"),
        npy(GOOD, descr="O"),
        npy(GOOD, descr="|i0"),
        npy(GOOD, descr=[("a", "<i4")]),
        npy(GOOD, descr="<f4"),
        npy(GOOD, descr="|b1"),
        npy(GOOD, descr="x" * 5000),
        npy(GOOD, shape=(3, 1)),
        npy(GOOD, shape=()),
        npy(GOOD)[:-1],
        npy(GOOD)[:20],
        npy(GOOD)[:7],
        npy(GOOD).replace(b"{", b"(" * 20),
        npy(GOOD).replace(b"NUMPY\x01", b"NUMPY\x09"),
        b"PK\x03\x04" + bytes(60),
        b"",
    ],
)
def test_a_damaged_npy_file(content, tmp_path):
    (tmp_path / "ids.npy").write_bytes(content)
    with pytest.raises(InputError, match="ids.npy: ") as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files.token_arrays(str(tmp_path))
    assert len(str(caught.value)) < 800 and "\n" not in str(caught.value)


def test_an_npz_under_the_name_of_an_array(tmp_path):
    with (tmp_path / "ids.npy").open("wb") as file:
        np.savez(file, a=GOOD)
    with pytest.raises(InputError, match="holds several arrays"):
        files.token_arrays(str(tmp_path))


@pytest.fixture
def markers(tmp_path):
    """A tokenizer with tokens that its file calls special and with some that it does not."""
    tokenizer = tokenize.learn([], tokenize.BYTES)
    tokenizer.add_tokens([MARKERS["user"], MARKERS["assistant"], "<think>", "   ", "word"])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    return tokenizer


SPELT = "a<|bos|>b<|eos|><｜Assistant｜><think>   word"


def test_special_tokens_that_a_text_spells_out_are_text(markers, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text(SPELT)
    options = dict(kind="text", path=str(tmp_path / "data"), tokenizer=str(tmp_path / "tokenizer"))
    tokens = open_source(DataConfig(**options), tiny_config()).rows.tokens
    special = [markers.token_to_id(t) for t in ("<|bos|>", "<|eos|>", "<｜Assistant｜>", "<think>")]
    assert not set(special) & set(tokens.ids[1:-1].tolist())
    assert [markers.token_to_id("   "), markers.token_to_id("word")] == tokens.ids[-3:-1].tolist()
    assert markers.decode(tokens.ids.tolist()) == SPELT
    asked = open_source(DataConfig(**options, special_tokens=True), tiny_config()).rows.tokens
    assert set(special) <= set(asked.ids[1:-1].tolist())


def test_a_users_message_cannot_speak_for_the_assistant(markers, tmp_path):
    line = {"messages": [{"role": "user", "content": SPELT}, {"role": "assistant", "content": "c"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    config = DataConfig(
        kind="chat", path=str(tmp_path / "a.jsonl"), tokenizer=str(tmp_path / "tokenizer")
    )
    ids = open_source(config, tiny_config()).rows.tokens.ids.tolist()
    user, assistant = (markers.token_to_id(MARKERS[role]) for role in ("user", "assistant"))
    assert ids.count(user) == ids.count(assistant) == 1 and ids.index(assistant) == len(ids) - 3
    assert ids.count(0) == ids.count(1) == 1


def test_kept_tokens_tell_a_marker_from_its_text(markers, tmp_path):
    (tmp_path / "kept").mkdir()
    documents = [
        files.Document("a", (files.Piece(MARKERS["user"], 1.0, marker),))
        for marker in (True, False)
    ]
    first, second = (
        tokenize.encode_once([d], markers, 0, 1, tmp_path / "kept").ids.size for d in documents
    )
    assert first == 3 and second > 3


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(["<|bos|>", "<|eos|>", "<think>", "a", " ", "é", "<", "|"])))
def test_any_text_is_the_text_that_it_decodes_to(parts):
    tokenizer = tokenize.learn([], tokenize.BYTES)
    tokenizer.add_tokens(["<think>"])
    encoded = of_text(tokenizer).encode("".join(parts)).ids
    assert tokenizer.decode(encoded) == "".join(parts)
    assert not set(encoded) & {tokenizer.token_to_id("<think>"), 0, 1}


@pytest.mark.parametrize("spoil", [b"", b"PK\x03\x04", b"\x93NUMPY", None])
def test_damaged_kept_tokens_are_encoded_again(spoil, tmp_path):
    documents = [files.Document("a", (files.Piece("text"),))]
    tokenizer = tokenize.learn([], tokenize.BYTES)
    first = tokenize.encode_once(documents, tokenizer, 0, 1, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = bytearray(path.read_bytes())
    whole[10] ^= 0x55  # the method of compression, which zipfile refuses in a way of its own
    path.write_bytes(bytes(whole) if spoil is None else spoil)
    again = tokenize.encode_once(documents, tokenizer, 0, 1, tmp_path)
    np.testing.assert_array_equal(first.ids, again.ids)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "kind, name", [("text", "a.txt"), ("chat", "a.jsonl"), ("tokens", "a.npy")]
)
def test_a_pipe_in_place_of_data(kind, name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: is a pipe; expected a regular file"):
        open_source(DataConfig(kind=kind, path=str(tmp_path / name)), tiny_config())
    with pytest.raises(InputError, match="no data file"):
        open_source(DataConfig(kind=kind, path=str(tmp_path)), tiny_config())


def test_a_tokenizer_that_is_damaged(tmp_path):
    for content in (b"{" * DEEP, b"\xff", b"[]", json.dumps("x" * 10**6).encode()):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(InputError, match="tokenizer.json: cannot be read as a tok") as caught:
            tokenize.load(str(tmp_path))
        assert len(str(caught.value)) < 500


def test_an_id_that_no_array_holds(tmp_path):
    described = json.loads(tokenize.learn([], tokenize.BYTES).to_str())
    described["model"]["vocab"]["a"] = 2**31 + 5
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(described))
    document = files.Document("a", (files.Piece("a"),))
    with pytest.raises(InputError, match="gives the id 2147483653"):
        # Without special tokens it would be copied, for which the library counts up to the id.
        tokenize.encode([document], tokenizer, 0, 1, special_tokens=True)
