"""What a run trains on."""

import dataclasses

from v4jax.errors import InputError

KINDS = ("text", "tokens", "chat", "python", "copy", "recall", "needle")
SYNTHETIC = ("copy", "recall", "needle")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A source of rows.

    Attributes:
      kind: "text" (each file a document; of .jsonl each line's "text", a string or a list of
        [string, weight as targets]; a .json file that is a list of such objects, or has one in each
        line, is read as they are, any other as text), "chat" (.jsonl lines with "messages"; only
        what the assistant says is a target), "tokens" (.npy files of ids),
        "python" (the standard library's sources, on every machine), or synthetic: "copy", "recall"
        (associative recall) and "needle".
      path: file, directory or glob, of the kinds that read files.
      tokenizer: "bytes", "train" (byte-level BPE of `tokenizer_size` ids, learnt from the text) or
        a directory with a tokenizer.json.
      tokenizer_size: ids of a learnt tokenizer; None for the model's vocabulary.
      special_tokens: special tokens that a text spells out, such as "<|eos|>", become their ids;
        otherwise text is text, whatever it says.
      packed: attention stays inside documents.
      documents: so many of them at most, the first ones; None for all.
      held_out: part of the documents, chosen by a hash of their names, kept for evaluation.
      seed: of the order of rows and of synthetic tasks.
    """

    kind: str = "python"
    path: str | None = None
    tokenizer: str = "train"
    tokenizer_size: int | None = None
    packed: bool = True
    documents: int | None = None
    held_out: float = 0.0
    seed: int = 0
    special_tokens: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"data.kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        if (self.path is None) == (self.kind in ("text", "tokens", "chat")):
            needed = "needs a file, directory or glob" if self.path is None else "reads no files"
            raise InputError(f"data.path is {self.path!r} and data.kind {self.kind!r} {needed}")
        if self.documents is not None and self.documents < 1:
            raise InputError(f"data.documents is {self.documents}; expected 1 or more, or None")
        if not 0 <= self.held_out < 1:
            raise InputError(f"data.held_out is {self.held_out}; expected a part from 0 to below 1")
        if self.tokenizer_size is not None and self.tokenizer_size < 258:
            raise InputError(
                f"data.tokenizer_size is {self.tokenizer_size}; expected at least 258: 256 bytes, "
                "a begin and an end"
            )
