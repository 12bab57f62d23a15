"""The fields of a JSON body: their types are checked, and what nobody knows is refused."""

import math
from typing import Any

from v4jax.files.json_reader import bad_character
from v4jax.serve.errors import Refused

_MISSING = object()


class Fields:
    """A body whose fields are taken one by one; a field that is null counts as left out."""

    def __init__(self, body: Any):
        if not isinstance(body, dict):
            raise Refused(400, "the body is no JSON object; expected an object of fields")
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        """The value, whatever its type."""
        return self._left.pop(name, default)

    def whole(self, name: str, default: Any, low: int, high: int) -> Any:
        """A whole number from low to high."""
        value = self._left.pop(name, _MISSING)
        if value is _MISSING:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise wrong(name, f"a whole number, {low} to {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from low to high."""
        value = self._left.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(name, f"a number, {low} to {high}")
        if not (low <= value <= high and math.isfinite(value)):
            raise wrong(name, f"a number, {low} to {high}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._left.pop(name, default)
        if not isinstance(value, bool):
            raise wrong(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        """A text that is valid Unicode."""
        value = self._left.pop(name, default)
        return value if value is None else check_text(name, value)

    def nothing(self, name: str) -> None:
        """A field that is only taken where it is empty."""
        if self._left.pop(name, "") != "":
            raise wrong(name, "it to be left out: this server cannot do that")

    def end(self) -> None:
        """Refuses what nobody has taken."""
        if self._left:
            name = min(self._left, key=len)
            shown = name if name.isidentifier() and name.isascii() and len(name) < 40 else "?"
            raise Refused(
                400,
                f"there is no field {shown!r} here; leave it out",
                param=shown,
                code="unknown_field",
            )


def check_text(name: str, value: Any) -> str:
    """The value, if it is a text of valid Unicode."""
    if not isinstance(value, str):
        raise wrong(name, "text")
    if bad_character(value) is not None:
        raise wrong(name, "text of valid Unicode, without halves of surrogate pairs")
    return value


def wrong(name: str, expected: str) -> Refused:
    """The error of a field; it does not repeat the value, which may be a user's text."""
    return Refused(400, f"{name} is not what it has to be; expected {expected}", param=name)
