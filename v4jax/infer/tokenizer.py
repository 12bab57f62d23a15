"""Text to token ids and back, with the tokenizer.json that lies beside a checkpoint."""

import json
from pathlib import Path

import tokenizers

from v4jax.checkpoints.load import locate
from v4jax.errors import InputError

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """The tokenizer of one checkpoint directory.

    Args:
      directory: a checkpoint's, or "nano"; holds tokenizer.json and, where the checkpoint has one,
        tokenizer_config.json. Of the latter only `add_bos_token` counts: when true, encoded text
        starts with `bos_token`.
    """

    def __init__(self, directory):
        directory = Path(locate(directory))
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise InputError(
                f"there is no tokenizer at {path}; put the checkpoint's tokenizer.json there, or "
                "give token ids with --prompt_ids"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for whatever it dislikes
            raise InputError(
                f"{path} cannot be read as a tokenizer ({error}); fetch the file again, or give "
                "token ids with --prompt_ids"
            ) from error
        self._first_ids = self._read_first_ids(directory / "tokenizer_config.json")

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # bytes of a command line that are no UTF-8
            raise InputError(f"the text {text!r} is not valid Unicode; give it as UTF-8") from error
        ids = self._tokenizer.encode(text).ids
        if ids[: len(self._first_ids)] != self._first_ids:
            ids = self._first_ids + ids
        return ids

    def decode(self, ids) -> str:
        """The text of the ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> "TextStream":
        return TextStream(self)

    def _read_first_ids(self, path):
        if not path.is_file():
            return []
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON ({error}); fetch the file again") from error
        if not config.get("add_bos_token"):
            return []
        token = config.get("bos_token")
        token = token["content"] if isinstance(token, dict) else token
        token_id = None if token is None else self._tokenizer.token_to_id(token)
        if token_id is None:
            raise InputError(
                f"{path} sets add_bos_token with the bos_token {token!r}, which tokenizer.json "
                "does not have; expected one of its tokens: correct either file"
            )
        return [token_id]


class TextStream:
    """Decodes ids one by one to pieces of text that join to the text of them all.

    A character may be spread over several tokens: its text is held back until the last of them.
    Only the ids since the last whole piece are decoded again, with the piece before them, because
    some tokenizers decode a token otherwise at the start of a text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before = []
        self._waiting = []

    def add(self, token: int) -> str:
        """The text that this id completes, perhaps empty."""
        self._waiting.append(token)
        text = self._new_text()
        if not text or text.endswith(_BROKEN):
            return ""
        self._before, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """What is still held back, broken characters shown as the replacement character."""
        text = self._new_text()
        self._before, self._waiting = self._waiting, []
        return text

    def _new_text(self):
        known = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._waiting)[len(known) :]
