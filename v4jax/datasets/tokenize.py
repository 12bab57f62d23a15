"""Documents to one array of ids, with the tokenizer that the run keeps beside its checkpoints."""

import hashlib
import os
import uuid
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Float, Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from v4jax.datasets.files import Document
from v4jax.errors import InputError
from v4jax.files.atomic import replacing
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
    texts = (text for document in documents for text, _ in document.pieces)
    tokenizer.train_from_iterator(texts if size > BYTES else [], trainer)
    return tokenizer


def load(directory: str) -> tokenizers.Tokenizer:
    """The tokenizer.json of a directory."""
    path = Path(directory) / "tokenizer.json"
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for whatever it dislikes
        raise InputError(
            f"{path}: cannot be read as a tokenizer ({error}); data.tokenizer is 'bytes', 'train' "
            "or a directory with a tokenizer.json"
        ) from None


def encode_once(
    documents: list[Document],
    tokenizer: tokenizers.Tokenizer,
    bos: int | None,
    eos: int | None,
    directory: Path | None = None,
) -> Tokens:
    """`encode`, whose result is kept in a directory for the next start."""
    if directory is None:
        return encode(documents, tokenizer, bos, eos)
    digest = hashlib.sha256(tokenizer.to_str().encode() + repr((bos, eos)).encode())
    for document in documents:
        digest.update(repr(document).encode())
    path = directory / f"tokens_{digest.hexdigest()[:16]}.npz"
    try:
        with np.load(path) as kept:
            return Tokens(*(kept[name] for name in Tokens._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there, or cut off
    tokens = encode(documents, tokenizer, bos, eos)
    _keep(path, tokens)
    return tokens


def _keep(path, tokens):
    # A name of its own first: other processes of the run may be writing the same at the same time.
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with writing(path):
        with replacing(own) as fd, os.fdopen(os.dup(fd), "wb") as file:
            np.savez(file, **tokens._asdict())
        os.replace(own, path)


def encode(
    documents: list[Document], tokenizer: tokenizers.Tokenizer, bos: int | None, eos: int | None
) -> Tokens:
    """All documents, each between its marks of begin and end (those that there are)."""
    ids, counts, starts, at = [], [], [], 0
    texts = [text for document in documents for text, _ in document.pieces]
    whole = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    for document in documents:
        encoded = [next(whole) for _ in document.pieces]
        says = [target for _, target in document.pieces]
        parts = [[bos]] if bos is not None else []
        marks = [[False]] if bos is not None else []
        parts += [e.ids for e in encoded] + ([[eos]] if eos is not None else [])
        marks += [[t] * len(e.ids) for t, e in zip(says, encoded, strict=True)]
        marks += [[says[-1]]] if eos is not None else []
        ids.append(np.concatenate([np.asarray(part, np.int32) for part in parts]))
        counts.append(np.concatenate([np.asarray(mark, np.float32) for mark in marks]))
        starts.append(at)
        at += ids[-1].size
    return Tokens(np.concatenate(ids), np.array(starts, np.int64), np.concatenate(counts))


def join(arrays: dict[str, np.ndarray], eos: int | None) -> Tokens:
    """Arrays of ids; a document ends with each `eos`, and with its array."""
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
    low, high = int(tokens.ids.min()), int(tokens.ids.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"the data has token ids from {low} to {high}; expected ids from 0 to below the "
            f"model's vocab_size {vocab_size}"
        )
