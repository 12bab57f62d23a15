"""Typed values out of a JSON object, with errors that name the key."""

import json
import math

from v4jax.errors import InputError


def integer(keys, name):
    value = keys.get(name)
    if type(value) is not int:
        raise InputError(f"{name} is {short(value)}; expected an integer")
    return value


def number(keys, name):
    value = keys.get(name)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise InputError(f"{name} is {short(value)}; expected a number")
    return float(value)


def string(keys, name):
    value = keys.get(name)
    if type(value) is not str:
        raise InputError(f"{name} is {short(value)}; expected a string")
    return value


def is_one_of(value, allowed):
    """Equality that takes neither True for 1 nor 1.0 for 1."""
    return any(value == item and type(value) is type(item) for item in allowed)


def short(value):
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
