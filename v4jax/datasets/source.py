"""Opens what a `DataConfig` names: rows to train on, and what is needed to know them again."""

import dataclasses
import hashlib
import re
from pathlib import Path

import numpy as np
import tokenizers

from v4jax.config import ModelConfig
from v4jax.datasets import files, tokenize
from v4jax.datasets.chat_rows import ChatRows, Renderer, held_out_tokens
from v4jax.datasets.config import SYNTHETIC, DataConfig
from v4jax.datasets.rows import SyntheticRows, TextRows
from v4jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Source:
    """Data ready to be read.

    Attributes:
      rows: what to train on. held_out: tokens of documents kept apart, or None.
      held_out_bytes: of their text. counts_V: how often each id occurs in the training text (None
        for synthetic data). tokenizer: of text. fingerprint: of all that the rows depend on.
      names: of the documents to train on, in their order; empty where they have none. packed: as of
        `DataConfig`.
    """

    rows: TextRows | SyntheticRows | ChatRows
    fingerprint: str
    held_out: tokenize.Tokens | None = None
    held_out_bytes: int = 0
    counts_V: np.ndarray | None = None
    tokenizer: tokenizers.Tokenizer | None = None
    names: tuple[str, ...] = ()
    packed: bool = True

    def rows_of(self, pattern: str | None) -> TextRows | SyntheticRows | ChatRows:
        """What to train on; with a pattern, of the documents whose names it is found in.

        Of conversations it chooses among the texts that are mixed in.

        Raises:
          InputError: there is none, or none with a target.
        """
        if pattern is None:
            return self.rows
        kept = np.array([re.search(pattern, name) is not None for name in self.names], bool)
        if not kept.any():
            some = ", ".join(self.names[:3]) or "none has one"
            raise InputError(
                f"a stage's documents is {pattern!r}, which no document's name matches (names: "
                f"{some}{', ...' if self.names[3:] else ''}); change it, or leave it out"
            )
        of = self.rows.text if isinstance(self.rows, ChatRows) else self.rows
        tokens = tokenize.select(of.tokens, kept)
        _check_targets(tokens, self.packed, f"a stage's documents {pattern!r}")
        chosen = TextRows(tokens, of.seed)
        return self.rows.mixed_with(chosen) if isinstance(self.rows, ChatRows) else chosen


def open_source(config: DataConfig, model: ModelConfig, tokenizer_at: Path | None = None) -> Source:
    """Reads and tokenises the data.

    Args:
      tokenizer_at: tokenizer.json that an earlier start of the run learnt, if there is one.

    Raises:
      InputError: files that are missing, empty or not what they should be.
    """
    if config.kind in SYNTHETIC:
        rows = SyntheticRows(config.kind, model.vocab_size, config.seed)
        return Source(rows, f"{config.kind} {model.vocab_size} {config.seed}")
    if config.kind == "conversations":
        return _conversations(config, model, tokenizer_at)
    if config.kind == "tokens":
        arrays = files.token_arrays(config.path)
        train = {k: v for k, v in arrays.items() if not files.is_held_out(k, config.held_out)}
        kept = {k: v for k, v in arrays.items() if k not in train}
        if not train:
            raise _nothing_left(config)
        both = [tokenize.join(_some(a), _eos(model), model.vocab_size) for a in (train, kept)]
        return _source(config, model, both)
    documents = _documents(config)
    kept = [d for d in documents if files.is_held_out(d.name, config.held_out)]
    train = [d for d in documents if not files.is_held_out(d.name, config.held_out)]
    if not train:
        raise _nothing_left(config)
    tokenizer = _tokenizer(config, model, train, tokenizer_at)
    marks = (model.bos_token_id, _eos(model))
    keep_at = None if tokenizer_at is None else tokenizer_at.parent
    both = [
        tokenize.encode_once(part, tokenizer, *marks, keep_at, config.special_tokens)
        if part
        else None
        for part in (train, kept)
    ]
    nbytes = sum(len(text.encode()) for d in kept for text, *_ in d.pieces)
    names = tuple(d.name for d in train)
    source = _source(config, model, both, names)
    return dataclasses.replace(source, tokenizer=tokenizer, held_out_bytes=nbytes)


def _conversations(config, model, tokenizer_at):
    """Conversations, mixed with the rows of a text where there is one."""
    tokenizer = tokenize.load(config.tokenizer)
    renderer, text = Renderer(tokenizer), None
    if config.path is not None:
        text = open_source(dataclasses.replace(config, kind="text", share=1.0), model, tokenizer_at)
    kept = held_out_tokens(renderer, config.seed)
    tokenize.check(kept, model.vocab_size)
    digest = hashlib.sha256(repr((config.seed, config.share, text and text.fingerprint)).encode())
    digest.update(tokenizer.to_str().encode())
    for array in kept:  # they change with whatever makes conversations
        digest.update(np.ascontiguousarray(array))
    return Source(
        ChatRows(renderer, config.seed, None if text is None else text.rows, config.share),
        digest.hexdigest(),
        kept,
        tokenizer=tokenizer,
        names=() if text is None else text.names,
        packed=config.packed,
    )


def _nothing_left(config):
    return InputError(
        f"data.held_out {config.held_out} leaves no document to train on; lower it or give more"
    )


def _some(arrays):
    return arrays or {"": np.zeros(0, np.int32)}


def _documents(config):
    if config.kind == "python":
        return files.python_documents()[: config.documents]
    read = files.text_documents if config.kind == "text" else files.chat_documents
    return read(config.path)[: config.documents]


def _source(config, model, both, names=()):
    train, kept = both
    for part in both:
        if part is not None:
            tokenize.check(part, model.vocab_size)
    _check_targets(train, config.packed, str(config.path)[:200])
    digest = hashlib.sha256(repr((config.seed, config.packed, names)).encode())
    for array in train:
        digest.update(np.ascontiguousarray(array))
    count_V = np.bincount(train.ids, minlength=model.vocab_size)
    kept = None if kept is None or not kept.ids.size else kept
    rows = TextRows(train, config.seed)
    packed = config.packed
    return Source(rows, digest.hexdigest(), kept, counts_V=count_V, names=names, packed=packed)


def _check_targets(tokens, packed, where):
    """Refuses what nothing could be learnt from: no step would have a loss."""
    target = tokens.counts != 0
    target[tokens.starts if packed else 0] = False  # nothing stands before them to predict them
    if not target.any():
        raise InputError(
            f"{where}: none of its {target.size} tokens is a target; expected some behind the "
            "first of their document, in conversations the assistant's words"
        )


def _tokenizer(config, model, documents, at):
    if config.tokenizer not in ("bytes", "train"):
        return tokenize.load(config.tokenizer)
    if at is not None and at.exists():
        return tokenize.load(str(at.parent))
    size = tokenize.BYTES
    if config.tokenizer == "train":
        size = config.tokenizer_size or model.vocab_size
    if size > model.vocab_size or (model.bos_token_id, _eos(model)) != (0, 1):
        raise InputError(
            f"a learnt tokenizer has {size} ids with begin 0 and end 1, and the model vocab_size "
            f"{model.vocab_size} with {model.bos_token_id} and {_eos(model)}; make them agree"
        )
    return tokenize.learn(documents, size)


def _eos(model):
    eos = model.eos_token_id
    return eos[0] if isinstance(eos, tuple) else eos
