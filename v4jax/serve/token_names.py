"""How a token is written where it stands alone: its text, or its bytes where they are no text."""

from v4jax.infer.tokenizer import Tokenizer


class TokenNames:
    """The tokens of one tokenizer, as the Completions API writes them.

    Args:
      bos, eos: ids of the model, or None.
    """

    def __init__(self, tokenizer: Tokenizer, bos: int | None, eos: int | None):
        self._tokenizer, self.bos_id, self.eos_id = tokenizer, bos, eos
        self._known: dict[int, str] = {}

    @property
    def bos(self) -> str | None:
        return None if self.bos_id is None else self.name(self.bos_id)

    @property
    def eos(self) -> str | None:
        return None if self.eos_id is None else self.name(self.eos_id)

    def name(self, token: int) -> str:
        """A text, "bytes:\\xe2\\x82" for a part of a character, "token_id:7" for what has none."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def by_name(self, alternatives: list[tuple[int, float]]) -> dict[str, float]:
        """Log-probabilities by name; of two tokens with one name the second goes by its id."""
        found: dict[str, float] = {}
        for token, logprob in alternatives:
            name = self.name(token)
            found[f"token_id:{token}" if name in found else name] = logprob
        return found

    def encode(self, text: str, bos: bool) -> list[int]:
        """Ids of a text, in which nothing is special; `bos`: with that token in front."""
        ids = self._tokenizer.encode(text)
        if self.bos_id is not None:
            ids = ids[1:] if ids[:1] == [self.bos_id] else ids
            ids = [self.bos_id, *ids] if bos else ids
        return ids

    def _find(self, token):
        piece = self._tokenizer.piece(token)
        if piece is None:
            return f"token_id:{token}"
        if isinstance(piece, str):
            return piece
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
