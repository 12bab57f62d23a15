"""Answers that obey a grammar: which tokens may come next, by llguidance (the extra `grammar`).

A grammar is text of one of three kinds. Its matcher walks along with one answer, and says before
every choice which tokens keep the answer within the grammar.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from v4jax.engine.choice import WORD
from v4jax.errors import InputError
from v4jax.extras import require

KINDS = ("json_schema", "regex", "lark")


@runtime_checkable
class Matcher(Protocol):
    """Where an answer stands in its grammar."""

    def allowed(self) -> np.ndarray:
        """uint32 words, a bit for each token that may come next."""
        ...

    def advance(self, token: int) -> None:
        """Takes the next token."""
        ...

    def walk(self, drafts: Sequence[int]) -> list[np.ndarray]:
        """`allowed` before each draft that the grammar permits and behind the last of them."""
        ...

    def done(self) -> bool:
        """Whether nothing can follow."""
        ...


@runtime_checkable
class Constraint(Protocol):
    """What `Request.constraint` takes; `Grammar` is one."""

    def matcher(self, tokenizer: Any, eos: int | None) -> Matcher:
        """A matcher for one answer.

        Raises:
          InputError: a grammar that says nothing, or cannot be read.
        """
        ...


class Grammar(NamedTuple):
    """A grammar that an answer has to obey.

    Attributes:
      kind: "json_schema" (of the whole answer), "regex" (Rust's syntax) or "lark" (llguidance's
        dialect).
      text: the grammar; a schema may be a dict.
    """

    kind: str
    text: Any

    def matcher(self, tokenizer: Any, eos: int | None) -> Matcher:
        """See `Constraint`."""
        require("llguidance", "grammar", "an answer that obeys a grammar")
        import llguidance as guidance

        if self.kind not in KINDS:
            raise InputError(f"the grammar is of kind {self.kind!r}; expected one of {KINDS}")
        if tokenizer is None:
            raise InputError(
                "a request has a grammar and the engine no tokenizer; make it with Engine(..., "
                "tokenizer=...)"
            )
        if eos is None:
            raise InputError(
                "a request has a grammar and the model no end token (eos_token_id), which is how "
                "the answer ends; set it in config.json"
            )
        return _GuidanceMatcher(guidance, self._compiled(guidance), tokenizer.guidance(eos))

    def _compiled(self, guidance):
        of = getattr(guidance.LLMatcher, f"grammar_from_{self.kind}")
        text = self.text if isinstance(self.text, str) else json.dumps(self.text)
        try:
            return of(text)
        except Exception as error:
            raise self._refused(error) from error

    def _refused(self, error):
        first = str(error).strip().partition("\n")[0]
        return InputError(
            f"the {self.kind} grammar {str(self.text)[:100]!r} cannot be used: {first[:300]}; "
            "correct it"
        )


class _GuidanceMatcher:
    """A matcher of llguidance."""

    def __init__(self, guidance, grammar, tokenizer):
        self._matcher = guidance.LLMatcher(tokenizer, grammar)
        if self._matcher.is_error():
            error = self._matcher.get_error().strip().partition("\n")[0]
            raise InputError(f"the grammar cannot be used: {error[:300]}; correct it")

    def allowed(self):
        bits = self._matcher.compute_bitmask()
        return np.frombuffer(bits + bytes(-len(bits) % 4), "<u4")

    def advance(self, token):
        self._matcher.consume_token(token)

    def walk(self, drafts):
        legal = self._matcher.validate_tokens(list(drafts))
        masks = [self.allowed()]
        for token in drafts[:legal]:
            self._matcher.consume_token(token)
            masks.append(self.allowed())
        self._matcher.rollback(legal)
        return masks

    def done(self):
        return self._matcher.is_stopped()


def fitted(allowed_W: np.ndarray, words: int) -> np.ndarray:
    """As many words as the model's vocabulary has; tokens that only it has may not come."""
    fit = np.zeros(words, np.uint32)
    count = min(words, len(allowed_W))
    fit[:count] = allowed_W[:count]
    return fit


assert WORD == 32  # llguidance's words too
