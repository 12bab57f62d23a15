"""Prompts of a wanted length: the haystack grows step by step until the next one is too much."""

from collections.abc import Callable

from v4jax.errors import InputError
from v4jax.eval.sample import Measure, Prompt


class NotPossible(InputError):
    """A sample that cannot be made for this target; the run goes on without it."""


class TooShort(NotPossible):
    """A length into which not even the shortest prompt of a task fits."""


def most_steps(
    build: Callable[[int], Prompt], measure: Measure, length: int, budget: int, what: str
) -> int:
    """The most steps of haystack whose prompt and answer fit into `length` tokens.

    Args:
      build: steps -> prompt; more steps are more tokens. budget: tokens of the answer.
      what: the task, for the message.

    Raises:
      TooShort: even the prompt without haystack is too long.
    """
    room = length - budget
    low, least = 0, measure(build(0))
    if least > room:
        raise TooShort(
            f"{what}: the length is {length} tokens, and the shortest prompt has {least} with "
            f"{budget} more for the answer; expected a length of {least + budget} or more"
        )
    high, size = _too_many(build, measure, room, least)
    at_low, at_high = least, size
    while high - low > 1:
        # Where a straight line through both ends meets the room; a bisection where that is stuck.
        guess = low + int((room - at_low) * (high - low) / max(at_high - at_low, 1))
        guess = min(max(guess, low + 1), high - 1)
        for each in (guess, guess + 1, (low + high) // 2):
            if low < each < high:
                found = measure(build(each))
                low, at_low, high, at_high = (
                    (each, found, high, at_high) if found <= room else (low, at_low, each, found)
                )
    return low


def _too_many(build, measure, room, least):
    """A number of steps that does not fit, and its tokens."""
    steps = 1
    while True:
        size = measure(build(steps))
        if size > room:
            return steps, size
        if size <= least and steps > 1024:
            raise InputError("the tokenizer gives more text no more tokens; expected one that does")
        rate = max(size - least, 1) / steps
        steps = max(steps + 1, min(int(1.2 * (room - least) / rate) + 1, 64 * steps))
