"""The one reader of small JSON files: config, index, manifest, headers, lines of data.

`read_json` and `parse_json` give plain Python values that are known to be harmless: at most
`MAX_DEPTH` levels, UTF-8, no key twice, no NaN. `Fields` asks an object for its values by key and
type, and says in one sentence which file, which key, what was expected and what was found:

    fields = read_fields(path)
    name, size = fields.string("name"), fields.integer("size", low=0)
    tokens = [entry.string("text") for entry in fields.objects("tokens")]

Python's own reader recurses, takes NaN and the last of two equal keys, and guesses encodings.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from v4jax.errors import InputError
from v4jax.files.regular import read_regular

MAX_DEPTH = 64
MAX_BYTES = 256 << 20  # the index of the largest released model has 20 MB
QUOTED = 200  # characters of what was found that a sentence shows

_NEEDED = object()
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(
    path: str | os.PathLike,
    max_bytes: int = MAX_BYTES,
    watched: frozenset[str] | None = None,
    cure: str = "download or copy it again",
) -> Any:
    """The value that a JSON file holds; see `parse_json`.

    Args:
      max_bytes: a larger file is refused before it is read.
      cure: what to do where there is no such file.

    Raises:
      InputError: the file cannot be read, is too large, no UTF-8 or no JSON.
    """
    return parse_json(read_regular(path, max_bytes, cure), os.fspath(path), watched)


def read_fields(
    path: str | os.PathLike,
    max_bytes: int = MAX_BYTES,
    watched: frozenset[str] | None = None,
    cure: str = "download or copy it again",
) -> "Fields":
    """The object that a JSON file holds; as `read_json` otherwise."""
    return Fields(read_json(path, max_bytes, watched, cure), os.fspath(path))


def parse_json(
    text: bytes | str, where: str, watched: frozenset[str] | None = None, nan: bool = False
) -> Any:
    """The value of a JSON text as `json.loads` gives it.

    Args:
      where: the file, or the file and line, for errors.
      watched: keys that may not be there twice in an object, and only of their strings the reader
        cares; None for all keys and strings. Of others the last one counts.
      nan: whether NaN and the infinities, which are no JSON, are taken.

    Raises:
      InputError: no UTF-8, no JSON, nested deeper than `MAX_DEPTH`, or a watched key twice.
    """
    text = _decoded(text, where) if isinstance(text, bytes) else text
    hooks = {} if nan else {"parse_constant": _no_constant, "parse_float": _finite}
    try:
        value = json.loads(text, object_pairs_hook=_unique(watched), **hooks)
    except RecursionError:
        raise InputError(_too_deep(where)) from None
    except ValueError as error:
        raise InputError(
            f"{where}: not valid JSON ({_cut(str(error))}); correct it or get it again"
        ) from None
    _check_depth(value, where)
    if watched is None and _SURROGATE.search(text):
        _check_strings(value, where)
    return value


class Fields(Mapping):
    """A JSON object whose values are asked for by key and type.

    Every getter takes a default, whatever it is, for a key that is not there or null; without one
    that is an error.

    Args:
      values: the object; anything else is refused.
      where: the file, or file and line. inside: the keys that led here, for nested objects.
    """

    def __init__(self, values: Any, where: str, inside: tuple[str, ...] = ()):
        self.where, self._inside = where, inside
        if type(values) is not dict and not isinstance(values, Mapping):
            name = f"{'.'.join(map(word, inside))} is" if inside else "holds"
            raise InputError(f"{where}: {name} {kind(values)} {quote(values)}; expected an object")
        self.values_by_key = values

    def __getitem__(self, key: str) -> Any:
        return self.values_by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_key)

    def __len__(self) -> int:
        return len(self.values_by_key)

    def name(self, key: str) -> str:
        """The key with those that lead to it."""
        return ".".join(map(word, (*self._inside, key)))

    def refuse(self, key: str, expected: str) -> InputError:
        """The error that says what was found under a key, to be raised."""
        if key not in self.values_by_key:
            return InputError(f"{self.where}: has no {self.name(key)}; expected {expected}")
        found = quote(self.values_by_key[key])
        return InputError(f"{self.where}: {self.name(key)} is {found}; expected {expected}")

    def string(self, key: str, default: Any = _NEEDED) -> Any:
        """A text that can be written as UTF-8."""
        value = self._get(key, default, lambda v: type(v) is str, "a string")
        if type(value) is str and value is not default and (at := bad_character(value)) is not None:
            raise InputError(
                f"{self.where}: {self.name(key)} has half of a surrogate pair, "
                f"{ascii(value[at])}, as its character {at}; write the whole character or remove it"
            )
        return value

    def boolean(self, key: str, default: Any = _NEEDED) -> Any:
        return self._get(key, default, lambda v: type(v) is bool, "true or false")

    def integer(
        self, key: str, default: Any = _NEEDED, low: int = -(2**63), high: int = 2**63 - 1
    ) -> Any:
        def fits(value):
            return type(value) is int and low <= value <= high

        return self._get(key, default, fits, _range("an integer", low, high))

    def number(self, key: str, default: Any = _NEEDED) -> Any:
        value = self._get(key, default, is_number, "a number")
        return value if value is default else float(value)

    def array(self, key: str, default: Any = _NEEDED) -> Any:
        return self._get(key, default, lambda v: isinstance(v, list), "a list")

    def integers(self, key: str, default: Any = _NEEDED, low: int = 0) -> Any:
        def fits(value):
            return isinstance(value, list) and all(
                type(n) is int and low <= n < 2**63 for n in value
            )

        value = self._get(key, default, fits, f"a list of integers of {low} or more")
        return value if value is default else tuple(value)

    def strings(self, key: str, default: Any = _NEEDED) -> Any:
        def fits(value):
            return isinstance(value, list) and all(type(item) is str for item in value)

        value = self._get(key, default, fits, "a list of strings")
        return value if value is default else tuple(value)

    def object(self, key: str, default: Any = _NEEDED) -> Any:
        value = self._get(key, default, _is_object, "an object")
        return value if value is default else Fields(value, self.where, (*self._inside, key))

    def objects(self, key: str, default: Any = _NEEDED) -> Any:
        """A list of objects."""
        found = self.array(key, default)
        if found is default:
            return found
        return [
            Fields(value, self.where, (*self._inside, f"{key}[{i}]"))
            for i, value in enumerate(found)
        ]

    def of_objects(self) -> dict[str, "Fields"]:
        """The values of an object all of whose values are objects."""
        return {key: self.object(key) for key in self.values_by_key}

    def of_strings(self) -> dict[str, str]:
        """The values of an object all of whose values are strings."""
        return {key: self.string(key) for key in self.values_by_key}

    def of_integers(self, low: int = 0) -> dict[str, int]:
        """The values of an object all of whose values are integers."""
        return {key: self.integer(key, low=low) for key in self.values_by_key}

    def _get(self, key, default, fits: Callable[[Any], bool], expected: str):
        value = self.values_by_key.get(key)
        if value is None and default is not _NEEDED:
            return default
        if not fits(value):
            raise self.refuse(key, expected)
        return value


def _is_object(value):
    return type(value) is dict or isinstance(value, Mapping)


def is_number(value: Any) -> bool:
    """Whether a value is a finite float, or an integer that a float can hold."""
    if type(value) is int:
        return abs(value) < 1 << 1023
    return type(value) is float and math.isfinite(value)


def bad_character(text: str) -> int | None:
    """Where a text has half of a surrogate pair, which no file can hold; None if nowhere."""
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def kind(value: Any) -> str:
    """What JSON calls a value."""
    if value is None or isinstance(value, bool):
        return "the word"
    names = {str: "the string", list: "a list", tuple: "a list"}
    if isinstance(value, int | float):
        return "the number"
    return "an object" if isinstance(value, Mapping) else names.get(type(value), "a value")


def word(text: str, limit: int = QUOTED) -> str:
    """A name for a sentence: cut short, and in quotes where it has odd characters."""
    return _cut(text, limit) if text.isprintable() else quote(text, limit)


def quote(value: Any, limit: int = QUOTED) -> str:
    """A value as JSON, cut short: no more is made than is shown."""
    shown = ""
    for piece in _pieces(value, limit, 8):
        shown += piece
        if len(shown) > limit:
            break
    return _cut(shown, limit)


def _pieces(value, limit, depth):
    """The text of a value bit by bit."""
    if isinstance(value, Mapping | list | tuple) and not depth:
        yield "..."
    elif isinstance(value, Mapping):
        yield "{"
        for i, (key, child) in enumerate(value.items()):
            yield ", " * (i > 0) + json.dumps(str(key)[: limit + 1]) + ": "
            yield from _pieces(child, limit, depth - 1)
        yield "}"
    elif isinstance(value, list | tuple):
        yield "["
        for i, child in enumerate(value):
            yield ", " * (i > 0)
            yield from _pieces(child, limit, depth - 1)
        yield "]"
    elif isinstance(value, str):
        yield json.dumps(value[: limit + 1])
    elif isinstance(value, int) and abs(value) >= 1 << 1024:  # more digits than Python writes
        yield f"an integer of {value.bit_length()} bits"
    else:
        yield json.dumps(value, default=repr)


def _cut(text, limit=QUOTED):
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _range(name, low, high):
    if low <= -(2**63):
        return name if high >= 2**63 - 1 else f"{name} of at most {high}"
    return f"{name} of {low} or more" if high >= 2**63 - 1 else f"{name} from {low} to {high}"


def _decoded(text, where):
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: is not UTF-8 text (byte {error.start} is {text[error.start]:#04x}); "
            "convert it to UTF-8 or get it again"
        ) from None


def _unique(watched):
    def to_dict(pairs):
        values = dict(pairs)
        if len(values) != len(pairs):
            seen = set()
            for key, _ in pairs:
                if key in seen and (watched is None or key in watched):
                    raise ValueError(f"the key {quote(key, 60)} is there twice in one object")
                seen.add(key)
        return values

    return to_dict


def _no_constant(name):
    raise ValueError(f"{name} is no number of JSON")


def _finite(text):
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {_cut(text, 60)} is beyond the range of floats")
    return value


def _check_depth(value, where):
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        if not level:
            return
        children = itertools.chain.from_iterable(
            each.values() if type(each) is dict else each for each in level
        )
        level = [child for child in children if type(child) is dict or type(child) is list]
    if level:
        raise InputError(_too_deep(where))


def _too_deep(where):
    return f"{where}: is JSON nested deeper than {MAX_DEPTH} levels; get or write the right file"


def _check_strings(value, where):
    if isinstance(value, dict):
        for key, child in value.items():
            _check_strings(key, where)
            _check_strings(child, where)
    elif isinstance(value, list):
        for child in value:
            _check_strings(child, where)
    elif isinstance(value, str) and (at := bad_character(value)) is not None:
        raise InputError(
            f"{where}: a string has half of a surrogate pair, {ascii(value[at])}, as its character "
            f"{at}; write the whole character or remove it"
        )
