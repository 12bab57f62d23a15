"""Typed values out of a JSON object, with errors that name the key."""

from v4jax.errors import InputError
from v4jax.files.json_reader import is_number, quote

_LONGEST = 2**63 - 1  # what any size, count or id may be
_LONGEST_WORD = 200  # characters; such words are quoted in errors


def integer(keys, name):
    value = keys.get(name)
    if type(value) is not int or abs(value) > _LONGEST:
        raise InputError(f"{name} is {short(value)}; expected an integer")
    return value


def number(keys, name):
    value = keys.get(name)
    if not is_number(value):
        raise InputError(f"{name} is {short(value)}; expected a number")
    return float(value)


def string(keys, name):
    value = keys.get(name)
    if type(value) is not str or len(value) > _LONGEST_WORD:
        raise InputError(f"{name} is {short(value)}; expected a string")
    return value


def is_one_of(value, allowed):
    """Equality that takes neither True for 1 nor 1.0 for 1."""
    return any(value == item and type(value) is type(item) for item in allowed)


def short(value):
    return quote(value, 60)


def named(value):
    """A word of a config in quotes, cut short."""
    return repr(value[:60]) if isinstance(value, str) else short(value)
