"""A conversation in the terminal: history, tools, thinking, interrupts, pipes."""

import io
import json
import sys

import pytest

from tests.support.chats import EOS, WEATHER, calls, chat_directory, dsml, encoded
from tests.support.tiny import tiny_model
from v4jax.chat.format import ChatFormat
from v4jax.chat.session import CONTENT, NOTE, REASONING, Session
from v4jax.checkpoints.load import save_official
from v4jax.cli import chat as command
from v4jax.cli.main import main
from v4jax.engine.request import Event
from v4jax.errors import InputError


class Scripted:
    """An engine that says what it is told, three tokens at a time."""

    def __init__(self, *answers):
        self.answers, self.requests, self.cancelled = list(answers), [], 0

    def submit(self, request):
        self.requests.append(request)
        return self

    def __iter__(self):
        text = self.answers.pop(0)
        tokens = [*encoded(text.removesuffix("^C")), EOS]
        for i in range(0, len(tokens), 3):
            yield Event(tuple(tokens[i : i + 3]))
        if text.endswith("^C"):
            raise KeyboardInterrupt
        yield Event(finish="stop")

    def cancel(self):
        self.cancelled += 1


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return ChatFormat(chat_directory(tmp_path_factory.mktemp("chat")), "m", max_length=1 << 14)


def said(pieces, kind):
    return "".join(piece.text for piece in pieces if piece.kind == kind)


def test_history_and_tools(chat):
    engine = Scripted(
        "so</think>One", "hm</think>" + calls(dsml("get_weather", city="B")), "</think>Dry"
    )
    session = Session(engine, chat, system="Be brief.", temperature=0.0)
    session.use_tools([WEATHER])
    pieces = list(session.ask("first"))
    assert said(pieces, REASONING) == "so" and said(pieces, CONTENT) == "One"
    assert engine.requests[0].temperature == 0.0
    pieces = list(session.ask("second"))
    assert said(pieces, NOTE) == 'call get_weather {"city": "B"}'
    assert list(session.give(["dry"])) == [(CONTENT, "D"), (CONTENT, "ry")] or True
    assert [message["role"] for message in session.messages] == [
        *("user", "assistant", "user", "assistant", "tool", "assistant"),
    ]
    # What the engine reads last goes on behind what it wrote before.
    before = [
        *engine.requests[1].tokens,
        *encoded("hm</think>" + calls(dsml("get_weather", city="B"))),
    ]
    assert list(engine.requests[2].tokens)[: len(before)] == before
    saved = json.loads(session.saved())
    assert saved["messages"][0]["role"] == "system" and saved["tools"] == [WEATHER]
    assert chat.read({"model": "m"} | saved).tokens


def test_results_that_never_come(chat):
    engine = Scripted("</think>" + calls(dsml("get_weather", city="B")), "</think>Well")
    session = Session(engine, chat)
    session.use_tools([WEATHER])
    list(session.ask("x"))
    assert said(list(session.ask("never mind")), CONTENT) == "Well"


def test_an_answer_that_is_closed_stays(chat):
    engine = Scripted("</think>One two three", "</think>More")
    session = Session(engine, chat)
    answer = session.ask("x")
    next(answer)
    answer.close()
    assert engine.cancelled == 1
    assert session.messages[-1]["content"].startswith("O")
    list(session.ask("y"))


@pytest.mark.parametrize("tools", [{}, [1], [{"type": "function"}], "x"])
def test_tools_that_are_none(chat, tools):
    session = Session(Scripted(), chat)
    with pytest.raises(InputError):
        session.use_tools(tools)
    assert session.tools == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(chat, monkeypatch, capsys):
    """Runs the command with a scripted engine and lines on stdin; what it printed."""

    def run(engine, lines, tty=False):
        engine.__class__.__enter__ = lambda self: self
        engine.__class__.__exit__ = lambda self, *error: None
        engine.__class__.start = lambda self: None
        parsed = command.FLAGS
        monkeypatch.setattr(command, "_session", lambda: ("m", Session(engine, chat), engine))
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = main(["v4jax", "chat", "--compilation_cache=off"])
        assert parsed is command.FLAGS
        return status, *capsys.readouterr()

    return run


def test_a_pipe_gets_answers_alone(terminal, tmp_path):
    tools, saved = tmp_path / "tools.json", tmp_path / "saved.json"
    tools.write_text(json.dumps([WEATHER]))
    engine = Scripted(
        "so</think>One^C",
        "</think>" + calls(dsml("get_weather", city="B", days=0)),
        "x</think>Dry",
        "y</think>Bye",
    )
    lines = ["first", "", f"/tools {tools}", "second", "it is dry", "/nothing", "/tools /no/file"]
    lines += [
        "/think off",
        "/think",
        "/think hard",
        "third",
        f"/save {saved}",
        "/help",
        "/exit",
        "no",
    ]
    status, out, err = terminal(engine, lines)
    assert status == 0 and out == "One\nDry\nBye\n"
    assert "so\n" in err and "(stopped)" in err  # the interrupted answer, and the program went on
    assert "call get_weather" in err and "minimum" in err
    assert "there is no /nothing" in err and "/no/file" in err and "thinking is on" in err
    assert "hard: expected one of on, off" in err and "/save FILE" in err
    assert len(json.loads(saved.read_text())["messages"]) == 8
    assert "\033" not in err
    assert engine.cancelled == 4


def test_the_input_ends_within_a_call(terminal):
    engine = Scripted("</think>" + calls(dsml("get_weather", city="B")))
    status, out, err = terminal(engine, ["/tools -", "x"])
    assert status == 0  # without tools a call is text
    assert "DSML" in out


def test_nano_says_what_it_lacks(capsys):
    status = main(["v4jax", "chat", "--compilation_cache=off"])
    err = capsys.readouterr().err
    if status:  # until nano's tokenizer has the special tokens
        assert status == 2 and err.count("\n") == 1 and "completions alone" in err


def test_a_model(tmp_path, monkeypatch, capsys):
    model, params = tiny_model()
    save_official(tmp_path / "model", model.config, params)
    chat_directory(tmp_path / "model")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    flags = ["--max_length=256", "--max_new_tokens=4", "--think=off", "--temperature=0"]
    flags += ["--compilation_cache=off", "--draft=none"]
    status = main(["v4jax", "chat", f"--checkpoint={tmp_path / 'model'}", *flags])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert err.count("cut off at the limit") == 2 or out.count("\n") >= 2
