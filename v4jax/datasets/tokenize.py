"""Documents to one array of ids, with the tokenizer that the run keeps next to its checkpoints."""

import hashlib
import os
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Float, Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from v4jax.datasets.files import Document
from v4jax.errors import InputError
from v4jax.files.atomic import replacing
from v4jax.files.regular import check_regular
from v4jax.files.tokenizer_json import of_text, read_tokenizer
from v4jax.files.writing import writing

BOS, EOS = "<|bos|>", "<|eos|>"
BYTES = 258  # every byte, a begin and an end


class Tokens(NamedTuple):
    """Documents end to end.

    ids [N] int32. starts: where each document begins. counts [N]: how much each counts as a target.
    """

    ids: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " d"]
    counts: Float[np.ndarray, " n"]


def learn(documents: list[Document], size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of at most `size` ids; the same texts always give the same one."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for document in documents for text, *_ in document.pieces)
    tokenizer.train_from_iterator(texts if size > BYTES else [], trainer)
    return tokenizer


def load(directory: str) -> tokenizers.Tokenizer:
    """The tokenizer.json of a directory."""
    return read_tokenizer(
        Path(directory) / "tokenizer.json",
        "data.tokenizer is 'bytes', 'train' or a directory with a tokenizer.json",
    )


def encode_once(
    documents: list[Document],
    tokenizer: tokenizers.Tokenizer,
    bos: int | None,
    eos: int | None,
    directory: Path | None = None,
    special_tokens: bool = False,
) -> Tokens:
    """`encode`, whose result is kept in a directory for the next start."""
    if directory is None:
        return encode(documents, tokenizer, bos, eos, special_tokens)
    about = (bos, eos, "special_tokens", special_tokens)
    digest = hashlib.sha256(tokenizer.to_str().encode() + repr(about).encode())
    for document in documents:
        digest.update(repr(document).encode())
    path = directory / f"tokens_{digest.hexdigest()[:16]}.npz"
    kept = _kept(path)
    if kept is not None:
        return kept
    tokens = encode(documents, tokenizer, bos, eos, special_tokens)
    _keep(path, tokens)
    return tokens


def _keep(path, tokens):
    # A name of its own first: other processes of the run may be writing the same at the same time.
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with writing(path):
        with replacing(own) as fd, os.fdopen(os.dup(fd), "wb") as file:
            np.savez(file, **tokens._asdict())
        os.replace(own, path)


def _kept(path):
    """What an earlier start has encoded; None where it is not there, cut off or damaged."""
    if not os.path.lexists(path):
        return None
    check_regular(path)
    try:
        with np.load(path) as kept:
            tokens = Tokens(*(kept[name] for name in Tokens._fields))
        whole = tokens.ids.shape == tokens.counts.shape and tokens.starts[-1] < tokens.ids.size
    except Exception:  # numpy and zipfile raise whatever the damage leads to
        return None
    return tokens if whole else None


def encode(
    documents: list[Document],
    tokenizer: tokenizers.Tokenizer,
    bos: int | None,
    eos: int | None,
    special_tokens: bool = False,
) -> Tokens:
    """All documents, each between its marks of begin and end (those that there are).

    Args:
      special_tokens: whether special tokens that the texts spell out become their ids, as markers
        always do; otherwise they are text like any other.
    """
    ids, counts, starts, at = [], [], [], 0
    ids_of = iter(_encoded_pieces(documents, tokenizer, special_tokens))
    for document in documents:
        encoded = [next(ids_of) for _ in document.pieces]
        says = [piece.weight for piece in document.pieces]
        parts = [[bos]] if bos is not None else []
        marks = [[False]] if bos is not None else []
        parts += encoded + ([[eos]] if eos is not None else [])
        marks += [[t] * len(e) for t, e in zip(says, encoded, strict=True)]
        marks += [[says[-1]]] if eos is not None else []
        ids.append(_narrow(np.concatenate([np.asarray(part, np.int64) for part in parts])))
        counts.append(np.concatenate([np.asarray(mark, np.float32) for mark in marks]))
        starts.append(at)
        at += ids[-1].size
    return Tokens(np.concatenate(ids), np.array(starts, np.int64), np.concatenate(counts))


def _encoded_pieces(documents, tokenizer, special_tokens):
    """The ids of each piece of all documents."""
    pieces = [piece for document in documents for piece in document.pieces]
    reader = tokenizer if special_tokens else of_text(tokenizer)
    texts = [piece.text for piece in pieces if not piece.marker]
    of_texts = iter(reader.encode_batch_fast(texts, add_special_tokens=False))
    markers = {piece.text for piece in pieces if piece.marker}
    of_markers = {text: tokenizer.encode(text, add_special_tokens=False).ids for text in markers}
    for piece in pieces:
        yield of_markers[piece.text] if piece.marker else next(of_texts).ids


def _narrow(ids):
    if ids.size and int(ids.max()) >= 2**31:
        raise InputError(
            f"the tokenizer gives the id {int(ids.max())}; expected ids below 2**31, so correct "
            "its tokenizer.json"
        )
    return ids.astype(np.int32)


def join(arrays: dict[str, np.ndarray], eos: int | None, vocab_size: int) -> Tokens:
    """Arrays of ids, of any integer type; a document ends with each `eos`, and with its array.

    Raises:
      InputError: ids that the model does not have, in the type in which they are stored.
    """
    for name, array in arrays.items():
        _check_ids(array, vocab_size, f"{name}: ")
    ids = np.concatenate([np.asarray(array, np.int32) for array in arrays.values()])
    lengths = np.cumsum([0, *(array.size for array in arrays.values())])[:-1]
    ends = np.flatnonzero(ids == eos) + 1 if eos is not None else np.array([], np.int64)
    starts = np.union1d(lengths, ends[ends < ids.size])
    return Tokens(ids, starts.astype(np.int64), np.ones(ids.size, np.float32))


def select(tokens: Tokens, kept: Bool[np.ndarray, " d"]) -> Tokens:
    """The documents that are to be kept."""
    sizes = np.diff(tokens.starts, append=tokens.ids.size)
    here = np.repeat(kept, sizes)
    starts = np.cumsum(sizes[kept]) - sizes[kept]
    return Tokens(tokens.ids[here], starts, tokens.counts[here])


def check(tokens: Tokens, vocab_size: int) -> None:
    """Refuses ids that the model does not have."""
    _check_ids(tokens.ids, vocab_size)


def _check_ids(ids, vocab_size, where=""):
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if low < 0 or high >= vocab_size:
        first = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        raise InputError(
            f"{where}the data has token ids from {low} to {high}; expected ids from 0 to below the "
            f"model's vocab_size {vocab_size} (the first other one is {int(ids[first])}, at "
            f"{first})"
        )
