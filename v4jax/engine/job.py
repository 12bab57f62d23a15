"""A request on its way through the engine, and choices of tokens that are under way."""

import dataclasses
from typing import Any

from v4jax.engine.answer import Answer
from v4jax.engine.constraint import Matcher
from v4jax.engine.prefixes import Taken
from v4jax.engine.request import Checked
from v4jax.engine.stream import Stream


@dataclasses.dataclass(eq=False)
class Job:
    """A request that has not ended.

    Attributes:
      request, stream, answer: what was asked, the caller's end, the answer so far.
      seed, row: what its tokens are drawn with; see `Request.seed`.
      matcher: where the answer stands in its grammar, or None.
      read: tokens of the prompt that the model has seen.
      asked: new tokens that were asked of the device, known or not.
      scores: log-probabilities of the prompt's tokens, chunk by chunk.
      units: where the prompt's units are taken. on_grid: see `Hit`.
      made: the new tokens, also those that are held back.
      newest: the unit of the last whole page of prompt and answer.
    """

    request: Checked
    stream: Stream
    answer: Answer
    seed: int
    row: int
    matcher: Matcher | None = None
    read: int = 0
    asked: int = 0
    scores: list = dataclasses.field(default_factory=list)
    units: frozenset[int] = frozenset()
    on_grid: bool = True
    made: list[int] = dataclasses.field(default_factory=list)
    newest: Taken | None = None

    @property
    def held(self) -> int:
        """Tokens that the slot's cache holds while the request decodes."""
        return len(self.request.tokens) + self.asked - 1

    @property
    def waits(self) -> bool:
        """Whether its next token can only be chosen once those before it are known."""
        adjustment = self.request.adjustment
        return self.matcher is not None or (adjustment is not None and adjustment.counts)

    @property
    def wants_more(self) -> bool:
        return self.answer.finish is None and self.asked < self.request.max_new_tokens


@dataclasses.dataclass
class Pending:
    """A choice that is under way, and whose token each of its rows is."""

    choice: Any
    jobs: dict[int, Job]
    limit_S: Any = None  # of a round: drafts that each slot could accept
    width: int = 1
    began: float = 0.0
