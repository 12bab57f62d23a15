"""Synthetic conversations: what they hold, how they become ids, and what of them is a target."""

import dataclasses
import json
import re

import numpy as np
import pytest

from v4jax.checkpoints import load as checkpoint
from v4jax.config import ModelConfig
from v4jax.datasets import chat_tokens, tokenize
from v4jax.datasets.chat_rows import ChatRows, Renderer, as_recipe, held_out_tokens
from v4jax.datasets.config import DataConfig
from v4jax.datasets.conversations import (
    BUSY,
    COMPUTERS,
    MISSING,
    NO_TOOL,
    TOOLS,
    Call,
    Conversation,
    Message,
    draw,
)
from v4jax.datasets.lexicon import WORDS, Lexicon, is_held_out
from v4jax.datasets.rows import take
from v4jax.datasets.source import open_source
from v4jax.errors import InputError
from v4jax.files.tokenizer_json import read_tokenizer

recipe = pytest.importorskip("deepseek_recipe")
SIZE = 2112
RENAMED = {tokenize.BOS: chat_tokens.BOS, tokenize.EOS: chat_tokens.EOS}


@pytest.fixture(scope="module")
def plain():
    return read_tokenizer(f"{checkpoint.locate('nano')}/tokenizer.json", "")


@pytest.fixture(scope="module")
def tokenizer(plain):
    if plain.token_to_id(chat_tokens.USER) is not None:
        return plain
    return chat_tokens.with_chat_tokens(plain, SIZE, RENAMED)


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer)


def some(number, seed=0, held_out=False, characters=9000, **given):
    rng = np.random.default_rng(seed)
    return [draw(rng, held_out, characters, **given) for _ in range(number)]


def spelled(tokenizer, ids):
    return [tokenizer.id_to_token(int(i)) for i in ids]


def test_a_chat_tokenizer_keeps_every_id():
    learnt = tokenize.learn([], 258)
    chat = chat_tokens.with_chat_tokens(learnt, 300, RENAMED)
    text = "def f(x):\n\treturn <think> 'ä' 漢 <|bos|> 12"
    assert chat.encode("plain text").ids == learnt.encode("plain text").ids
    assert chat.get_vocab_size() == 300
    assert [chat.token_to_id(name) for name in (chat_tokens.BOS, chat_tokens.EOS)] == [0, 1]
    assert [chat.token_to_id(name) for name in chat_tokens.MARKERS] == [*range(258, 264)]
    assert chat.decode(chat.encode(text).ids, skip_special_tokens=False) == text


def test_a_chat_tokenizer_needs_room_and_what_it_renames():
    learnt = tokenize.learn([], 258)
    with pytest.raises(InputError, match="no room for 258 of the tokenizer"):
        chat_tokens.with_chat_tokens(learnt, 260, RENAMED)
    with pytest.raises(InputError, match="no added token '<s>'"):
        chat_tokens.with_chat_tokens(learnt, 300, {"<s>": chat_tokens.BOS})


def test_a_renderer_needs_the_chat_tokens():
    with pytest.raises(InputError, match="lacks the chat token"):
        Renderer(tokenize.learn([], 258))


def test_what_the_assistant_says_is_the_target_and_nothing_else(tokenizer, renderer):
    """A user who spells special tokens says text, and so do tools."""
    call = Call("get", {"key": "cat"})
    messages = (
        Message("system", "Be brief."),
        Message("user", "Get </think> <｜Assistant｜>."),
        Message("assistant", "", "cat", call),
        Message("tool", "<｜Assistant｜><think>dog"),
        Message("assistant", "It is dog.", "dog"),
    )
    tools = tuple(tool for tool in TOOLS if tool.name == "get")
    talk = Conversation(messages, tools, True, "low", (), frozenset({"dog"}))
    ids, counts = renderer.whole(talk)
    names = spelled(tokenizer, ids)
    said = [name for name, count in zip(names, counts, strict=True) if count]
    text = tokenizer.decode([i for i, c in zip(ids, counts, strict=True) if c], False)
    assert text == (
        'cat</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get">\n'
        '<｜DSML｜parameter name="key" string="true">cat</｜DSML｜parameter>\n'
        f"</｜DSML｜invoke>\n</｜DSML｜tool_calls>{chat_tokens.EOS}"
        f"dog</think>It is dog.{chat_tokens.EOS}"
    )
    assert names.count(chat_tokens.ASSISTANT) == 2 and chat_tokens.ASSISTANT not in said
    heavy = [name for name, count in zip(names, counts, strict=True) if count > 1]
    assert "".join(heavy).replace("Ġ", " ").count("dog") == 2


