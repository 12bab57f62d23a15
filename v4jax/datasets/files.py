"""Documents out of files: texts, conversations, arrays of ids."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from v4jax.datasets.records import Piece, conversation, own_name, pieces, read_text, records
from v4jax.errors import InputError
from v4jax.files.regular import check_regular

# Tests, programs of their own, packages that later Pythons dropped, and tables rather than code.
LEFT_OUT = {"__pycache__", "config", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3"}
LEFT_OUT |= {"pydoc_data", "site-packages", "dist-packages", "test", "tests", "turtledemo"}
_GIVE = "give a file, a directory or a glob"


class Document(NamedTuple):
    """Pieces of text; a name to tell held-out ones by."""

    name: str
    pieces: tuple[Piece, ...]


def find(path: str, suffixes: tuple[str, ...] | None = None) -> list[Path]:
    """The files of a path: itself, all in a directory, or those that a glob names.

    Raises:
      InputError: there is none.
    """
    root = Path(path)
    if root.is_dir():
        found = sorted(p for p in root.rglob("*") if p.is_file())
    elif os.path.exists(root):
        check_regular(root, _GIVE)
        found = [root]
    else:
        found = sorted(Path(p) for p in glob.glob(path, recursive=True) if os.path.isfile(p))
    found = [p for p in found if suffixes is None or p.suffix in suffixes]
    if not found:
        kinds = f" ({' or '.join(suffixes)})" if suffixes else ""
        raise InputError(f"{path}: no data file{kinds} there; {_GIVE}")
    return found


def text_documents(path: str) -> list[Document]:
    """Each file a document; each record of a .jsonl or .json file its "text", under its "name".

    A "text" may be a list of [string, how much its tokens count as targets: 1, 0, or any weight].
    Empty ones are skipped, and their number is logged.

    Raises:
      InputError: a file or record that cannot be read, named; or all of them are empty.
    """
    found = _Documents(path)
    for file in find(path):
        name = _name(file, path)
        read = records(file) if file.suffix in (".jsonl", ".json") else None
        if read is None:
            text = read_text(file)
            found.add(name, (Piece(text),) if text else (), f"{file}: is an empty data file")
        else:
            found.add_records(name, file, read, pieces, "text")
    return found.checked()


def chat_documents(path: str) -> list[Document]:
    """Each record of .jsonl files a conversation, {"messages": [{"role", "content"}, ...]}.

    A single file, or those of a glob, may be .json too. Conversations without text are skipped.

    Raises:
      InputError: as `text_documents`.
    """
    found = _Documents(path)
    suffixes = (".jsonl",) if Path(path).is_dir() else (".jsonl", ".json")
    for file in find(path, suffixes):
        read = records(file)
        if read is None:
            raise InputError(
                f"{file}: holds neither a list of conversations nor one in each line; expected "
                '{"messages": [{"role", "content"}, ...]} in each'
            )
        found.add_records(_name(file, path), file, read, conversation, "messages")
    return found.checked()


class _Documents:
    """The documents of a path that hold text, and which ones do not."""

    def __init__(self, path: str):
        self._path, self._found, self._empty = path, [], []

    def add(self, name: str, pieces: tuple[Piece, ...], complaint: str) -> None:
        """Adds a document; without pieces it is empty, and the complaint says so."""
        if pieces:
            self._found.append(Document(name, pieces))
        else:
            self._empty.append(complaint)

    def add_records(self, name: str, file: Path, read, pieces_of: Callable, key: str) -> None:
        """Adds a document of each record of a file."""
        number = None
        for number, record in read:
            own = own_name(record) if key == "text" else None
            complaint = f'{record.where}: has no "{key}" that is not empty'
            self.add(own or f"{name}:{number}", pieces_of(record), complaint)
        if number is None:
            self._empty.append(f"{file}: is an empty data file")

    def checked(self) -> list[Document]:
        if not self._found:
            others = f", nor has any of {len(self._empty)} documents" * (len(self._empty) > 1)
            raise InputError(f"{self._empty[0]}{others}; remove it or give another")
        if self._empty:
            logging.warning(
                "%s: %d of %d documents hold no text and are skipped (%s)",
                self._path,
                len(self._empty),
                len(self._empty) + len(self._found),
                self._empty[0],
            )
        return self._found


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
            documents.append(Document("/".join(parts), (Piece(text),)))
    return documents


def token_arrays(path: str) -> dict[str, np.ndarray]:
    """One-dimensional arrays of ids, memory-mapped, by file.

    Raises:
      InputError: a file that is no .npy file, or holds something else.
    """
    arrays = {}
    for file in find(path, (".npy",)):
        check_regular(file, _GIVE)
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy raises whatever a damaged header leads to
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{file}: is no .npy file ({reason}); save ids with np.save") from None
        if not isinstance(array, np.ndarray):  # an .npz under another name
            raise InputError(f"{file}: holds several arrays; save each row of ids with np.save")
        if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
            raise InputError(
                f"{file}: holds {str(array.dtype)[:200]} {list(array.shape)}; expected a row of "
                "integer ids"
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
