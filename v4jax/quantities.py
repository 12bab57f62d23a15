"""What a config's numbers must be."""

import numbers
import operator
from typing import Any

from v4jax.errors import InputError


def is_number(value: Any) -> bool:
    """Whether a value is a real number; True is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_whole(name: str, value: Any, least: int, or_else: str = "") -> None:
    """Refuses what is no whole number of at least `least`, 0 or 1."""
    try:
        wrong = isinstance(value, bool) or operator.index(value) < least
    except TypeError:
        wrong = True
    if wrong:
        expected = "0 or more" if least == 0 else "a positive number"
        raise InputError(f"{name} is {value!r}; expected {expected}, a whole one{or_else}")
