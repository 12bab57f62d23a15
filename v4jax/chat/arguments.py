"""Whether a tool call's arguments fit their schema; what does not is reported, never repaired."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from v4jax.chat.recipe import EXTRA, Call
from v4jax.errors import InputError
from v4jax.extras import require
from v4jax.files.json_reader import parse_json

_MOST_REFERENCES = 10_000


class Problem(NamedTuple):
    """A call that does not fit. message: one sentence of what and where."""

    id: str
    name: str
    message: str


class _TooMuch(Exception):
    """A schema whose references lead on and on."""


def problem(call: Call, tools: Mapping[str, Any]) -> Problem | None:
    """What is wrong with a call, or None.

    The schema is a client's own: its `pattern`s, which can take Python's reader for ever, are not
    checked, and references to other places are not followed.

    Args:
      tools: the schema of each tool's arguments.
    """
    message = _message(call, tools)
    return None if message is None else Problem(call.id, call.name, message)


def _message(call, tools):
    if call.name not in tools:
        return "there is no tool of this name"
    try:
        arguments = parse_json(call.arguments, "the arguments")
    except InputError as error:
        return str(error).partition(";")[0][:300]
    if not isinstance(arguments, dict):
        return "the arguments are no JSON object"
    schema = tools[call.name]
    return None if not isinstance(schema, dict | bool) else _misfit(arguments, schema)


def _misfit(arguments, schema):
    """The first place where the arguments break the schema."""
    require("jsonschema", EXTRA, "a check of a tool call's arguments")
    import jsonschema
    import referencing

    validator = _validator()(schema, registry=referencing.Registry())
    try:
        error = next(iter(validator.iter_errors(arguments)), None)
    except (jsonschema.exceptions.UnknownType, referencing.exceptions.Unresolvable):
        return "the tool's schema cannot be read"
    except (_TooMuch, RecursionError):
        return "the tool's schema is too deep to check"
    except Exception as error:  # a schema that is none, such as required: 5
        return f"the tool's schema cannot be read ({type(error).__name__})"
    if error is None:
        return None
    where = "".join(f"[{json.dumps(step)}]" for step in error.absolute_path)
    return f"arguments{where}: {error.message}"[:300]


def _validator():
    """JSON Schema 2020-12 without regular expressions, and with an end to references."""
    import jsonschema

    plain = jsonschema.Draft202012Validator
    left = [_MOST_REFERENCES]

    def counted(keyword):
        def follow(validator, reference, instance, schema):
            left[0] -= 1
            if left[0] < 0:
                raise _TooMuch
            yield from plain.VALIDATORS[keyword](validator, reference, instance, schema) or ()

        return follow

    def nothing(validator, value, instance, schema):
        return ()

    def further(validator, value, instance, schema):
        if "patternProperties" in schema:
            return ()
        return plain.VALIDATORS["additionalProperties"](validator, value, instance, schema)

    return jsonschema.validators.extend(
        plain,
        {
            "$ref": counted("$ref"),
            "$dynamicRef": counted("$dynamicRef"),
            "pattern": nothing,
            "patternProperties": nothing,
            "unevaluatedProperties": nothing,
            "additionalProperties": further,
        },
    )
