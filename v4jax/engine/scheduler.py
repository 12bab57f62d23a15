"""Who waits, who reads a prompt, who decodes: plain bookkeeping, no arrays.

One request at a time reads its prompt; it holds a slot from then to its last token. The queue goes
by priority, then by arrival.
"""

import heapq
import itertools
from typing import Generic, TypeVar

Job = TypeVar("Job")


class Scheduler(Generic[Job]):
    """The queue and the slots.

    Args:
      slots: how many requests can be read or decoded at once.
    """

    def __init__(self, slots: int):
        self._queue: list[tuple[int, int, Job]] = []
        self._arrivals = itertools.count()
        self._free = list(range(slots))
        self._decoding: dict[int, Job] = {}
        self.reading: tuple[int, Job] | None = None

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._queue)

    @property
    def busy(self) -> int:
        """Slots that are taken."""
        return len(self._decoding) + (self.reading is not None)

    @property
    def decoding(self) -> dict[int, Job]:
        """The requests that make tokens, by slot, lowest first."""
        return dict(sorted(self._decoding.items()))

    def jobs(self) -> list[Job]:
        """Every request that has not ended."""
        reading = [] if self.reading is None else [self.reading[1]]
        return [*self._decoding.values(), *reading, *(job for _, _, job in sorted(self._queue))]

    def submit(self, job: Job, priority: int = 0) -> None:
        """Puts a request into the queue; a larger priority leaves it first."""
        # Arrivals differ, so that two entries never compare jobs.
        heapq.heappush(self._queue, (-priority, next(self._arrivals), job))

    def admit(self) -> tuple[int, Job] | None:
        """The next request and its slot, which reads from now on; None if nothing can begin."""
        if self.reading is not None or not self._free or not self._queue:
            return None
        job = heapq.heappop(self._queue)[2]
        self.reading = (self._free.pop(0), job)
        return self.reading

    def start_decoding(self) -> None:
        """The prompt that is being read is read."""
        assert self.reading is not None
        slot, job = self.reading
        self._decoding[slot], self.reading = job, None

    def remove(self, job: Job) -> int | None:
        """Takes a request out wherever it is; its slot, which is free again, or None."""
        self._queue = [entry for entry in self._queue if entry[2] is not job]
        heapq.heapify(self._queue)
        slot = next((slot for slot, each in self._decoding.items() if each is job), None)
        if slot is not None:
            del self._decoding[slot]
        elif self.reading is not None and self.reading[1] is job:
            slot, self.reading = self.reading[0], None
        if slot is not None:
            # The lowest first: few slots are warm in a processor's caches where few requests run.
            self._free = sorted([*self._free, slot])
        return slot
