"""Text that every machine has: the sources and docstrings of Python's own standard library.

They are under the PSF licence, which lets them be used and passed on. Nothing is downloaded. Files
are split by a hash of their names, so that the held-out ones stay the same from one Python to the
next although their text may change.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

BOS, EOS = "<|bos|>", "<|eos|>"
# Tests, programs of their own, packages that later Pythons dropped, and tables rather than code.
LEFT_OUT = {"__pycache__", "config", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3"}
LEFT_OUT |= {"pydoc_data", "site-packages", "dist-packages", "test", "tests", "turtledemo"}
HELD_OUT_SHARE = 0.05
DETACHED_SHARE = 0.02


def source_files() -> dict[str, str]:
    """The text of every file by its name, which is its path in the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        generated = parts[-1].startswith("_sysconfigdata") or "config-" in parts[0]
        if generated or not LEFT_OUT.isdisjoint(parts):
            continue
        try:
            files["/".join(parts)] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few old files in other encodings
            continue
    return files


def is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4]) < HELD_OUT_SHARE * 2**32


def train_tokenizer(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE: every text has ids, and the same texts always give the same tokenizer."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(texts: list[str], tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """All texts in one stream of int32 ids, each between its marks of begin and end."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    encoded = tokenizer.encode_batch(texts)
    return np.concatenate([np.array([bos, *e.ids, eos], np.int32) for e in encoded])


def detach_spaces(stream: np.ndarray, tokenizer: tokenizers.Tokenizer, seed: int) -> np.ndarray:
    """The stream with the space before a word, now and then, as a token of its own.

    A prompt that ends in a space ("def ") ends in that token, which text as the tokenizer cuts it
    hardly ever holds before a word.
    """
    vocab = tokenizer.get_vocab()
    space = vocab["Ġ"]  # how byte-level BPE writes a space
    bare = np.full(len(vocab), -1, np.int32)
    for piece, token in vocab.items():
        if piece.startswith("Ġ") and piece[1:].isidentifier() and piece[1:] in vocab:
            bare[token] = vocab[piece[1:]]
    chosen = np.random.default_rng(seed).random(stream.size) < DETACHED_SHARE
    chosen &= bare[stream] >= 0
    longer = np.repeat(stream, 1 + chosen)
    first = np.flatnonzero(chosen) + np.arange(chosen.sum())
    longer[first] = space
    longer[first + 1] = bare[stream[chosen]]
    return longer


def batches(stream: np.ndarray, batch: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """Rows [batch, length], for ever: each pass cuts the stream elsewhere and shuffles the rows."""
    rng = np.random.default_rng(seed)
    while True:
        starts = np.arange(rng.integers(length), stream.size - length, length)
        rng.shuffle(starts)
        for i in range(0, starts.size - batch + 1, batch):
            yield np.stack([stream[at : at + length] for at in starts[i : i + batch]])


def held_out_rows(stream: np.ndarray, length: int) -> np.ndarray:
    """Rows [n, length] that overlap by one token, so that all but the first one are predicted."""
    starts = np.arange(0, stream.size - length + 1, length - 1)
    return np.stack([stream[at : at + length] for at in starts])


def hash_table(count_V: np.ndarray, experts: int, k: int, seed: int) -> np.ndarray:
    """K distinct experts for each id, [V,K] int32, such that a text loads all experts alike.

    Greedy, from the most frequent id down: the K experts with the least load so far. Ties fall at
    random, so that layers with different seeds pair experts differently.
    """
    rng = np.random.default_rng(seed)
    load = np.zeros(experts)
    table = np.zeros((count_V.size, k), np.int32)
    for token in np.argsort(-count_V, kind="stable"):
        chosen = np.lexsort((rng.random(experts), load))[:k]
        table[token] = chosen
        load[chosen] += count_V[token] + 1
    return table
