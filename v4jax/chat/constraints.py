"""What an answer of a chat has to obey: a format of the content, or a tool call."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from v4jax.engine.choice import ALL, WORD
from v4jax.engine.constraint import Constraint, Grammar, Matcher

_OBJECT = '{"type":"object"}'


class ChatConstraint(NamedTuple):
    """A grammar of the content, which begins behind the reasoning.

    Attributes:
      grammar: of the content. after: the id that ends the reasoning; None: there is none.
      eos: the id that ends an answer. It may not come within the reasoning.
    """

    grammar: Constraint
    after: int | None
    eos: int

    def matcher(self, tokenizer: Any, eos: int | None) -> Matcher:
        """See `engine.constraint.Constraint`; the chat's end token counts, not the model's."""
        inner = self.grammar.matcher(tokenizer, self.eos)
        return inner if self.after is None else _Behind(inner, self.after, self.eos)


class _Behind:
    """Permits all but the end until a token has come, then what another matcher permits."""

    def __init__(self, inner: Matcher, after: int, eos: int):
        self._inner, self._after, self._eos = inner, after, eos
        self._began = False
        self._free = np.full(len(inner.allowed()), ALL, np.uint32)
        self._free[eos // WORD] &= ~np.uint32(1 << eos % WORD)

    def allowed(self) -> np.ndarray:
        return self._inner.allowed() if self._began else self._free

    def advance(self, token: int) -> None:
        if self._began:
            self._inner.advance(token)
        else:
            self._began = token == self._after

    def walk(self, drafts: Sequence[int]) -> list[np.ndarray]:
        if self._began:
            return self._inner.walk(drafts)
        masks = [self._free]
        for place, token in enumerate(drafts):
            if token == self._eos:
                return masks
            if token == self._after:
                return masks + self._inner.walk(drafts[place + 1 :])
            masks.append(self._free)
        return masks

    def done(self) -> bool:
        return self._began and self._inner.done()


def of_content(kind: str, text: str) -> Grammar | None:
    """The grammar of deepseek-recipe's constraint; None where it says nothing of the content."""
    if kind == "json":
        return Grammar("json_schema", text or _OBJECT)
    return Grammar("regex", text) if kind == "regex" else None


def of_calls(
    tools: Mapping[str, Any], names: Sequence[str], several: bool, dsml_id: int
) -> Grammar:
    """The grammar of the calls that follow the opening line of a block of tool calls.

    Args:
      tools: the schema of each tool's arguments. names: which of them may be called.
      several: whether more than one call may come. dsml_id: of the mark in every tag.
    """
    mark = f"<[{dsml_id}]>"
    rules = [f'start: {"call+" if several else "call"} "</" {mark} "tool_calls>"']
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(names))))
    rules.append("TEXT: /(.|\\n)*<\\//")
    for i, name in enumerate(names):
        schema = tools.get(name)
        rules += _call_rules(f"call_{i}", name, schema if isinstance(schema, dict) else {}, mark)
    return Grammar("lark", "\n".join(rules))


def _call_rules(rule, name, schema, mark):
    """One tool's call: its arguments in the schema's order, those that are not required optional.

    A value of text stands as it is, every other one as JSON.
    """
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    required = schema.get("required", ())
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rules, parts = [], [f'"<" {mark} {_quoted(f"invoke name={json.dumps(name)}>")} "\\n"']
    for i, (key, value) in enumerate(properties.items()):
        own = f"{rule}_{i}"
        text, body = _value(value, shared)
        tag = f'parameter name="{key}" string="{"true" if text else "false"}">'
        rules.append(f'{own}: "<" {mark} {_quoted(tag)} {body} {mark} "parameter>" "\\n"')
        parts.append(own if key in required else f"{own}?")
    parts.append(f'"</" {mark} "invoke>" "\\n"')
    return [f"{rule}: {' '.join(parts)}", *rules]


def _value(schema, shared):
    """Whether a value is text, and the rule of it and of the "</" behind it."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        choices = schema.get("enum")
        if isinstance(choices, list) and all(isinstance(each, str) for each in choices):
            return True, f'({" | ".join(map(_quoted, choices))}) "</"'
        return True, "TEXT"
    described = schema | shared if isinstance(schema, dict) else schema
    return False, f'%json {json.dumps(described)} "</"'


def _quoted(text):
    return json.dumps(text, ensure_ascii=False)
