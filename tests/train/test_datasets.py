"""Rows of text and tasks: what they hold, their order, processes, held-out documents, bad files."""

import dataclasses
import json

import numpy as np
import pytest

from configs import train_tiny
from tests.support.tiny import tiny_config
from v4jax.datasets import files, rows, synthetic, tokenize
from v4jax.datasets.config import DataConfig
from v4jax.datasets.hash_table import hash_table
from v4jax.datasets.source import open_source
from v4jax.errors import InputError


def stream(documents=7, length=31, counts=True):
    """Tokens whose ids say where they stand."""
    ids = np.arange(documents * length, dtype=np.int32)
    starts = np.arange(documents) * length
    return tokenize.Tokens(ids, starts, np.full(ids.size, counts, np.float32))


def test_rows_are_slices_with_their_documents():
    source = rows.TextRows(stream(), seed=0)
    row = source.row(3, stage=0, length=40, ahead=2)
    np.testing.assert_array_equal(row.ids, row.ids[0] + np.arange(42))
    np.testing.assert_array_equal(row.documents, row.ids // 31 + 1)


def test_a_pass_takes_every_row_once_and_the_next_cuts_elsewhere():
    source = rows.TextRows(stream(40), seed=1)
    per_pass = (40 * 31 - 15 - 1) // 16
    passes = [
        [int(source.row(n + p * per_pass, 0, 16, 1).ids[0]) for n in range(per_pass)]
        for p in range(2)
    ]
    for firsts in passes:
        assert len(set(firsts)) == per_pass and len({f % 16 for f in firsts}) == 1
        assert firsts != sorted(firsts)
    assert passes[0][0] % 16 != passes[1][0] % 16


def test_the_same_number_gives_the_same_row_and_stages_differ():
    def firsts(seed, stage):
        source = rows.TextRows(stream(40), seed)
        return [int(source.row(n, stage, 16, 1).ids[0]) for n in range(20)]

    assert firsts(1, 0) == firsts(1, 0)
    assert firsts(1, 0) != firsts(1, 1) and firsts(1, 0) != firsts(2, 0)


def test_too_little_text():
    with pytest.raises(
        InputError, match="217 tokens and no complete row of 200: expected at least"
    ):
        rows.TextRows(stream(), 0).check(200, 2)


@pytest.mark.parametrize("kind", synthetic.TASKS)
@pytest.mark.parametrize("length", [32, 100, 1111])
def test_synthetic_rows(kind, length):
    source = rows.SyntheticRows(kind, 331, seed=3)
    row = source.row(9, 0, length, 2)
    assert row.ids.shape == row.counts.shape == (length + 2,) and row.counts.any()
    again, other = source.row(9, 0, length, 2), source.row(10, 0, length, 2)
    np.testing.assert_array_equal(row.ids, again.ids)
    assert (row.ids != other.ids).any()
    assert row.ids.min() >= 0 and row.ids.max() < 331


def test_every_answer_was_told():
    rng = np.random.default_rng(0)
    ids, counts = synthetic.copy(rng, 200, 331)
    first = int(np.argmax(ids == synthetic.SEPARATOR))
    np.testing.assert_array_equal(ids[first + 1 : 2 * first], ids[1:first])
    assert not counts[: first + 1].any() and counts[first + 1 : 2 * first].all()
    ids, counts = synthetic.recall(rng, 200, 331)
    told = dict(zip(ids[1 : 2 * 50 : 2].tolist(), ids[2 : 2 * 50 + 1 : 2].tolist(), strict=True))
    for at in np.flatnonzero(counts):
        assert ids[at - 2] == synthetic.ASK and told[int(ids[at - 1])] == ids[at]
    ids, counts = synthetic.needle(rng, 2000, 331)
    for at in np.flatnonzero((ids == synthetic.ASK) & (np.arange(2000) >= 2000 - 21))[:3]:
        question = ids[at + 1 : at + 7].tolist()
        places = [i for i in range(1979) if ids[i] == synthetic.KEY]
        assert any(ids[i + 1 : i + 7].tolist() == question for i in places)
    assert counts.sum() == 3 * synthetic.VALUE_LENGTH


def test_a_hash_table_is_even_on_a_text_of_zipfs_law():
    count = (1e6 / np.arange(2, 2002) ** 1.0).astype(np.int64)
    table = hash_table(count, 8, 2, seed=0)
    assert (np.sort(table, 1)[:, 1:] != np.sort(table, 1)[:, :-1]).all()
    load = np.zeros(8)
    np.add.at(load, table, np.repeat(count[:, None], 2, 1))
    assert np.abs(load / load.mean() - 1).max() < 0.1
    even_on_ids = np.arange(2000)[:, None] * 2 + np.arange(2)
    naive = np.zeros(8)
    np.add.at(naive, even_on_ids % 8, np.repeat(count[:, None], 2, 1))
    assert np.abs(naive / naive.mean() - 1).max() > 0.1  # what the frequencies are for


def test_a_hash_table_is_even_on_the_training_text():
    run = train_tiny.get_config()
    data, model = dataclasses.replace(run.data, documents=30), run.model
    count_V = open_source(data, model).counts_V
    k = model.num_experts_per_tok
    table = hash_table(count_V, model.n_routed_experts, k, seed=0)
    load = np.bincount(table.reshape(-1), np.repeat(count_V, k))
    print("load over its mean", load / load.mean())
    assert np.abs(load / load.mean() - 1).max() < 0.1


def test_a_line_of_json_may_hold_any_separator_but_a_newline(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two\x85"}\n{"text": "three"}\n')
    texts = [d.pieces[0][0] for d in files.text_documents(str(tmp_path))]
    assert texts == ["one\u2028two\x85", "three"]


def test_text_files_become_documents_of_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("häh")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    source = open_source(
        DataConfig(kind="text", path=str(tmp_path), tokenizer="bytes"), tiny_config()
    )
    tokens = source.rows.tokens
    texts = [
        source.tokenizer.decode(part.tolist()) for part in np.split(tokens.ids, tokens.starts[1:])
    ]
    assert texts == ["häh", "one", "two"]
    assert tokens.ids[0] == 0 and tokens.ids[tokens.starts[1] - 1] == 1
    assert source.counts_V.sum() == tokens.ids.size


def test_a_line_may_have_a_name_and_say_which_of_its_pieces_are_targets(tmp_path):
    line = {"name": "mine", "text": [["ab", 0], ["cd", 2.5], ["e", False]]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    config = DataConfig(kind="text", path=str(tmp_path), tokenizer="bytes")
    source = open_source(config, tiny_config())
    assert source.names == ("mine",)
    ids, _, counts = source.rows.tokens
    assert source.tokenizer.decode(ids.tolist()) == "abcde"
    assert source.tokenizer.decode(ids[counts > 0].tolist()) == "cd" and counts.max() == 2.5
    (tmp_path / "a.jsonl").write_text('{"name": 7, "text": "ab"}')
    assert [d.name for d in files.text_documents(str(tmp_path))] == ["a.jsonl:1"]
    for wrong in ([], [["a", -1]], [["a", None]], ["a"], [["", True]]):
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": wrong}) + "\n")
        with pytest.raises(InputError, match='a.jsonl:1: has no "text"'):
            files.text_documents(str(tmp_path))


def test_only_what_the_assistant_says_is_a_target(tmp_path):
    line = {
        "messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cde"}]
    }
    (tmp_path / "chat.jsonl").write_text(json.dumps(line) + "\n")
    config = DataConfig(kind="chat", path=str(tmp_path / "*.jsonl"), tokenizer="bytes")
    source = open_source(config, tiny_config())
    ids, _, counts = source.rows.tokens
    assert source.tokenizer.decode(ids[counts > 0].tolist()) == "cde"
    assert counts.sum() == 4 and ids[-1] == 1  # the end is a target too


def test_arrays_of_ids_are_cut_at_their_ends(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([0, 5, 6, 1, 0, 7, 1, 0, 8], np.uint16))
    source = open_source(DataConfig(kind="tokens", path=str(tmp_path)), tiny_config())
    assert source.rows.tokens.starts.tolist() == [0, 4, 7]
    other = open_source(DataConfig(kind="tokens", path=str(tmp_path), seed=1), tiny_config())
    assert source.fingerprint != other.fingerprint


def test_names_of_documents_do_not_say_where_their_directory_lies(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place / "part").mkdir(parents=True)
        (tmp_path / place / "part" / "a.py").write_text("x = 1")
        (tmp_path / place / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    here, there = (files.text_documents(str(tmp_path / place)) for place in ("here", "there"))
    assert here == there
    assert [document.name for document in here] == ["b.jsonl:1", "b.jsonl:2", "part/a.py"]


def test_held_out_documents_are_chosen_by_name():
    names = [f"file {i}" for i in range(400)]
    chosen = [files.is_held_out(name, 0.2) for name in names]
    assert 50 < sum(chosen) < 110
    assert not any(files.is_held_out(name, 0.0) for name in names)


@pytest.mark.parametrize(
    "content, options, sentence",
    [
        (b"", {}, "is an empty data file"),
        (b"\xff\xfe", {}, "is not UTF-8 text"),
        (None, {}, "no data file there"),
        (b"{}\n", {"name": "a.jsonl"}, 'a.jsonl:1: has no "text"'),
        (b"[\n", {"name": "a.jsonl"}, "a.jsonl:1: not valid JSON"),
        (b"{}\n", {"name": "a.jsonl", "kind": "chat"}, "a.jsonl:1: has no messages; expected a"),
        (b"junk", {"name": "a.npy", "kind": "tokens"}, "is no .npy file"),
    ],
)
def test_bad_files(content, options, sentence, tmp_path):
    if content is not None:
        (tmp_path / options.get("name", "a.txt")).write_bytes(content)
    config = DataConfig(kind=options.get("kind", "text"), path=str(tmp_path), tokenizer="bytes")
    with pytest.raises(InputError, match=sentence):
        open_source(config, tiny_config())


def test_ids_beyond_the_vocabulary(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([0, 331]))
    with pytest.raises(InputError, match="token ids from 0 to 331; expected ids from 0 to below"):
        open_source(DataConfig(kind="tokens", path=str(tmp_path)), tiny_config())


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"kind": "video"}, "data.kind is 'video'"),
        ({"kind": "text"}, "needs a file"),
        ({"kind": "copy", "path": "x"}, "reads no files"),
        ({"held_out": 1.5}, "data.held_out is 1.5"),
        ({"tokenizer_size": 100}, "expected at least 258"),
    ],
)
def test_bad_configs(options, sentence):
    with pytest.raises(InputError, match=sentence):
        DataConfig(**options)


def test_a_stage_may_read_some_documents_only(tmp_path):
    for name, text in (("a/one.txt", "ab"), ("b/two.txt", "cde"), ("a/three.txt", "f")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    source = open_source(
        DataConfig(kind="text", path=str(tmp_path), tokenizer="bytes"), tiny_config()
    )
    tokens = source.rows_of("^a/").tokens
    parts = np.split(tokens.ids, tokens.starts[1:])
    assert [source.tokenizer.decode(part.tolist()) for part in parts] == ["ab", "f"]
    assert tokens.counts.size == tokens.ids.size
    assert source.rows_of(None) is source.rows
    with pytest.raises(InputError, match="documents is '\\^c/', which no document's name matches"):
        source.rows_of("^c/")
    with pytest.raises(InputError, match="none has one"):
        open_source(DataConfig("recall"), tiny_config()).rows_of("a")
