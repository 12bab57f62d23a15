"""What generation is given: prompts, token ids and whole numbers, checked in one sentence each."""

import operator
from collections.abc import Iterable, Mapping, Set

import numpy as np

from v4jax.errors import InputError


def read_prompts(prompts, vocab_size) -> list[np.ndarray]:
    """One int32 vector a prompt, from a list of lists or arrays or from a single prompt."""
    sequence = hasattr(prompts, "__getitem__") and getattr(prompts, "shape", None) != ()
    if isinstance(prompts, str | bytes | Mapping | Set) or not sequence:
        raise InputError(
            f"prompts has type {type(prompts).__name__}; expected lists of token ids: encode text "
            "with the checkpoint's tokenizer first"
        )
    if len(prompts) == 0:
        raise InputError("there are no prompts; expected at least one list of token ids")
    if isinstance(prompts[0], int | np.integer) or getattr(prompts, "ndim", 2) == 1:
        prompts = [prompts]
    return [read_prompt(row, prompt, vocab_size) for row, prompt in enumerate(prompts)]


def read_prompt(row, prompt, vocab_size):
    try:
        ids = np.asarray(prompt)
    except ValueError:  # lists of different lengths inside
        ids = np.asarray(prompt, dtype=object)
    if ids.shape == (0,):
        raise InputError(f"prompt {row} is empty; expected at least one token id")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(
            f"prompt {row} has shape {ids.shape} and type {ids.dtype}; expected a flat list of "
            "whole numbers, the token ids"
        )
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if outside.size:
        place = int(outside[0])
        raise InputError(
            f"token {place} of prompt {row} is {ids[place]}; expected 0 to {vocab_size - 1}, the "
            "model's vocabulary"
        )
    return ids.astype(np.int32)


def read_stop_ids(stop_ids, vocab_size) -> frozenset[int]:
    stop_ids = stop_ids if isinstance(stop_ids, Iterable) else [stop_ids]
    return frozenset(whole_number("a stop id", token, 0, vocab_size - 1) for token in stop_ids)


def whole_number(name, value, lowest, highest=None):
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < lowest or (highest is not None and number > highest):
        allowed = f"{lowest} or more" if highest is None else f"{lowest} to {highest}"
        raise InputError(f"{name} is {value}; expected a whole number, {allowed}")
    return number
