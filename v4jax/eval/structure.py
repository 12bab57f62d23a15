"""How much of a tool call's form a model knows, also before it can make one: teacher forcing.

The right call stands behind the question, and each of its tokens is held against the likeliest one
given all that stands before it. Three kinds of tokens are counted apart: the form, which every call
has; the names of the tool and its parameters, which the prompt lists; and the values.
"""

import dataclasses
import json
import re
import time
from collections.abc import Sequence
from typing import Any

from v4jax.eval.dice import Dice
from v4jax.eval.fit import NotPossible
from v4jax.eval.sample import Prompt
from v4jax.eval.suite import Job
from v4jax.eval.tool_use import Script, single

FORM, NAMES, VALUES = "form", "names", "values"
_NAME = re.compile(r'name="([^"]*)"')
_VALUE = re.compile(r'string="(?:true|false)">(.*?)</', re.DOTALL)


def jobs(seed: int, samples: int) -> list[Job]:
    """Single calls among four tools with random schemas, as of the suite `tools`."""
    return [Job("tool_structure", 0, n, _Forced(seed, n)) for n in range(samples)]


@dataclasses.dataclass(frozen=True)
class _Forced:
    seed: int
    number: int

    def __call__(self, target) -> dict[str, Any]:
        if getattr(target, "chats", None) is None:
            raise NotPossible(
                "tool_structure looks at every token's likeliest one, so it needs a --checkpoint "
                "in this process that can chat"
            )
        script = single(Dice("tools", "single", self.seed, self.number))
        prompt, answer = call_tokens(target.chats, script)
        kinds = kinds_of(target.chats, answer)
        began = time.perf_counter()
        right = target.likeliest([*prompt, *answer])[-len(answer) :]
        shares = {kind: _share(kind, kinds, right) for kind in (FORM, NAMES, VALUES)}
        return {
            "seed": self.seed,
            "depth": None,
            "prompt_tokens": len(prompt) + len(answer),
            "seconds": round(time.perf_counter() - began, 6),
            "score": shares[FORM],
            "names": shares[NAMES],
            "values": shares[VALUES],
            "form_tokens": kinds.count(FORM),
        }


def call_tokens(chats, script: Script) -> tuple[list[int], list[int]]:
    """The ids of a script's question with its tools, and those of the right call behind it."""
    (step,) = script.steps
    call = {"name": step.name, "arguments": json.dumps(dict(step.arguments))}
    asked = {"role": "user", "content": script.user}
    said = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call", "type": "function", "function": call}],
    }
    told = {"role": "tool", "tool_call_id": "call", "content": json.dumps(step.result)}
    tools = tuple(tool.described() for tool in script.tools)
    before = chats.tokens(Prompt((asked,), tools=tools))
    whole = chats.tokens(Prompt((asked, said, told), tools=tools))
    if whole[: len(before)] != before:
        raise AssertionError("a turn of the history begins otherwise than an answer")
    end = next(i for i in range(len(before), len(whole)) if whole[i] in chats.stop_ids)
    return before, whole[len(before) : end + 1]


def kinds_of(chats, tokens: Sequence[int]) -> list[str]:
    """What each token of a call belongs to; one that is partly a value or a name counts as that."""
    ends = [len(chats.text(tokens[: i + 1])) for i in range(len(tokens))]
    text = chats.text(tokens)
    spans = {
        VALUES: [match.span(1) for match in _VALUE.finditer(text)],
        NAMES: [match.span(1) for match in _NAME.finditer(text)],
    }
    found = []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        touched = (
            kind
            for kind in spans
            if any(begin < last and first < end for first, last in spans[kind])
        )
        found.append(next(touched, FORM))
    return found


def _share(kind, kinds, right):
    of_kind = [hit for each, hit in zip(kinds, right, strict=True) if each == kind]
    return sum(of_kind) / len(of_kind) if of_kind else None