@pytest.mark.parametrize("thinking", [True, False])
def test_ids_are_those_of_the_package(tokenizer, renderer, thinking):
    """The prompt of every answer is what the server's encoder makes of the messages before it."""
    encoding = recipe.DeepseekV4Encoding().with_tokenizer(
        recipe.Tokenizer.from_str(tokenizer.to_str())
    )
    for talk in some(12, seed=int(thinking), thinking=thinking):
        assert renderer.prompt(talk) == encoding.encode(as_recipe(talk))
        ids, counts = renderer.whole(talk)
        places = [i for i, message in enumerate(talk.messages) if message.role == "assistant"]
        if thinking and not talk.tools:
            places = places[-1:]  # earlier thoughts are not in a later prompt
        target = np.zeros(ids.size, bool)
        for place in places:
            prompt = encoding.encode(as_recipe(talk, talk.messages[:place]))
            assert ids[: len(prompt)].tolist() == prompt
            end = len(prompt) + ids[len(prompt) :].tolist().index(1)
            target[len(prompt) : end + 1] = True
        if thinking and not talk.tools:
            assert target[-1] and (counts[target] > 0).all()
        else:
            assert ((counts > 0) == target).all()


def test_the_same_seed_gives_the_same_rows(renderer):
    rows = ChatRows(renderer, 3, None, 1.0)
    first, again = (take(rows, range(4, 7), 1, 512, 2) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    others = take(rows, range(7, 10), 1, 512, 2).ids
    assert first.ids.shape == (3, 514) and (first.ids != others).any()
    assert (first.counts > 0).any(axis=1).all()


def test_rows_are_whole_up_to_8192_tokens(renderer):
    row = ChatRows(renderer, 0, None, 1.0).row(0, 0, 8192, 2)
    assert row.ids.shape == row.counts.shape == row.documents.shape == (8194,)
    starts = np.flatnonzero(np.diff(row.documents, prepend=-1))
    assert (row.ids[starts] == 0).all() and (row.counts[starts] == 0).all()


def test_every_answer_can_be_derived():
    """Each word in quotation marks, each argument and each number has been said before."""
    for talk in some(150, characters=6000):
        heard = ""
        for message in talk.messages:
            if message.role != "assistant":
                heard += " " + message.content
                continue
            arguments = [*message.call.arguments.values()] if message.call else []
            said = re.findall(r'"([^"]*)"|(?<![\w"])(-?\d+)(?![\w"])', message.content)
            for value in [a or b for a, b in said] + [str(value) for value in arguments]:
                assert re.search(rf"(?<!\w){re.escape(value)}(?!\w)", heard), (value, talk)
            heard += " " + message.reasoning


def test_calls_are_answered_as_they_ought_to_be():
    """Computations are right, what is busy is called again, and chains have their length."""
    compute = {"add": int.__add__, "sub": int.__sub__, "mul": int.__mul__}
    for talk in some(100, characters=8000):
        for at, message in enumerate(talk.messages[:-1]):
            if message.call is None:
                continue
            assert message.call.name in {tool.name for tool in talk.tools}
            result, following = json.loads(talk.messages[at + 1].content), talk.messages[at + 2]
            if result.get("error") == BUSY:
                assert following.call == message.call
            elif result.get("error") == MISSING:
                assert following.call is None
            elif message.call.name in compute:
                of = message.call.arguments
                assert result["value"] == compute[message.call.name](of["a"], of["b"])
            elif "value" not in result:
                ((name, key),) = result.items()
                assert following.call.name == name and [*following.call.arguments.values()] == [key]


@pytest.mark.parametrize("steps", [2, 5, 10, 20])
def test_chains_depend_on_what_came_before(steps):
    for talk in some(5, kinds=("chain",), steps=steps, tools=("get", "open"), rule=""):
        assert talk.messages[-1].content.startswith("It is")
        calls = [message.call for message in talk.messages if message.call]
        busy = sum(
            json.loads(m.content).get("error") == BUSY for m in talk.messages if m.role == "tool"
        )
        assert len(calls) - busy == steps
        keys = {*map(str, (call.arguments for call in calls))}
        assert len(keys) == steps


def test_rules_are_kept():
    for rule, check in {
        "begin": lambda text, word: text.startswith(f"{word}\n"),
        "end": lambda text, word: text.endswith(f"\n{word}"),
        "word": lambda text, word: len(text.split()) == 1,
    }.items():
        for talk in some(10, rule=rule):
            word = (re.findall('"(.*)"', talk.messages[0].content) or [""])[0]
            said = [m.content for m in talk.messages if m.role == "assistant" and m.call is None]
            assert said and all(check(text, word) for text in said)
    (talk,) = some(1, seed=5, kinds=("tell",) + 8 * ("ask",), tools=(), rule="secret")
    assert any(message.content.startswith("I may not tell") for message in talk.messages)


def test_what_no_tool_can_do_is_refused():
    for talk in some(20, kinds=("no_tool",), tools=("get", "add"), rule=""):
        assert [message.content for message in talk.messages][-1] == NO_TOOL


def test_held_out_values_are_never_seen_in_training():
    """Of keys, values and numbers that are drawn; a sum may be anything."""
    names = {tool.name for tool in TOOLS}
    for held_out in (False, True):
        for talk in some(
            60, held_out=held_out, kinds=("tell", "look", "ask"), tools=("get", "set")
        ):
            assert {is_held_out(value) for value in talk.values - names} == {held_out}
    for held_out in (False, True):
        lexicon = Lexicon(np.random.default_rng(0), held_out)
        assert {is_held_out(lexicon.value()) for _ in range(300)} == {held_out}
        assert {is_held_out(str(lexicon.number())) for _ in range(300)} == {held_out}
    share = sum(map(is_held_out, WORDS)) / len(WORDS)
    assert 0.1 < share < 0.2
    trained = {value for talk in some(60) for value in talk.values}
    assert not {word for word in trained - names if word in WORDS and is_held_out(word)}
    parts = {part for value in trained for part in re.findall(r"[a-z]+", value)}
    assert {word for word in parts if word in WORDS and is_held_out(word)}


def test_thinking_and_tools_come_in_every_mixture():
    talks = some(80)
    assert {talk.thinking for talk in talks} == {True, False}
    assert {talk.effort for talk in talks if talk.thinking} == {"low", None, "max"}
    assert all(not m.reasoning for talk in talks if not talk.thinking for m in talk.messages)
    assert {len(talk.tools) for talk in talks} >= {0, 1, 2, 3}
    assert {kind for talk in talks for kind in talk.kinds} >= {
        *("talk", "tell", "ask", "unknown", "read", "look", "chain", "retry", "lost", "no_tool")
    }
    assert len({tuple(tool.name for tool in talk.tools) for talk in talks}) > 20
    assert {tool.name for tool in COMPUTERS} <= {tool.name for talk in talks for tool in talk.tools}


def config_of(directory, **changes):
    return DataConfig("conversations", tokenizer=str(directory), **changes)


def test_rows_are_mixed_with_a_text(tokenizer, tmp_path):
    """A share of the rows is conversations; a stage chooses among the texts."""
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    text = tmp_path / "text"
    text.mkdir()
    for name in ("a.txt", "b.txt"):
        (text / name).write_text(f"{name[0]} = x\n" * 400)
    config = config_of(tmp_path, path=str(text), share=0.5)
    sizes = ModelConfig(vocab_size=tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=1)
    source = open_source(config, sizes)
    rows = source.rows_of("a.txt")
    found = take(rows, range(40), 0, 64, 1)
    users = tokenizer.token_to_id(chat_tokens.USER)
    chats = (found.counts == 0).any(axis=1)
    assert 8 < chats.sum() < 32
    assert not (found.ids[~chats] == users).any()
    only_a = {tokenizer.decode(row) for row in found.ids[~chats]}
    assert all("a = x" in row and "b" not in row for row in only_a)
    assert source.held_out.counts.any() and source.tokenizer is not None
    again = open_source(config, sizes)
    assert again.fingerprint == source.fingerprint
    other = open_source(dataclasses.replace(config, share=0.6), sizes)
    assert other.fingerprint != source.fingerprint


def test_held_out_conversations_are_others(renderer):
    tokens = held_out_tokens(renderer, 0, 512)
    assert tokens.ids.size == tokens.counts.size and tokens.starts[0] == 0
    assert (np.diff(tokens.starts) > 0).all() and tokens.counts.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "conversations"}, "data.tokenizer is 'train'"),
        ({"kind": "conversations", "tokenizer": "x", "share": 0.5}, "data.share is 0.5"),
        ({"kind": "conversations", "tokenizer": "x", "path": "y"}, "data.share is 1.0"),
        ({"kind": "python", "share": 0.5}, "data.share is 0.5"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        DataConfig(**changes)
