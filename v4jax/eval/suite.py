"""A suite's run: what there is to do, done in order, each piece recorded as it ends."""

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from v4jax.errors import InputError
from v4jax.eval.fit import NotPossible
from v4jax.eval.records import Key, Records
from v4jax.eval.sample import Answer, Measure, Prompt, Sample, Task


@runtime_checkable
class Target(Protocol):
    """What is evaluated: a model in this process, or an endpoint.

    Attributes:
      name, style: see `STYLES`. identity: what makes answers of two runs comparable.
      max_length: tokens of prompt and answer; None: unknown.
    """

    name: str
    style: str
    identity: dict[str, Any]
    max_length: int | None

    @property
    def measure(self) -> Measure: ...

    def ask(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
        shared: int = 0,
    ) -> Answer: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Job:
    """One record to be made.

    Attributes:
      run: target -> the record's fields besides its key.
    """

    task: str
    length: int
    sample: int
    run: Callable[[Target], dict[str, Any]]

    @property
    def key(self) -> Key:
        return self.task, self.length, self.sample


def jobs_of(
    task: Task, lengths: Sequence[int], samples: int, seed: int, spread: bool = False
) -> list[Job]:
    """So many samples of a task at each length; at even depths where it has them.

    Shallow needles come first: what lies before one is shared with all deeper ones.

    Args:
      spread: all lengths and depths come early instead, for a run that may be cut short.
    """
    keys = [(length, number) for length in lengths for number in range(samples)]
    if spread:
        order = sorted(range(samples), key=_scattered)
        keys = [(length, number) for number in order for length in lengths]
    return [
        Job(task.name, length, number, _Question(task, seed, number, length, depth))
        for length, number in keys
        for depth in [number / max(samples - 1, 1) if task.depths else None]
    ]


def _scattered(number: int) -> float:
    """The number's binary digits behind the point, in reverse: neighbours lie far apart."""
    found, part = 0.0, 0.5
    while number:
        found += part * (number & 1)
        number, part = number >> 1, part / 2
    return found


@dataclasses.dataclass(frozen=True)
class _Question:
    """Makes a sample, asks, scores."""

    task: Task
    seed: int
    number: int
    length: int
    depth: float | None

    def __call__(self, target: Target) -> dict[str, Any]:
        sample = self.task.make(self.seed, self.number, self.length, self.depth, target.measure)
        answer = target.ask(
            sample.prompt, sample.budget, sample.stop, seed=self.number, shared=sample.shared
        )
        try:
            scores = self.task.score(sample, answer.text)
        except Exception as error:
            raise InputError(
                f"the score of {self.task.name} raised {type(error).__name__} for sample "
                f"{self.number} at {self.length} tokens ({str(error)[:200]}); the records before "
                "it are kept: mend the score and run the same command again"
            ) from error
        return record_of(self.seed, sample, answer, scores)


def record_of(seed: int, sample: Sample, answer: Answer, scores: dict[str, float]) -> dict:
    """The fields of a record of one answer."""
    return {
        "seed": seed,
        "depth": sample.depth,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "output_tokens": answer.output_tokens,
        "seconds": round(answer.seconds, 6),
        "first_token_seconds": _rounded(answer.first_token_seconds),
        "finish": answer.finish,
        "answer": answer.text,
        "expected": sample.expected,
        **scores,
    }


def _rounded(seconds):
    return None if seconds is None else round(seconds, 6)


def run(
    jobs: Iterable[Job],
    target: Target,
    records: Records,
    concurrency: int = 1,
    progress: Callable[[dict[str, Any]], None] = lambda record: None,
    deadline: float | None = None,
    skip: Callable[[str], None] = lambda sentence: None,
) -> int:
    """Does what is not recorded yet, so many jobs at a time; how many were left for want of time.

    Args:
      progress: called with each new record.
      deadline: of `time.monotonic`: no job begins after it; None: all are done.
      skip: called with a sentence for each job that cannot be done, such as for a length that is
        too short for its task.

    Raises:
      InputError: the first job that failed; jobs under way are recorded before that, if they can.
    """
    left = [job for job in jobs if job.key not in records.done]
    lock, place = threading.Lock(), iter(left)
    stop = threading.Event()

    def work():
        done = 0
        while not stop.is_set() and (deadline is None or time.monotonic() < deadline):
            with lock:
                job = next(place, None)
            if job is None:
                break
            done += 1
            try:
                fields = job.run(target)
            except NotPossible as error:
                skip(str(error))
                continue
            except BaseException:
                stop.set()
                raise
            record = {"task": job.task, "length": job.length, "sample": job.sample, **fields}
            with lock:
                records.add(record)
                progress(record)
        return done

    return len(left) - _together(work, concurrency, stop)


def _together(work, concurrency, stop):
    """Runs workers side by side; what they did in all. The first error of any is raised."""
    if concurrency == 1:
        return work()
    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(work) for _ in range(concurrency)]
        try:
            return sum(each.result() for each in futures)
        except BaseException:
            stop.set()
            raise
