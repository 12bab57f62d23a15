"""Random tools with JSON schemas, and whether a call's arguments fit one."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from v4jax.eval import words
from v4jax.eval.dice import Dice

_VERBS = ("paint", "order", "measure", "repair", "register", "locate", "rename", "schedule")
_COLOURS = ("amber", "crimson", "olive", "violet")
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function: its name, the schemas of its parameters, all required, and what it is for."""

    name: str
    parameters: Mapping[str, Mapping[str, Any]]
    description: str = ""

    def described(self) -> dict[str, Any]:
        """As the Chat Completions API has it."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description or f"Can {self.name.replace('_', ' a ')}.",
                "parameters": {
                    "type": "object",
                    "properties": {name: dict(each) for name, each in self.parameters.items()},
                    "required": list(self.parameters),
                },
            },
        }


def draw_tools(dice: Dice, count: int) -> list[Tool]:
    """So many tools with one to four parameters each."""
    names = [f"{verb}_{noun}" for verb in _VERBS for noun in words.NOUNS[:24]]
    return [Tool(name, _parameters(dice)) for name in dice.sample(names, count)]


def _parameters(dice):
    kinds = (
        ("label", {"type": "string"}),
        ("count", {"type": "integer"}),
        ("weight", {"type": "number"}),
        ("fragile", {"type": "boolean"}),
        ("colour", {"type": "string", "enum": list(_COLOURS)}),
        ("code", {"type": "string", "description": "Digits, as text."}),
    )
    return dict(dice.sample(kinds, dice.between(1, 4)))


def draw_arguments(dice: Dice, tool: Tool) -> dict[str, Any]:
    """Values for all parameters."""
    values = {
        "label": dice.choice(words.NOUNS),
        "count": dice.between(2, 99),
        "weight": dice.between(1, 99) + 0.5,
        "fragile": bool(dice.below(2)),
        "colour": dice.choice(_COLOURS),
        "code": dice.digits(4),
    }
    return {name: values[name] for name in tool.parameters}


@dataclasses.dataclass(frozen=True)
class Checked:
    """How a call's arguments are: read as JSON, valid, and of values whose type alone is wrong."""

    arguments: dict[str, Any] | None
    valid: bool
    wrong_types: int = 0


def checked(tool: Tool, text: str) -> Checked:
    """The arguments of a call, as its text has them."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return Checked(None, False)
    if not isinstance(arguments, dict):
        return Checked(None, False)
    wrong = sum(
        name in arguments and not _has_type(arguments[name], schema["type"])
        for name, schema in tool.parameters.items()
    )
    valid = not wrong and arguments.keys() == tool.parameters.keys()
    valid = valid and all(
        arguments[name] in schema["enum"]
        for name, schema in tool.parameters.items()
        if "enum" in schema
    )
    return Checked(arguments, valid, wrong)


def _has_type(value, kind):
    if isinstance(value, bool):  # which is an int to Python
        return kind == "boolean"
    return isinstance(value, _TYPES[kind])


def same(found: Any, expected: Any) -> bool:
    """Whether two JSON values are equal, their types included; 7 and 7.0 are."""
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, int | float) and isinstance(expected, int | float):
        return found == expected
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    return type(found) is type(expected) and found == expected


def shown(arguments: Mapping[str, Any]) -> str:
    """Arguments as a person asks for them."""
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in arguments.items())


def find(tools: Sequence[Tool], name: str) -> Tool | None:
    return next((tool for tool in tools if tool.name == name), None)
