"""What is evaluated, as a value that travels to where it is opened."""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from v4jax.eval.suite import Target


@runtime_checkable
class Description(Protocol):
    """Picklable and hashable; what is equal is opened once in a worker."""

    def open(self) -> Target: ...


@dataclasses.dataclass(frozen=True)
class OfEngine:
    """A checkpoint in a process of its own; attributes as `EngineTarget`'s arguments."""

    checkpoint: str
    max_length: int
    slots: int = 1
    style: str | None = None
    prefix_cache: bool = True
    max_positions: int | None = None
    dtype: str | None = None
    numerics: str | None = None
    programs: str | None = None

    def open(self) -> Target:
        """The target; its engine is made when the first question comes."""
        from v4jax.eval.engine_target import EngineTarget

        return EngineTarget(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class OfEndpoint:
    """A model behind HTTP; attributes as `EndpointTarget`'s arguments.

    Attributes:
      tokenizer: checkpoint whose tokenizer the model has; None: unknown.
    """

    url: str
    model: str
    key: str | None = dataclasses.field(default=None, repr=False)
    style: str = "chat"
    tokenizer: str | None = None
    timeout: float = 600.0

    def open(self, tell: Callable[[str], None] = lambda sentence: None) -> Target:
        """The target, once the endpoint has answered; tell: as `EndpointTarget`'s."""
        from v4jax.eval.endpoint import EndpointTarget
        from v4jax.infer.tokenizer import Tokenizer

        return EndpointTarget(
            self.url,
            self.model,
            self.key,
            self.style,
            None if self.tokenizer is None else Tokenizer(self.tokenizer),
            self.timeout,
            tell,
        )
