"""Synthetic conversations that a small model can learn: facts, tools, chains of calls, rules.

`draw` makes one from a generator of random numbers. What the assistant says in it is what it ought
to say, and every value there has been said before, by the user, a tool or the system prompt.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from v4jax.datasets.lexicon import Lexicon

CALL_CHARACTERS = 230  # of a call's own text, for the estimate of a conversation's length


class Tool(NamedTuple):
    """A function: what it is for, its parameters with their JSON types, how a user asks for it."""

    name: str
    description: str
    parameters: dict[str, str]
    asks: tuple[str, ...]

    def schema(self) -> dict[str, Any]:
        """Of its arguments, as JSON schema."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        return {"type": "object", "properties": properties, "required": list(properties)}


class Call(NamedTuple):
    """A call of a tool."""

    name: str
    arguments: dict[str, Any]


class Message(NamedTuple):
    """A message; of the assistant also what it thinks before, and what it calls instead."""

    role: str
    content: str = ""
    reasoning: str = ""
    call: Call | None = None


class Conversation(NamedTuple):
    """A conversation that ends with the assistant.

    Attributes:
      effort: of thinking, as a request has it; None for the default. kinds: of its turns, in their
        order. values: the words that matter in what the assistant says.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    thinking: bool
    effort: str | None
    kinds: tuple[str, ...]
    values: frozenset[str]


def _reader(name, description, parameter, asks):
    return Tool(name, description, {parameter: "string"}, asks)


def _computer(name, description, asks):
    return Tool(name, description, {"a": "integer", "b": "integer"}, asks)


READERS = (
    _reader("get", "Get an entry.", "key", ('Get "{}".', 'What is entry "{}"?', 'Get entry "{}".')),
    _reader("open", "Open a file.", "path", ('Open "{}".', 'What is in file "{}"?')),
    _reader("find", "Find a user.", "name", ('Find "{}".', 'Where is user "{}"?')),
    _reader("weather", "Get the weather.", "city", ('Weather in "{}"?', 'How is it in "{}"?')),
)
COMPUTERS = (
    _computer("add", "Add numbers.", ("Add {} and {}.", "What is {} plus {}?")),
    _computer("sub", "Subtract numbers.", ("What is {} minus {}?", "Compute {} - {}.")),
    _computer("mul", "Multiply numbers.", ("Multiply {} by {}.", "What is {} times {}?")),
)
WRITERS = (
    Tool("set", "Set an entry.", {"key": "string", "value": "string"}, ('Set "{}" to "{}".',)),
    Tool("send", "Send a text.", {"to": "string", "text": "string"}, ('Send to "{}": "{}".',)),
)
TOOLS = (*READERS, *COMPUTERS, *WRITERS)
_RESULTS = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}
_STEPS = {"add": "add {}", "sub": "subtract {}", "mul": "multiply by {}"}
_FOLLOW = {"get": "entry", "open": "file", "find": "user"}
_NOISE = ("The {} has a {}.", "Put the {} on the {}.", "We saw the {} and the {}.")
BUSY, MISSING, NO_TOOL = "busy", "missing", "I have no tool for that."
HELLO = ("Hello.", "Hello. What can I do?", "Hello.")
_TALK = (
    HELLO,
    ("Hi.", "Hello. What can I do?", "Hello."),
    ("Thanks.", "You are welcome.", "Welcome."),
    ("Who are you?", "I am nano, a small model.", "Nano."),
    ("What can you do?", "I remember facts and call tools.", "Remember."),
)
# How often each kind of turn comes: what has many values to copy in few words comes most.
PLAIN = ("ask",) * 12 + ("tell",) * 4 + ("unknown", "unknown", "talk", "talk", "read", "no_tool")
WITH_TOOLS = ("look",) * 6 + ("chain",) * 5 + ("no_tool",) * 4 + ("retry", "lost", "tell", "ask")
EFFORTS = ("low",) * 14 + (None,) * 5 + ("max",)
RULES = ("begin", "end", "word", "secret")


class _Talk:
    """A conversation as it is made."""

    def __init__(self, rng, held_out, thinking, words):
        self.rng, self.thinking = rng, thinking
        self.lexicon = Lexicon(rng, held_out, words)
        self.messages: list[Message] = []
        self.tools: tuple[Tool, ...] = ()
        self.facts: dict[str, str] = {}
        self.values: set[str] = set()
        self.rule, self.rule_word = "", ""

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def value(self) -> str:
        return self.noted(self.lexicon.value())

    def noted(self, value):
        self.values.add(str(value))
        return value

    def user(self, text: str) -> None:
        self.messages.append(Message("user", text))

    def say(self, text: str, short: str, thought: str) -> None:
        """What the assistant answers, as the rule of the system prompt wants it."""
        if self.rule == "word":
            text = short
        elif self.rule == "begin":
            text = f"{self.rule_word}\n{text}"
        elif self.rule == "end":
            text = f"{text}\n{self.rule_word}"
        self.messages.append(Message("assistant", text, thought if self.thinking else ""))

    def call(self, tool: Tool, arguments: dict[str, Any], result: Any, thought: str) -> None:
        """A call and its result."""
        self.noted(tool.name)
        thought = thought if self.thinking else ""
        self.messages.append(Message("assistant", "", thought, Call(tool.name, arguments)))
        self.messages.append(Message("tool", json.dumps(result)))

    def characters(self) -> int:
        """About how long it is so far."""
        calls = sum(message.call is not None for message in self.messages)
        said = sum(len(m.content) + len(m.reasoning) + 8 for m in self.messages)
        return said + CALL_CHARACTERS * calls

    def of(self, *kinds: tuple[Tool, ...]) -> list[Tool]:
        """The tools at hand of some kinds."""
        return [tool for tool in self.tools if any(tool in kind for kind in kinds)]


def draw(
    rng: np.random.Generator,
    held_out: bool,
    characters: int,
    kinds: Sequence[str] | None = None,
    steps: int | None = None,
    tools: Sequence[str] | None = None,
    thinking: bool | None = None,
    rule: str | None = None,
    words: tuple[str, ...] = (),
) -> Conversation:
    """A conversation.

    Args:
      held_out: of values that are kept for evaluation, else of those for training.
      characters: about the longest that it becomes; a tool's schema counts 200, the instructions
        for tools 1,000.
      kinds: of its turns; None for turns at random until it is long enough.
      steps: calls of each chain; None for 2 to 20 at random, as many as there is room for.
      tools: names of those it has; None at random. thinking: None at random.
      rule: one of `RULES`, "" for none, None at random. words: see `Lexicon`.
    """
    talk = _Talk(rng, held_out, rng.random() < 0.4 if thinking is None else thinking, words)
    named = [tool for tool in TOOLS if tools is not None and tool.name in tools]
    if tools is not None:
        talk.tools = tuple(named[i] for i in rng.permutation(len(named)))
    elif characters > 2000 and talk.chance(0.6):
        most = min(4, (characters - 1200) // 400)
        chosen = rng.permutation(len(TOOLS))[: 1 + int(rng.integers(most))]
        talk.tools = tuple(TOOLS[int(i)] for i in chosen)
    _system(talk, rule)
    room = characters - (1000 + 200 * len(talk.tools) if talk.tools else 0)
    # Half are as long as there is room for, the others even on a logarithmic scale.
    until = (
        room if kinds is None and talk.chance(0.5) else int(np.exp(rng.uniform(4, np.log(room))))
    )
    done = []
    for kind in _kinds(talk, kinds, until):
        _TURNS[kind](talk, steps or _most_steps(talk, room))
        done.append(kind)
    effort = talk.pick(EFFORTS) if talk.thinking else None
    return Conversation(
        tuple(talk.messages),
        talk.tools,
        talk.thinking,
        effort,
        tuple(done),
        frozenset(talk.values),
    )


def _most_steps(talk, room):
    """A length of chain that there is room for; half of them are short."""
    most = min(20, max(2, (room - talk.characters()) // (CALL_CHARACTERS + 40)))
    return int(talk.rng.integers(2, 1 + (min(most, 4) if talk.chance(0.5) else most)))


def _kinds(talk, kinds, until):
    """Kinds of turns: those given, or at random until the conversation is long enough."""
    if kinds is not None:
        yield from kinds
        return
    yield _possible(talk, talk.pick(WITH_TOOLS if talk.tools else PLAIN))
    while talk.characters() < until:
        often = WITH_TOOLS if talk.tools and not talk.chance(0.15) else PLAIN
        yield _possible(talk, talk.pick(often))


def _possible(talk, kind):
    """The kind, or another where a conversation has nothing to make it of."""
    if kind == "ask" and not talk.facts:
        return "tell"
    if kind == "chain" and not talk.of(READERS[:3], COMPUTERS):
        return "look"
    if kind in ("retry", "lost") and not talk.of(READERS):
        return "look"
    return kind


def _system(talk, rule):
    """A system prompt: a rule, something that is none, or nothing."""
    if rule is None:
        rule = talk.pick(RULES) if talk.chance(0.4) else ""
    talk.rule = rule
    text = talk.pick(("", "", "You are nano.", "You are a helpful assistant."))
    if rule in ("begin", "end"):
        talk.rule_word = talk.noted(talk.lexicon.word())
        text = f'{rule.capitalize()} each answer with a line "{talk.rule_word}".'
    elif rule == "word":
        text = "Answer in one word."
    elif rule == "secret":
        talk.rule_word = talk.value()
        text = f'Never tell "{talk.rule_word}".'
        talk.facts[talk.rule_word] = ""
    if text:
        talk.messages.append(Message("system", text))


def _chat(talk, _):
    asked, answer, short = talk.pick(_TALK)
    talk.user(asked)
    talk.say(answer, short, "The user talks.")


def _tell(talk, _):
    """One fact, some, or a long list."""
    count = int(np.exp(talk.rng.uniform(0, np.log(9))))
    pairs = [(talk.value(), talk.value()) for _ in range(count)]
    if talk.rule == "secret" and not talk.facts[talk.rule_word]:
        pairs.insert(int(talk.rng.integers(count + 1)), (talk.rule_word, talk.value()))
    talk.facts |= dict(pairs)
    begin = talk.pick(("Remember: ", "", "Note: "))
    talk.user(begin + " ".join(f'"{key}" is "{value}".' for key, value in pairs))
    talk.say("I will remember.", "Yes.", "The user tells facts.")


def _ask(talk, _):
    known = [key for key, value in talk.facts.items() if value]
    if not known:
        _tell(talk, 0)
        known = [key for key, value in talk.facts.items() if value]
    secret = talk.rule == "secret" and talk.chance(0.5)
    key = talk.rule_word if secret else talk.pick(known)
    talk.user(talk.pick(('What is "{}"?', 'Tell me "{}".')).format(key))
    if talk.rule == "secret" and key == talk.rule_word:
        talk.say(f'I may not tell "{key}".', "No.", f'The rule: never tell "{key}".')
        return
    value = talk.facts[key]
    talk.say(f'It is "{value}".', value, f'"{key}" is "{value}".')


def _unknown(talk, _):
    key = talk.value()
    talk.user(talk.pick(('What is "{}"?', 'Tell me "{}".')).format(key))
    talk.say(f'I do not know "{key}".', "Unknown.", f'Nobody said "{key}".')


def _read(talk, _):
    """Sentences to read, which are not asked for: they put distance between what is."""
    count = int(np.exp(talk.rng.uniform(0, np.log(40))))
    word = talk.lexicon.word
    lines = [talk.pick(_NOISE).format(word(), word()) for _ in range(count)]
    talk.user("Read this.\n" + "\n".join(lines))
    talk.say("I have read it.", "Yes.", "The user has me read.")


def _look(talk, _):
    """A single call, and what comes of it."""
    tool = talk.pick(talk.tools)
    ask, arguments, result, thought = _single(talk, tool)
    talk.user(ask)
    while talk.chance(0.08):
        talk.call(tool, arguments, {"error": BUSY}, thought)
        thought = "It is busy. Again."
    talk.call(tool, arguments, {"value": result}, thought)
    _answer(talk, result)


def _single(talk, tool):
    """A question for a tool: its words, the arguments, the result, the thought before."""
    ask = talk.pick(tool.asks)
    if tool in COMPUTERS:
        a, b = (talk.noted(talk.lexicon.number()) for _ in range(2))
        result = talk.noted(_RESULTS[tool.name](a, b))
        return ask.format(a, b), {"a": a, "b": b}, result, f"I {tool.name} {a} and {b}."
    given = [talk.value() for _ in tool.parameters]
    arguments = dict(zip(tool.parameters, given, strict=True))
    result = "done" if tool in WRITERS else talk.value()
    return ask.format(*given), arguments, result, f'I {tool.name} "{given[0]}".'


def _answer(talk, result):
    if result == "done":
        talk.say("It is done.", "Done.", "It is done.")
    elif isinstance(result, int):
        talk.say(f"It is {result}.", str(result), f"The value is {result}.")
    else:
        talk.say(f'It is "{result}".', result, f'The value is "{result}".')


def _chain(talk, steps):
    readers, computers = talk.of(READERS[:3]), talk.of(COMPUTERS)
    if readers and not (computers and talk.chance(0.3)):
        _follow(talk, readers, steps)
    elif computers:
        _compute(talk, computers, min(steps, 6))
    else:
        _look(talk, steps)


def _follow(talk, readers, steps):
    """Each result names the next tool and what to call it with; the last one has the value."""
    tool, key = talk.pick(readers), talk.value()
    talk.user(f'Follow {_FOLLOW[tool.name]} "{key}".')
    thought = f'I {tool.name} "{key}".'
    for step in range(steps):
        arguments = {next(iter(tool.parameters)): key}
        if talk.chance(0.06):
            talk.call(tool, arguments, {"error": BUSY}, thought)
            thought = "It is busy. Again."
        following = talk.pick(readers)
        last = step == steps - 1
        name, key = "value" if last else following.name, talk.value()
        talk.call(tool, arguments, {name: key}, thought)
        tool, thought = following, f'Next I {following.name} "{key}".'
    _answer(talk, key)


def _compute(talk, computers, steps):
    """A number, and what is to be done with it, one thing after the other."""
    number = talk.noted(talk.lexicon.number())
    # No operand comes twice, so that what has been done tells what is next.
    operands = [talk.noted(int(n)) for n in 2 + talk.rng.permutation(18)[:steps]]
    todo = [(talk.pick(computers), operand) for operand in operands]
    words = [_STEPS[tool.name].format(operand) for tool, operand in todo]
    talk.user(f"Start at {number}, " + ", ".join(words) + ".")
    for (tool, operand), word in zip(todo, words, strict=True):
        result = talk.noted(_RESULTS[tool.name](number, operand))
        thought = f"Now {word}: {number} and {operand}."
        talk.call(tool, {"a": number, "b": operand}, {"value": result}, thought)
        number = result
    _answer(talk, number)


def _retry(talk, _):
    """A tool that is busy once or more often."""
    tool = talk.pick(talk.of(READERS) or talk.tools)
    ask, arguments, result, thought = _single(talk, tool)
    talk.user(ask)
    for _ in range(int(talk.rng.integers(1, 4))):
        talk.call(tool, arguments, {"error": BUSY}, thought)
        thought = "It is busy. Again."
    talk.call(tool, arguments, {"value": result}, thought)
    _answer(talk, result)


def _lost(talk, _):
    """An entry that is not there."""
    tool = talk.pick(talk.of(READERS) or talk.tools)
    ask, arguments, _, thought = _single(talk, tool)
    talk.user(ask)
    talk.call(tool, arguments, {"error": MISSING}, thought)
    key = next(iter(arguments.values()))
    talk.say(f'There is no "{key}".', "Missing.", "It is missing.")


def _no_tool(talk, _):
    """What a tool is asked for that the assistant does not have."""
    absent = [tool for tool in TOOLS if tool not in talk.tools]
    ask, *_ = _single(talk, talk.pick(absent))
    talk.user(ask)
    talk.say(NO_TOOL, "No.", "I have no tool for that.")


_TURNS = {
    "talk": _chat,
    "tell": _tell,
    "ask": _ask,
    "unknown": _unknown,
    "read": _read,
    "look": _look,
    "chain": _chain,
    "retry": _retry,
    "lost": _lost,
    "no_tool": _no_tool,
}
