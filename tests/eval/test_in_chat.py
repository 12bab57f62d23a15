"""A checkpoint with chat tokens, asked in this process: prompts are chats, calls are read."""

import json
from pathlib import Path

import pytest
import tokenizers

from tests.eval.targets import Caller
from tests.support import chats
from tests.support.servers import chat_nano
from v4jax.engine.request import Event, Result
from v4jax.errors import InputError
from v4jax.eval import mrcr, needle, ruler, tool_use
from v4jax.eval.dice import Dice
from v4jax.eval.engine_target import EngineTarget
from v4jax.eval.sample import Prompt, asked


class Stream:
    """Tokens one by one, as an engine's; `made` are those that were taken."""

    def __init__(self, request, tokens):
        self._tokens, self._most = tokens, request.max_new_tokens
        self.prompt, self.made, self.cancelled = request.tokens, [], False
        self._stop_ids = request.stop_ids
        self._finish = "length"

    def __iter__(self):
        for token in self._tokens[: self._most]:
            if token in self._stop_ids:
                self._finish = "stop"
                break
            self.made.append(token)
            yield Event(tokens=(token,))
        yield Event(finish=self._finish)

    def cancel(self):
        self.cancelled = True

    def result(self):
        return Result(
            prompt_tokens=len(self.prompt),
            tokens=self.made,
            text="not to be used",
            finish="cancelled" if self.cancelled else self._finish,
            seconds=0.25,
            first_token_seconds=0.125,
        )


class Scripted:
    """An engine that says what a function of the prompt's text says."""

    def __init__(self, says, directory):
        self._says, self.requests, self.streams = says, [], []
        self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))

    def submit(self, request):
        self.requests.append(request)
        text = self._tokenizer.decode(list(request.tokens), skip_special_tokens=False)
        self.streams.append(Stream(request, self.ids(self._says(text))))
        return self.streams[-1]

    def ids(self, text):
        """Special tokens that are spelled out are themselves."""
        return self._tokenizer.encode(text).ids

    def close(self):
        pass


class ScriptedTarget(EngineTarget):
    engine = property(lambda self: self._engine)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return chat_nano(Path(tmp_path_factory.mktemp("chat")))


@pytest.fixture
def target(directory):
    def made(says, **options):
        target = ScriptedTarget(str(directory), 4096, **options)
        target._engine = Scripted(says, directory)
        return target

    return made


END = "<｜end▁of▁sentence｜>"
HEADER = "<｜Assistant｜></think>"


def test_a_question_is_a_turn_and_its_answers_beginning_is_given(target):
    chat = target(lambda text: f"green.{END}more")
    assert chat.style == chat.identity["style"] == "chat"
    prompt = asked("What colour is it?", "It is ")
    answer = chat.ask(prompt, 16, seed=3)
    assert (answer.text, answer.finish) == ("green.", "stop")
    assert answer.output_tokens == len(chat._engine.ids("green."))
    (request,) = chat._engine.requests
    said = f"<｜begin▁of▁sentence｜><｜User｜>What colour is it?{HEADER}It is "
    assert list(request.tokens) == chat._engine.ids(said)
    assert chat.measure(prompt) == len(request.tokens) == answer.prompt_tokens
    assert request.temperature == 0 and request.max_new_tokens == 16
    assert chat._engine.ids(END)[0] in request.stop_ids


def test_texts_that_continue_stay_texts(target):
    chat = target(lambda text: "x")
    assert chat.ask(asked("def f(", continues=True), 1).text == "not to be used"
    (user,) = chat._engine.ids("<｜User｜>")
    assert user not in list(chat._engine.requests[0].tokens)
    assert target(lambda text: "x", style="plain").style == "plain"


def test_answers_end_at_stop_texts_and_at_their_length(target):
    chat = target(lambda text: "one\ntwo\nthree")
    answer = chat.ask(asked("q"), 16, stop=("\n",))
    assert (answer.text, answer.finish) == ("one", "stop") and chat._engine.streams[0].cancelled
    most = len(chat._engine.ids("one\ntw"))
    answer = chat.ask(asked("q"), most)
    assert "one\ntwo\nthree".startswith(answer.text) and len(answer.text) >= 5
    assert (answer.finish, answer.output_tokens, len(answer.times)) == ("length", most, most)


def says_calls(text):
    """`Caller` behind the chat format."""
    turns = text.split("<｜User｜>", 1)[1].split(HEADER)
    messages = [{"role": "user", "content": turns[0]}]
    for turn in turns[1:-1]:
        result = turn.split("<tool_result>")[-1].split("</tool_result>")[0]
        messages += [
            {"role": "assistant", "content": ""},
            {"role": "tool", "content": result},
        ]
    answer = Caller()(Prompt(tuple(messages)))
    if isinstance(answer, str):
        return answer + END
    if answer.text:
        return answer.text + END
    blocks = [chats.dsml(c["name"], **json.loads(c["arguments"])) for c in answer.calls]
    return chats.calls(*blocks) + END


def test_a_chain_of_calls_in_this_process(target):
    chat = target(says_calls)
    script = tool_use.chain(Dice("chat"), 3)
    record = tool_use.play(chat, script, 0.0, 0)
    assert record["score"] == record["exact_calls"] == record["in_order"] == 1.0
    assert record["turns"] == 4 and record["answer"] == script.final
    # Each turn begins with the one before, as it was sampled: the prefix cache has it.
    prompts = [list(each.tokens) for each in chat._engine.requests]
    for shorter, longer in zip(prompts[:-1], prompts[1:], strict=True):
        assert longer[: len(shorter)] == shorter


@pytest.mark.parametrize("task", [mrcr.task(2), needle.task("plain"), *ruler.tasks()[:2]])
def test_samples_fit_with_the_chats_own_tokens(task, target):
    chat = target(lambda text: END)
    length = 3900
    sample = task.make(0, 0, length, 0.5 if task.depths else None, chat.measure)
    assert length * 0.75 < chat.measure(sample.prompt) + sample.budget <= length
    chat.ask(sample.prompt, sample.budget, sample.stop, shared=sample.shared)
    (request,) = chat._engine.requests
    assert len(request.tokens) == chat.measure(sample.prompt)
    if sample.shared:
        text = sample.prompt.messages[0]["content"][: sample.shared]
        kept = max(request.keep_at)
        whole = len(chat._engine.ids(f"<｜begin▁of▁sentence｜><｜User｜>{text}"))
        assert whole - 2 <= kept <= whole  # the last token may have grown with what follows it
    if task.name == "mrcr_2":
        assert list(request.tokens).count(chat._engine.ids("<｜User｜>")[0]) >= 3


def test_a_form_is_enforced(target):
    chat = target(lambda text: "{}" + END)
    schema = {"type": "object"}
    chat.ask(Prompt(({"role": "user", "content": "q"},), schema=schema), 5)
    chat.ask(asked("q"), 5)
    assert [each.constraint is not None for each in chat._engine.requests] == [True, False]


def test_tools_that_cannot_be_are_one_sentence(target):
    chat = target(lambda text: END)
    bad = ({"type": "function", "function": {"name": "a b c"}},)
    with pytest.raises(InputError, match="a prompt is no chat: "):
        chat.ask(Prompt(({"role": "user", "content": "q"},), tools=bad), 5)


def test_a_checkpoint_without_chat_tokens_cannot():
    with pytest.raises(InputError, match="lacks the special tokens of a V4 chat"):
        EngineTarget("nano", 256, style="chat")
    assert EngineTarget("nano", 256).style == "facts"
