"""Records of text and of chat: the lines of .jsonl files, and what .json files may hold."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from v4jax.errors import InputError
from v4jax.files.json_reader import Fields, bad_character, is_number, parse_json, quote
from v4jax.files.regular import read_regular

ASSISTANT = "assistant"
# The released models' markers; a tokenizer without them spells them out.
MARKERS = {"system": "", "user": "<｜User｜>", ASSISTANT: "<｜Assistant｜>"}
_WATCHED = frozenset({"text", "name", "messages", "role", "content"})
_GIVE = "give a file, a directory or a glob"


class Piece(NamedTuple):
    """Text, how much its tokens count as targets, and whether it is a marker: a special token."""

    text: str
    weight: float = 1.0
    marker: bool = False


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
      InputError: it cannot be read, or is no UTF-8.
    """
    content = read_regular(path, cure=_GIVE)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not UTF-8 text (byte {error.start}); convert it, or give token ids as .npy"
        ) from None


def records(file: Path) -> Iterator[tuple[int, Fields]] | None:
    """The numbered records of a .jsonl or .json file; None of a .json file that is plain text.

    A .json file holds records if it is a list, or if each of its lines is one as in .jsonl.

    Raises:
      InputError: a record is no object, or no JSON.
    """
    text = read_text(file)
    if file.suffix == ".jsonl" or _has_record_lines(text):
        return _lines(file, text)
    return _entries(file, text) if text.lstrip("\ufeff \t\r\n").startswith("[") else None


def own_name(record: Fields) -> str | None:
    """The name that a record gives itself."""
    return record.string("name") if isinstance(record.get("name"), str) else None


def pieces(record: Fields) -> tuple[Piece, ...]:
    """What a record of text holds; nothing where that is empty."""
    text = record.get("text")
    given = text if isinstance(text, list) and text else [[text, True]]
    for piece in given:
        match piece:
            case [str(_), bool(_)]:
                continue
            case [str(_), float(weight) | int(weight)] if _is_weight(weight):
                continue
        raise InputError(
            f'{record.where}: has no "text" but {quote(text)}; expected {{"text": "..."}}, or '
            "instead of the string a list of [string, how much it counts as a target]"
        )
    return _checked(record, [Piece(string, float(weight)) for string, weight in given])


def conversation(record: Fields) -> tuple[Piece, ...]:
    """What a record of chat holds; nothing where every message is empty."""
    found = []
    for message in record.objects("messages"):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in MARKERS:
            raise message.refuse("role", f"one of {', '.join(MARKERS)}: change or drop the message")
        if not isinstance(content, str):
            raise message.refuse(
                "content", "a string: write parts as one text, and drop a message without text"
            )
        if MARKERS[role]:
            found.append(Piece(MARKERS[role], 0.0, marker=True))
        found.append(Piece(content, float(role == ASSISTANT)))
    said = any(piece.text for piece in found if not piece.marker)
    return _checked(record, found) if said else ()


def _checked(record, found):
    """The pieces, without empty ones but the last, whose weight the end has; none without text."""
    *before, last = found
    kept = (*(piece for piece in before if piece.text), last)
    for piece in kept:
        at = bad_character(piece.text)
        if at is not None:
            raise InputError(
                f"{record.where}: the text {quote(piece.text, 60)} has half of a surrogate pair, "
                f"{ascii(piece.text[at])}, as its character {at}; write the whole character or "
                "remove it"
            )
    return kept if any(piece.text for piece in kept) else ()


def _is_weight(value: Any) -> bool:
    return is_number(value) and 0 <= value <= float(np.finfo(np.float32).max)


def _has_record_lines(text):
    """Whether a .json file is in fact .jsonl: its first line is an object with what we read."""
    first = next((line for line in text.lstrip("\ufeff").split("\n") if line.strip()), "")
    if not re.match(r"\s*\{", first):
        return False
    try:
        value = parse_json(first, "", _WATCHED)
    except InputError:
        return False
    return isinstance(value, dict) and not {"text", "messages"}.isdisjoint(value)


def _lines(file, text):
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            where = f"{file}:{number}"
            yield number, Fields(parse_json(line, where, _WATCHED), where)


def _entries(file, text):
    found = parse_json(text.removeprefix("\ufeff"), str(file), _WATCHED)
    for number, value in enumerate(found, 1):
        if not isinstance(value, dict):
            raise InputError(
                f"{file}:{number}: this entry of the list is {quote(value)}; expected an object "
                'with "text" or "messages". To train on the text of a .json file, name it .txt'
            )
        yield number, Fields(value, f"{file}:{number}")
