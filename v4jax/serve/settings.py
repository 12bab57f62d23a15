"""What an operator decides: names, limits, what is kept."""

import dataclasses
from pathlib import Path

from v4jax.errors import InputError

PROFILES = ("v4-ga", "v4-preview")
RETENTION = ("none", "metadata", "full")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The server's settings.

    Attributes:
      name: of the model, as clients call it. profile: of the chat format; see inference.md, 5.2.
      keys: the key file; None: everybody on this machine may ask.
      audit: directory of the audit log; None: no log. retention: "none" keeps nothing but
        counters, "metadata" a line a request, "full" the texts too. keep_days: for how long.
      max_body_bytes, max_prompt_tokens: of one request; None: as many as a slot holds.
      max_waiting: requests that wait for a slot; more are refused with 429.
      max_waiting_seconds: for a slot; longer waits end with 503.
      body_seconds, header_seconds: in which a client must have sent its request.
      keep_alive_seconds: between comments on a stream that has nothing to say.
      progress_seconds: between lines of the log that say how far warming up is.
      drain_seconds: that running answers have to finish once the server is told to stop.
      max_choices: prompts times `n` of one completions request.
    """

    name: str
    profile: str = "v4-ga"
    keys: Path | None = None
    audit: Path | None = None
    retention: str = "none"
    keep_days: int = 30
    max_body_bytes: int = 8 << 20
    max_prompt_tokens: int | None = None
    max_waiting: int = 256
    max_waiting_seconds: float = 120.0
    body_seconds: float = 30.0
    header_seconds: float = 15.0
    keep_alive_seconds: float = 10.0
    progress_seconds: float = 5.0
    drain_seconds: int = 120
    max_choices: int = 128

    def __post_init__(self):
        for name, values in (("profile", PROFILES), ("retention", RETENTION)):
            if getattr(self, name) not in values:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(values)}"
                )
        for name in ("keep_days", "max_body_bytes", "max_waiting", "drain_seconds", "max_choices"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if (self.audit is None) != (self.retention == "none"):
            there = "no" if self.audit is None else "an"
            raise InputError(
                f"retention is {self.retention!r} and there is {there} audit directory; expected "
                "one with metadata and full, and none with none: give --audit DIR, or "
                "--retention none"
            )
