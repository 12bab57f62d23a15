"""The one JSON object that an answer was asked to be, read strictly."""

import json
import re
from typing import Any

LONGEST = 1 << 16  # characters that are read
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL)


def read_object(answer: str) -> tuple[dict[str, Any] | None, str]:
    """The object, or None and what is wrong, as a part of a sentence.

    The answer has to be one object and nothing else, but blanks and a code fence around it. An
    object that names a key twice is refused: which value was meant is nobody's guess.
    """
    text = answer.strip()
    if not text:
        return None, "it is empty"
    if len(text) > LONGEST:
        return None, f"it has more than {LONGEST:,} characters"
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1]
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except _Twice as error:
        return None, f"it names {error} twice"
    except (ValueError, RecursionError):  # a number of 5,000 digits is a ValueError too
        return None, "it is no JSON"
    if not isinstance(found, dict):
        return None, "it is no JSON object"
    return found, ""


class _Twice(Exception):
    pass


def _once(pairs):
    found = {}
    for name, value in pairs:
        if name in found:
            raise _Twice(json.dumps(name[:50]))
        found[name] = value
    return found
