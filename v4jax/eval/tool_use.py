"""Stability over tool calls: single calls, chains of dependent ones, and questions for no tool.

A script says which calls have to come, in order, and what each returns. The model's calls are held
against it: valid, exact, in order, and whether it ends with the value that the last one gave.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from v4jax.eval import words
from v4jax.eval.dice import Dice
from v4jax.eval.sample import Prompt
from v4jax.eval.schemas import Tool, checked, draw_arguments, draw_tools, find, same, shown
from v4jax.eval.suite import Job, Target

CHAINS = (3, 5, 10, 20)
BUDGET = 256  # tokens of a turn
SPARE = 2  # turns that may go wrong before a conversation is given up
TEMPERATURE = 0.7


@dataclasses.dataclass(frozen=True)
class Step:
    """A call that has to come, and what it returns."""

    name: str
    arguments: Mapping[str, Any]
    result: Any


@dataclasses.dataclass(frozen=True)
class Script:
    """A conversation: tools, what the user says, the calls, a text that the answer has to have."""

    tools: tuple[Tool, ...]
    user: str
    steps: tuple[Step, ...]
    final: str


def jobs(
    seed: int, samples: int, trials: int, temperature: float = TEMPERATURE, style: str = "chat"
) -> list[Job]:
    """Scripts of all kinds, each played so many times with draws of its own.

    Args:
      style: "facts": in the words that nano was trained on.
    """
    kinds = (looked_up, declined, followed) if style == "facts" else (single, refusal, chain)
    one, refuse, follow = kinds
    makers: dict[str, Callable[[int], Script]] = {
        "single": lambda n: one(Dice("tools", "single", seed, n)),
        "refuse": lambda n: refuse(Dice("tools", "refuse", seed, n)),
    }

    def chained(calls):
        return lambda n: follow(Dice("tools", "chain", calls, seed, n), calls)

    makers |= {f"chain_{calls}": chained(calls) for calls in CHAINS}
    return [
        Job(task, 0, n * trials + trial, _Played(make(n), seed, n, trial, temperature))
        for task, make in makers.items()
        for n in range(samples)
        for trial in range(trials)
    ]


@dataclasses.dataclass(frozen=True)
class _Played:
    script: Script
    seed: int
    item: int
    trial: int
    temperature: float

    def __call__(self, target: Target) -> dict[str, Any]:
        return {"seed": self.seed, "item": self.item, "trial": self.trial} | play(
            target, self.script, self.temperature, seed=self.item * 1000 + self.trial
        )


def single(dice: Dice) -> Script:
    """One call among several tools."""
    tools = draw_tools(dice, 4)
    tool = dice.choice(tools)
    arguments = draw_arguments(dice, tool)
    value = dice.digits(6)
    user = (
        f"Call {tool.name} with {shown(arguments)}. Then tell me the number that it returns, and "
        "nothing else."
    )
    return Script(tuple(tools), user, (Step(tool.name, arguments, {"number": value}),), value)


def refusal(dice: Dice) -> Script:
    """A question that no tool is for."""
    tools = draw_tools(dice, 4)
    first, second = dice.sample(words.NOUNS, 2)
    return Script(tuple(tools), f"Which word is longer, {first} or {second}?", (), "")


def chain(dice: Dice, calls: int) -> Script:
    """So many calls, each of which says what the next one is."""
    names = [f"{verb}_{noun}" for verb in ("open", "read") for noun in words.NOUNS[:12]]
    code = {"code": {"type": "string"}}
    tools = tuple(Tool(name, code) for name in dice.sample(names, 3))
    path = [dice.choice(tools).name for _ in range(calls)]
    codes = [dice.hex(6) for _ in range(calls)]
    value = dice.digits(6)
    results: list[Any] = [
        {"next": name, "code": code} for name, code in zip(path[1:], codes[1:], strict=True)
    ]
    steps = [
        Step(name, {"code": code}, result)
        for name, code, result in zip(path, codes, [*results, {"value": value}], strict=True)
    ]
    user = (
        f'Call {path[0]} with the code "{codes[0]}". Each result names the next tool to call and '
        "its code. Go on, one call at a time, until a result has a value; then tell me that value, "
        "and nothing else."
    )
    return Script(tools, user, tuple(steps), value)


_READERS = {
    "get": ("Get an entry.", "key", "entry"),
    "open": ("Open a file.", "path", "file"),
    "find": ("Find a user.", "name", "user"),
}


def _readers():
    return tuple(
        Tool(name, {parameter: {"type": "string"}}, description)
        for name, (description, parameter, _) in _READERS.items()
    )


def looked_up(dice: Dice) -> Script:
    """A single call in the words that nano was trained on."""
    tools = _readers()
    tool = dice.choice(tools)
    key, value = dice.sample(words.CODE_WORDS, 2)
    step = Step(tool.name, {next(iter(tool.parameters)): key}, {"value": value})
    return Script(tools, f'{tool.name.capitalize()} "{key}".', (step,), value)


def declined(dice: Dice) -> Script:
    """A question that no tool is for, in those words."""
    a, b = dice.between(2, 99), dice.between(2, 99)
    return Script(_readers(), f"Multiply {a} by {b}.", (), "")


def followed(dice: Dice, calls: int) -> Script:
    """A chain in those words."""
    tools = _readers()
    path = [dice.choice(tools) for _ in range(calls)]
    keys = dice.sample(words.CODE_WORDS, calls + 1)
    steps = []
    for step, tool in enumerate(path):
        following = path[step + 1].name if step + 1 < calls else "value"
        parameter = next(iter(tool.parameters))
        steps.append(Step(tool.name, {parameter: keys[step]}, {following: keys[step + 1]}))
    user = f'Follow {_READERS[path[0].name][2]} "{keys[0]}".'
    return Script(tools, user, tuple(steps), keys[-1])


def play(target: Target, script: Script, temperature: float, seed: int) -> dict[str, Any]:
    """Plays a script with a target; the fields of its record."""
    table = _Table(script)
    messages: list[Mapping[str, Any]] = [{"role": "user", "content": script.user}]
    tools = tuple(tool.described() for tool in script.tools)
    spent = dict.fromkeys(("prompt_tokens", "cached_tokens", "output_tokens", "seconds"), 0.0)
    first, text = None, ""
    for turn in range(len(script.steps) + 1 + SPARE):
        prompt = Prompt(tuple(messages), tools=tools)
        answer = target.ask(prompt, BUDGET, temperature=temperature, seed=seed * 100 + turn)
        for name in spent:
            spent[name] += getattr(answer, name)
        first = answer.first_token_seconds if first is None else first
        text = answer.text
        if not answer.calls:
            break
        messages.append(_said(answer))
        for call in answer.calls:
            result = table.result(call)
            messages.append(
                {"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result)}
            )
    return _counted(spent) | {
        "depth": None,
        "first_token_seconds": first,
        "answer": text,
        "expected": script.final,
        "calls": len(script.steps),
        "turns": turn + 1,
        **table.scores(text),
    }


def _counted(spent):
    seconds = round(spent.pop("seconds"), 6)
    return {name: int(value) for name, value in spent.items()} | {"seconds": seconds}


def _said(answer):
    calls = [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
        }
        for call in answer.calls
    ]
    return {"role": "assistant", "content": answer.text or None, "tool_calls": calls}


class _Table:
    """The tools' side of a conversation: what has been called, and what comes back."""

    def __init__(self, script: Script):
        self._script = script
        self._at = 0  # the step that is due
        self._made = self._valid = self._exact = self._wrong_types = self._out_of_order = 0

    def result(self, call: Mapping[str, str]) -> Any:
        """What a call returns; an error where it is not the one that is due."""
        self._made += 1
        tool = find(self._script.tools, call["name"])
        if tool is None:
            return {"error": f"there is no tool {call['name'][:60]}"}
        found = checked(tool, call["arguments"])
        self._valid += found.valid
        self._wrong_types += found.wrong_types > 0
        if not found.valid:
            return {"error": "the arguments do not fit the schema"}
        if self._at < len(self._script.steps) and _is(self._script.steps[self._at], call, found):
            self._exact += 1
            self._at += 1
            return self._script.steps[self._at - 1].result
        self._out_of_order += any(_is(step, call, found) for step in self._script.steps)
        return {"error": "not found"}

    def scores(self, text: str) -> dict[str, float]:
        """Of the whole conversation; "score" is 1 for every call right at once and the answer."""
        steps = len(self._script.steps)
        done = self._at == steps and self._script.final.lower() in text.lower()
        answered = bool(text.strip())
        scores = {
            "score": float(done and answered and self._exact == self._made),
            "ended_right": float(done and answered),
            "steps_done": self._at / steps if steps else float(not self._made),
            "in_order": float(not self._out_of_order),
        }
        if self._made:
            scores |= {
                "valid_calls": self._valid / self._made,
                "exact_calls": self._exact / self._made,
                "wrong_types": self._wrong_types / self._made,
            }
        return scores


def _is(step, call, found):
    return step.name == call["name"] and same(found.arguments, dict(step.arguments))


def names(of: Sequence[Step]) -> list[str]:
    return [step.name for step in of]
