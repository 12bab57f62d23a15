"""Text to token ids and back, with the tokenizer.json that lies beside a checkpoint."""

from pathlib import Path
from typing import Any

from v4jax.checkpoints.load import locate
from v4jax.errors import InputError
from v4jax.files.json_reader import bad_character, quote, read_fields
from v4jax.files.tokenizer_json import of_text, read_tokenizer

_WATCHED = frozenset({"add_bos_token", "bos_token", "content"})
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def _byte_characters():
    """Character -> byte, as byte-level tokenizers write bytes: those that print as themselves."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    table = {chr(byte): byte for byte in printed}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()


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
        if not path.exists():
            raise InputError(
                f"there is no tokenizer at {path}; put the checkpoint's tokenizer.json there, or "
                "give token ids with --prompt_ids"
            )
        cure = "fetch the file again, or give token ids with --prompt_ids"
        self._path = path
        self._guidance: dict[int, Any] = {}
        self._tokenizer = read_tokenizer(path, cure)
        self._of_text = of_text(self._tokenizer)
        self._first_ids = self._read_first_ids(directory / "tokenizer_config.json")

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """The ids of a text.

        Args:
          special_tokens: whether special tokens that the text spells out, such as "<|eos|>", become
            their ids; otherwise they are text like any other.

        Raises:
          InputError: half of a surrogate pair: bytes of a command line that are no UTF-8.
        """
        if bad_character(text) is not None:
            raise InputError(f"the text {quote(text)} is not valid Unicode; give it as UTF-8")
        ids = (self._tokenizer if special_tokens else self._of_text).encode(text).ids
        if ids[: len(self._first_ids)] != self._first_ids:
            ids = self._first_ids + ids
        return ids

    def special_id(self, name: str) -> int | None:
        """The id of an added token, such as "<|eos|>"; None where there is none of that name."""
        added = self._tokenizer.get_added_tokens_decoder()
        return next((i for i, token in added.items() if token.content == name), None)

    def decode(self, ids, special_tokens: bool = False) -> str:
        """The text of the ids, without special tokens or with those spelled out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=not special_tokens)

    def piece(self, token: int) -> str | bytes | None:
        """What an id stands for alone: an added token's name, else bytes; None for no such id."""
        added = self._tokenizer.get_added_tokens_decoder().get(token)
        if added is not None:
            return added.content
        written = self._tokenizer.id_to_token(token)
        if written is None or type(self._tokenizer.decoder).__name__ != "ByteLevel":
            return None if written is None else self.decode([token])
        return bytes(_BYTES[character] for character in written)

    def stream(self) -> "TextStream":
        return TextStream(self)

    def guidance(self, eos: int) -> Any:
        """The same tokenizer as llguidance has it; made once, which takes a second for 129,280."""
        if eos not in self._guidance:
            from llguidance import LLTokenizer

            self._guidance[eos] = LLTokenizer(self._path.read_text(), eos_token=eos)
        return self._guidance[eos]

    def _read_first_ids(self, path):
        if not path.exists():
            return []
        config = read_fields(path, watched=_WATCHED, cure="fetch the file again")
        if not config.boolean("add_bos_token", False):
            return []
        token = config.get("bos_token")
        if isinstance(token, dict):
            token = config.object("bos_token").string("content")
        elif token is not None:
            token = config.string("bos_token")
        token_id = None if token is None else self._tokenizer.token_to_id(token)
        if token_id is None:
            raise InputError(
                f"{path} sets add_bos_token with the bos_token {quote(token)}, which "
                "tokenizer.json does not have; expected one of its tokens: correct either file"
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
        self._before: list[int] = []
        self._waiting: list[int] = []

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
