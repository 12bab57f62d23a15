"""What a task makes and a target answers: prompts, samples and answers, as plain values."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

STYLES = ("chat", "plain", "facts")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is said to a model.

    Attributes:
      messages: turns in the form of the Chat Completions API; the last is the user's or a tool's.
      prefix: how the answer begins, where the target can be given that.
      tools: functions that the model may call, in the form of the same API.
      continues: its text is to be continued as it is, also by a model that can chat.
      schema: JSON schema of the answer, which a target enforces where it can.
    """

    messages: tuple[Mapping[str, Any], ...]
    prefix: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    continues: bool = False
    schema: Mapping[str, Any] | None = None

    @property
    def text(self) -> str:
        """The prompt for a model that continues text: the turns, then how the answer begins."""
        said = "\n".join(str(message.get("content") or "") for message in self.messages)
        return f"{said}\n{self.prefix}" if self.prefix and said else said + self.prefix


def asked(text: str, prefix: str = "", continues: bool = False) -> Prompt:
    """A prompt of one turn."""
    return Prompt(({"role": "user", "content": text},), prefix, continues=continues)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt with what is expected of it.

    Attributes:
      expected: what the score compares with; any JSON.
      budget: tokens that the answer may have.
      depth: how far into the haystack the first needle lies, 0 to 1; None without one.
      stop: texts that end the answer.
      about: what else the score or the record needs, by name.
      shared: how many characters of the prompt's text other samples begin with too; 0: unknown.
    """

    prompt: Prompt
    expected: Any
    budget: int
    depth: float | None = None
    stop: tuple[str, ...] = ()
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shared: int = 0


@dataclasses.dataclass
class Answer:
    """What a target said, and what that took.

    Attributes:
      text: without the prompt's prefix.
      calls: tool calls, {"id", "name", "arguments"}, the arguments as the text that was made.
      first_token_seconds, seconds: from the request to the first token and to the last.
      times: seconds from the request to each piece that came, with its number of tokens.
      finish: "stop", "length", "tool_calls", or what the endpoint says.
    """

    text: str = ""
    calls: list[dict[str, str]] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    first_token_seconds: float | None = None
    times: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    finish: str | None = None


Measure = Callable[[Prompt], int]  # tokens of a prompt, as its model reads it


@dataclasses.dataclass(frozen=True)
class Task:
    """A generator and a score.

    Attributes:
      name: as in records.
      make: (seed, number, length, depth, measure) -> Sample. The same arguments give the same
        bytes. depth is None where the task chooses itself.
      score: (sample, answer's text) -> named scores, 0 to 1; "score" is the one that is reported.
      chance: what a guess without reading scores at most, on average.
      depths: whether samples are laid at even depths.
    """

    name: str
    make: Callable[..., Sample]
    score: Callable[[Sample, str], dict[str, float]]
    chance: float = 0.0
    depths: bool = False


def budget_text(values: Sequence[str]) -> str:
    """Values as a person lists them: a, b and c."""
    *most, last = values
    return f"{', '.join(most)} and {last}" if most else last
