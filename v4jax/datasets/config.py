"""What a run trains on."""

import dataclasses

from v4jax.errors import InputError

KINDS = ("text", "tokens", "chat", "python", "copy", "recall", "needle", "conversations")
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
        (associative recall), "needle" and "conversations" (with a user and with tools; needs a
        tokenizer with the chat's special tokens).
      path: file, directory or glob, of the kinds that read files. Of "conversations" texts to mix
        in, read as "text"; or None.
      tokenizer: "bytes", "train" (byte-level BPE of `tokenizer_size` ids, learnt from the text) or
        a directory with a tokenizer.json.
      tokenizer_size: ids of a learnt tokenizer; None for the model's vocabulary.
      special_tokens: special tokens that a text spells out, such as "<|eos|>", become their ids;
        otherwise text is text, whatever it says.
      packed: attention stays inside documents.
      documents: so many of them at most, the first ones; None for all.
      held_out: part of the documents, chosen by a hash of their names, kept for evaluation.
      share: of "conversations" with a path, the part of the rows that are conversations.
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
    share: float = 1.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"data.kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        either = self.kind == "conversations"
        if not either and (self.path is None) == (self.kind in ("text", "tokens", "chat")):
            needed = "needs a file, directory or glob" if self.path is None else "reads no files"
            raise InputError(f"data.path is {self.path!r} and data.kind {self.kind!r} {needed}")
        if either and self.tokenizer in ("bytes", "train"):
            raise InputError(
                f"data.tokenizer is {self.tokenizer!r} and data.kind {self.kind!r}; expected a "
                "directory whose tokenizer.json has the chat's special tokens"
            )
        if not 0 < self.share <= 1 or (self.share < 1) != (either and self.path is not None):
            raise InputError(
                f"data.share is {self.share}; expected a part above 0 and below 1 of conversations "
                "with a text to mix in, and 1 of all else"
            )
        if self.documents is not None and self.documents < 1:
            raise InputError(f"data.documents is {self.documents}; expected 1 or more, or None")
        if not 0 <= self.held_out < 1:
            raise InputError(f"data.held_out is {self.held_out}; expected a part from 0 to below 1")
        if self.tokenizer_size is not None and self.tokenizer_size < 258:
            raise InputError(
                f"data.tokenizer_size is {self.tokenizer_size}; expected at least 258: 256 bytes, "
                "a begin and an end"
            )
