"""What an object that holds arrays shows of itself: their types and shapes, not their numbers."""

import dataclasses
from typing import Any

import jax
import numpy as np


def short_repr(holder: Any) -> str:
    """The repr of a dataclass that holds arrays: of each its type and shape, not its numbers."""
    fields = ((f.name, getattr(holder, f.name)) for f in dataclasses.fields(holder))
    shown = ", ".join(f"{name}={_type_and_shape(value)}" for name, value in fields)
    return f"{type(holder).__name__}({shown})"


def _type_and_shape(value):
    if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, dict):
        items = (f"{name!r}: {_type_and_shape(x)}" for name, x in value.items())
        return "{" + ", ".join(items) + "}"
    if type(value) is tuple:
        return "(" + "".join(f"{_type_and_shape(x)}, " for x in value).rstrip() + ")"
    return repr(value)
