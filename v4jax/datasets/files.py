"""Documents out of files: texts, conversations, arrays of ids."""

import glob
import hashlib
import json
import math
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np

from v4jax.errors import InputError

# Tests, programs of their own, packages that later Pythons dropped, and tables rather than code.
LEFT_OUT = {"__pycache__", "config", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3"}
LEFT_OUT |= {"pydoc_data", "site-packages", "dist-packages", "test", "tests", "turtledemo"}
ASSISTANT = "assistant"
# The released models' markers; a tokenizer without them spells them out.
MARKERS = {"system": "", "user": "<｜User｜>", ASSISTANT: "<｜Assistant｜>"}


class Document(NamedTuple):
    """Pieces of text and how much each counts as a target; a name to tell held-out ones by."""

    name: str
    pieces: tuple[tuple[str, float], ...]


def find(path: str, suffixes: tuple[str, ...] | None = None) -> list[Path]:
    """The files of a path: itself, all in a directory, or those that a glob names.

    Raises:
      InputError: there is none.
    """
    root = Path(path)
    if root.is_dir():
        found = sorted(p for p in root.rglob("*") if p.is_file())
    else:
        found = [root] if root.is_file() else sorted(map(Path, glob.glob(path, recursive=True)))
    found = [p for p in found if p.is_file() and (suffixes is None or p.suffix in suffixes)]
    if not found:
        raise InputError(f"{path}: no data file there; give a file, a directory or a glob")
    return found


def read(path: Path) -> bytes:
    """A file's content.

    Raises:
      InputError: it cannot be read, or is empty.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not content:
        raise InputError(f"{path}: is an empty data file; remove it or give another")
    return content


def read_text(path: Path) -> str:
    content = read(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not UTF-8 text (byte {error.start}); convert it, or give token ids as .npy"
        ) from None


def text_documents(path: str) -> list[Document]:
    """Each file a document; each line of a .jsonl file its "text", under its "name" if it has one.

    A "text" may be a list of [string, how much its tokens count as targets: 1, 0, or any weight].
    """
    documents = []
    for file in find(path):
        name = _name(file, path)
        if file.suffix == ".jsonl":
            documents += [
                Document(_own_name(line) or f"{name}:{n}", _pieces(file, n, line))
                for n, line in _lines(file)
            ]
        else:
            documents.append(Document(name, ((read_text(file), True),)))
    return documents


def chat_documents(path: str) -> list[Document]:
    """Each line of .jsonl files a conversation, {"messages": [{"role", "content"}, ...]}."""
    return [
        Document(f"{_name(file, path)}:{n}", _conversation(file, n, line))
        for file in find(path, (".jsonl",))
        for n, line in _lines(file)
    ]


def python_documents() -> list[Document]:
    """The standard library's sources and docstrings (PSF licence), which every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        generated = parts[-1].startswith("_sysconfigdata") or "config-" in parts[0]
        if generated or not LEFT_OUT.isdisjoint(parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few old files in other encodings
            continue
        if text:
            documents.append(Document("/".join(parts), ((text, True),)))
    return documents


def token_arrays(path: str) -> dict[str, np.ndarray]:
    """One-dimensional arrays of ids, memory-mapped, by file."""
    arrays = {}
    for file in find(path, (".npy",)):
        read(file)
        try:
            array = np.load(file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: is no .npy file ({error}); save ids with np.save") from None
        if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
            raise InputError(
                f"{file}: holds {array.dtype} {list(array.shape)}; expected a row of integer ids"
            )
        arrays[_name(file, path)] = array
    return arrays


def is_held_out(name: str, share: float) -> bool:
    """Whether a document is kept for evaluation: by its name, so that it stays so."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4]) < share * 2**32


def _name(file, path):
    """A file's name below a directory, wherever that lies: its documents stay held out."""
    root = Path(path)
    return file.relative_to(root).as_posix() if root.is_dir() else file.as_posix()


def _lines(file):
    """The numbered lines of a .jsonl file as dicts."""
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"{file}:{number}: is not JSON ({error})") from None
        if not isinstance(value, dict):
            raise InputError(f"{file}:{number}: is {type(value).__name__}; expected an object")
        yield number, value


def _own_name(line):
    name = line.get("name")
    return name if isinstance(name, str) else None


def _pieces(file, number, line):
    text = line.get("text")
    pieces = text if isinstance(text, list) else [[text, True]]
    for piece in pieces or [None]:
        match piece:
            case [str(string), float(weight) | int(weight)] if string and 0 <= weight < math.inf:
                continue
        raise InputError(
            f'{file}:{number}: has no "text"; expected {{"text": "..."}}, or instead of the string '
            "a list of [string, how much it counts as a target]"
        )
    return tuple((string, float(weight)) for string, weight in pieces)


def _conversation(file, number, line):
    pieces = []
    for message in line.get("messages") or [{}]:
        role, content = message.get("role"), message.get("content")
        if role not in MARKERS or not isinstance(content, str):
            raise InputError(
                f'{file}:{number}: a message has role {role!r}; expected "messages" of '
                f'{{"role", "content"}} with a role of {", ".join(MARKERS)}'
            )
        if MARKERS[role]:
            pieces.append((MARKERS[role], False))
        pieces.append((content, role == ASSISTANT))
    return tuple(pieces)
