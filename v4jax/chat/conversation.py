"""A conversation that was read: the engine's request, and what becomes of its answer."""

import dataclasses
from typing import Any

from v4jax.chat.answer import Answer
from v4jax.chat.kept import KeptTurns
from v4jax.chat.recipe import Recipe, Turn
from v4jax.engine.constraint import Constraint
from v4jax.engine.request import Request


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A request of a chat as the engine takes it.

    Attributes:
      tokens: ids up to where the answer begins. max_new_tokens: what was asked for, or all that
        fits behind them.
      sampling: further settings of the engine's request that deepseek-recipe does not know.
      constraint: what the answer has to obey, or None.
      include_usage: whether a stream ends with the counts of tokens.
      stop_ids: ids that end the answer. thinking_end: id that ends its reasoning, if it has any.
      keep_at: where the prompt is worth storing: the last whole page before the final user turn.
      header: the place of the token behind which the answer's turn begins.
    """

    recipe: Recipe
    turn: Turn
    tokens: list[int]
    max_new_tokens: int
    sampling: dict[str, Any]
    constraint: Constraint | None
    include_usage: bool
    stop_ids: frozenset[int]
    thinking_end: int | None
    keep_at: tuple[int, ...]
    header: int
    kept: KeptTurns
    tenant: str

    @property
    def api(self) -> str:
        """Which API it came by."""
        return self.turn.api

    @property
    def stream(self) -> bool:
        """Whether events are asked for."""
        return self.turn.stream

    @property
    def thinking(self) -> bool:
        """Whether the answer begins with reasoning."""
        return self.turn.thinking

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end the content. The answer finds them: in the reasoning they are allowed."""
        return self.turn.stop

    @property
    def temperature(self) -> float:
        return self.turn.settings["temperature"]

    @property
    def top_p(self) -> float:
        return self.turn.settings["top_p"]

    @property
    def seed(self) -> int | None:
        """The engine's seed of 32 bits; None: the engine's own."""
        seed = self.turn.settings["seed"]
        return None if seed is None else (seed ^ seed >> 32) & 0xFFFFFFFF

    @property
    def logprobs(self) -> int | None:
        """None, or how many of the likeliest tokens to name with each."""
        return self.turn.settings["logprobs"]

    @property
    def tools(self) -> tuple[str, ...]:
        """Names of the tools."""
        return tuple(self.turn.tools)

    def request(self, **more: Any) -> Request:
        """The engine's request.

        Args:
          more: further fields, such as salt, priority and request_id.
        """
        fields = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop_ids": self.stop_ids,
            "logprobs": self.logprobs,
            "constraint": self.constraint,
            "keep_at": self.keep_at,
        }
        return Request(self.tokens, **(fields | self.sampling | more))

    def answer(self, request_id: str) -> Answer:
        """What takes the engine's tokens and makes events of them."""
        return Answer(
            self.recipe,
            self.turn,
            request_id,
            prompt=self.tokens,
            header=self.header,
            stop_ids=self.stop_ids,
            thinking_end=self.thinking_end,
            include_usage=self.include_usage,
            keep=self._keep,
        )

    def _keep(self, said, header, tokens):
        self.kept.keep(self.tenant, said, header, tokens)
