"""The learning rate over a run: linear warm-up, constant, cosine down at the end."""

import dataclasses
import math

from v4jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The report's Flash schedule; where its decay begins is not published.

    Attributes:
      peak, final: learning rates. warm_up: steps of linear rise. decay: steps of cosine fall, the
        last of the run.
    """

    peak: float = 2.7e-4
    final: float = 2.7e-5
    warm_up: int = 2000
    decay: int = 2000

    def __post_init__(self):
        if not 0 < self.peak < math.inf or not 0 <= self.final <= self.peak:
            raise InputError(
                f"schedule.peak is {self.peak} and schedule.final {self.final}; expected "
                "0 <= final <= peak"
            )
        if self.warm_up < 0 or self.decay < 0:
            raise InputError(
                f"schedule.warm_up is {self.warm_up} and schedule.decay {self.decay}; expected "
                "0 or more"
            )

    def check(self, steps: int) -> None:
        """Refuses a run that the schedule does not fit in."""
        if self.warm_up + self.decay > steps:
            raise InputError(
                f"the schedule has {self.warm_up} steps of warm-up and {self.decay} of decay, and "
                f"the run only {steps}; shorten schedule.warm_up and schedule.decay, or train "
                "longer"
            )

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of a run of so many."""
        if step < self.warm_up:
            return self.peak * (step + 1) / self.warm_up
        done = self.decayed(step, steps)
        return self.final + (self.peak - self.final) * (1 + math.cos(math.pi * done)) / 2

    def decayed(self, step: int, steps: int) -> float:
        """How far the decay is: 0 before it, 1 at the last step."""
        begun = step - (steps - self.decay) + 1
        return min(max(begun / self.decay, 0.0), 1.0) if self.decay else 0.0
