"""Targets without a model that workers can open."""

import dataclasses
import os
import signal
from pathlib import Path

from tests.eval.targets import Fake, needle_reader


@dataclasses.dataclass(frozen=True)
class OfFake:
    """Reads needles. After so many answers its worker is killed, unless one was killed before.

    Attributes:
      killed: path of the file that says that one was.
    """

    killed: str
    after: int = 0
    seconds: float = 0.0

    def open(self):
        answers = []

        def answer(prompt, **options):
            answers.append(prompt)
            if self.after and len(answers) > self.after:
                try:
                    Path(self.killed).touch(exist_ok=False)
                except FileExistsError:
                    pass
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
            return needle_reader(prompt)

        return Fake(answer, seconds=self.seconds)
