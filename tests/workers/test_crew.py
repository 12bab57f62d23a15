"""Tasks of a crew: each done once, whatever becomes of the workers."""

import collections
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_lifeline import runs, wait_until
from tests.workers.tasks import Doer
from v4jax.errors import InputError
from v4jax.workers.crew import TRIES, Crew
from v4jax.workers.outcome import Outcome, outcome_of
from v4jax.workers.pool import Done, Gone, Ready
from v4jax.workers.processes import ProcessPool

ROOT = Path(__file__).resolve().parents[2]


class Simulated:
    """A pool without processes: in each round any of its workers may do something, or end."""

    def __init__(self, count, many, dice, deadly=0.0):
        self.count, self.many = count, many
        self._dice, self._deadly = dice, deadly
        self._has = {worker: [] for worker in range(count)}
        self._unborn = set(range(count))
        self.given = collections.Counter()

    def give(self, worker, number, task):
        self.given[task] += 1
        if worker in self._has:
            assert worker not in self._unborn
            self._has[worker].append((number, task))
            assert len(self._has[worker]) <= self.many

    def events(self, timeout):
        for worker in list(self._has):
            roll = self._dice.random()
            if worker in self._unborn:
                if roll < 0.5:
                    self._unborn.discard(worker)
                    yield Ready(worker)
            elif roll < self._deadly:
                left = self._has.pop(worker)
                if left and self._dice.random() < 0.5:  # a task was done just before
                    number, task = left[0]
                    yield Done(worker, number, outcome_of(Doer(), task))
                yield Gone(worker, "was killed")
            elif self._has[worker] and roll < 0.8:
                place = self._dice.randrange(len(self._has[worker]))
                number, task = self._has[worker].pop(place)
                yield Done(worker, number, outcome_of(Doer(), task))

    def close(self):
        pass


@pytest.mark.parametrize("seed", range(40))
def test_each_task_counts_once_whatever_happens(seed):
    """Random pools and deaths: all is done once, or a sentence says why not, and nothing twice."""
    dice = random.Random(seed)
    pool = Simulated(dice.randint(1, 5), dice.randint(1, 3), dice, dice.choice([0, 0.02, 0.2]))
    tasks, found = [("square", i) for i in range(dice.randint(0, 30))], []
    crew = Crew(pool)
    try:
        left = crew.run(tasks, lambda task, value: found.append((task, value)))
    except InputError as error:
        assert "no worker is left" in str(error) or f"{TRIES} workers ended" in str(error)
        assert pool._deadly
    else:
        assert left == 0 and len(found) == len(tasks)
    assert len({task for task, _ in found}) == len(found)
    assert all(value == task[1] ** 2 for task, value in found)
    assert max(pool.given.values(), default=0) <= TRIES


def test_a_task_that_ends_every_worker_is_blamed():
    class Poisoned(Simulated):
        def events(self, timeout):
            yield from (Ready(each) for each in self._unborn)
            self._unborn = set()
            for worker, has in list(self._has.items()):
                if any(task == "poison" for _, task in has):
                    del self._has[worker]
                    yield Gone(worker, "was killed (SIGKILL)")
                elif has:
                    yield Done(worker, has.pop()[0], Outcome("value", 1))

    said, found = [], []
    crew = Crew(Poisoned(5, 1, random.Random(0)), said.append)
    with pytest.raises(InputError, match="sample poison was under way .* 3 workers ended"):
        crew.run(
            ["a", "poison", "b", "c"],
            lambda *each: found.append(each),
            name=lambda t: f"sample {t}",
        )
    assert (
        said
        == [
            f"worker {n} was killed (SIGKILL); what it had under way (1) is done again by others"
            for n in (2, 1, 3)
        ]
        or len(said) == 3
    )
    assert ("a", 1) in found  # what was done is kept
    assert len(crew.alive) == 2
    assert crew.run(["d"], lambda *each: found.append(each)) == 0


def test_no_task_begins_after_the_deadline_and_those_under_way_are_counted():
    class Late(Simulated):
        def events(self, timeout):
            time.sleep(0.06)
            yield from super().events(timeout)

    found = []
    crew = Crew(Late(2, 1, random.Random(1)))
    tasks = [("square", i) for i in range(1000)]
    left = crew.run(tasks, lambda *each: found.append(each), deadline=time.monotonic() + 0.5)
    assert 0 < len(found) < 1000 and left == 1000 - len(found)
    assert crew.run(tasks, print, deadline=time.monotonic() - 1) == 1000


def test_alone_is_one_at_a_time():
    pool = Simulated(4, 3, random.Random(2))
    original, most = pool.events, []

    def events(timeout):
        most.append(sum(map(len, pool._has.values())))
        return original(timeout)

    pool.events = events
    assert Crew(pool).run([("square", i) for i in range(9)], lambda *each: None, alone=True) == 0
    assert max(most) == 1


@pytest.fixture(scope="module")
def crew():
    with Crew(ProcessPool(Doer, 2, many=2)) as crew:
        yield crew


def results(crew, tasks):
    found = {}
    assert crew.run(tasks, lambda task, value: found.__setitem__(task, value)) == 0
    return found


def test_processes_do_tasks_and_say_what_went_wrong(crew):
    tasks = [("square", i) for i in range(50)]
    assert results(crew, tasks) == {task: task[1] ** 2 for task in tasks}
    who = set(results(crew, [("slow", 0.2 + i / 1000) for i in range(4)]).values())
    assert len(who) == 2 and os.getpid() not in who
    done = []
    with pytest.raises(InputError, match="^it is not to be done$"):
        crew.run([("square", 2), ("refuse", "it")], lambda *each: done.append(each))
    assert done == [(("square", 2), 4)]
    with pytest.raises(RuntimeError, match="(?s)Traceback.*KeyError: 'x'"):
        crew.run([("fail", "x")], print)
    assert results(crew, tasks[:3]) == {("square", 0): 0, ("square", 1): 1, ("square", 2): 4}


def test_processes_that_are_killed_are_replaced_by_the_others(tmp_path):
    said = []
    with Crew(ProcessPool(Doer, 3), said.append) as crew:
        tasks = [("square", i) for i in range(20)] + [("die_once", str(tmp_path / "once"))]
        found = results(crew, tasks)
        assert found[tasks[-1]] == "done" and len(found) == 21
        assert len(said) == 1 and "was killed (SIGKILL, as the system does where memory" in said[0]
        assert "(1) is done again by others" in said[0]
        assert int(said[0].split()[1]) - 1 not in crew.alive
        with pytest.raises(InputError, match=r"no worker is left: of 3 .* has ended with status 3"):
            crew.run([("leave", 3)], print)


OWNER = """
import sys, time
from tests.workers.tasks import Doer
from v4jax.workers.crew import Crew
from v4jax.workers.processes import ProcessPool
pool = ProcessPool(Doer, 2)
crew = Crew(pool)
crew.run([("square", 1)], lambda *each: None)
print(*pool.pids, flush=True)
crew.run([("slow", 60)], print)
"""


def test_workers_end_with_a_killed_owner():
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    pids = [int(each) for each in owner.stdout.readline().split()]
    assert len(pids) == 2 and all(map(runs, pids))
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    wait_until(lambda: not any(map(runs, pids)))


def test_sizes_are_checked():
    with pytest.raises(InputError, match="0 workers"):
        ProcessPool(Doer, 0)
