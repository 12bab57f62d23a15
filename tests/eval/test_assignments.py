"""A suite by workers: the records of one process, also where workers are killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.eval.descriptions import OfFake
from tests.eval.targets import Fake, needle_reader
from tests.eval.test_suite import RUN, told
from v4jax.eval import assignments, suites
from v4jax.eval.records import Records, read_records
from v4jax.eval.suite import run
from v4jax.workers.crew import Crew
from v4jax.workers.processes import ProcessPool

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = suites.Settings(lengths=(3000, 4000), samples=12, style="plain")


def assigned(described, settings=SETTINGS, part="needle"):
    jobs = suites.SUITES[part](settings)
    return [assignments.Assignment(described, part, settings, job.key) for job in jobs]


def whole(directory, settings=SETTINGS):
    """What one process records."""
    with Records(directory, RUN) as records:
        run(suites.SUITES["needle"](settings), Fake(needle_reader), records)
    return told(directory)


def test_workers_record_what_one_process_does_also_where_one_is_killed(tmp_path):
    said, seen = [], []
    described = OfFake(str(tmp_path / "killed"), after=4, seconds=0.01)
    with (
        Records(tmp_path / "run", RUN) as records,
        Crew(ProcessPool(assignments.Evaluator, 2, many=2), said.append) as crew,
    ):
        assert assignments.run(assigned(described), crew, records, seen.append) == 0
        # Nothing is left to be done, and lengths that are too short are left out.
        assert assignments.run(assigned(described), crew, records, seen.append) == 0
        short = suites.Settings(lengths=(60,), samples=2, style="plain")
        skipped = []
        assignments.run(assigned(described, short), crew, records, skip=skipped.append)
    assert len(said) == 1 and "was killed (SIGKILL" in said[0] and "again by others" in said[0]
    assert len(seen) == 24 and "expected a length of" in skipped[0]
    assert (tmp_path / "run" / "records.jsonl").read_bytes().count(b"\n") == 24
    assert told(tmp_path / "run") == whole(tmp_path / "whole")


CHILD = """
import sys
from tests.eval.descriptions import OfFake
from tests.eval.test_assignments import assigned
from tests.eval.test_suite import RUN
from v4jax.eval import assignments
from v4jax.eval.records import Records
from v4jax.workers.crew import Crew
from v4jax.workers.processes import ProcessPool
with (
    Records(sys.argv[1], RUN) as records,
    Crew(ProcessPool(assignments.Evaluator, 2)) as crew,
):
    assignments.run(assigned(OfFake("", seconds=0.02)), crew, records)
"""


def test_a_run_that_is_killed_with_its_workers_goes_on(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    path = tmp_path / "killed" / "records.jsonl"
    child = subprocess.Popen(command, env=environment)
    until = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") >= 5):
        assert time.monotonic() < until and child.poll() is None
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = len(read_records(tmp_path / "killed"))
    assert subprocess.run(command, env=environment).returncode == 0
    assert 5 <= before < 24 and len(read_records(tmp_path / "killed")) == 24
    assert told(tmp_path / "killed") == whole(tmp_path / "whole")


class Watched(Fake):
    """Counts how it was prepared."""

    def __init__(self):
        super().__init__()
        self.slots = []

    def resize(self, slots):
        self.slots.append(slots)


class Described:
    slots = 3

    def __init__(self):
        self.target = Watched()

    def open(self):
        return self.target


@pytest.mark.parametrize("part", ["needle", "latency", "cost", "probes", "ruler"])
def test_every_suite_is_made_again_by_its_settings(part):
    described, evaluator = Described(), assignments.Evaluator()
    settings = suites.Settings(lengths=(4000,), samples=1, style="plain", loads=(1,))
    for each in assigned(described, settings, part)[:3]:
        kind, fields = evaluator(each)
        assert kind == "fields" and fields["seconds"] > 0
    if part == "latency":  # which asks as many at once as its loads say
        assert set(described.target.slots) <= {1, 2}
    else:
        assert set(described.target.slots) == {3}


class NoWorkers:
    count = many = 1

    def give(self, worker, number, task): ...

    def events(self, timeout):
        return []

    def close(self): ...


def test_latency_is_measured_alone(tmp_path, monkeypatch):
    began = []

    def run(self, tasks, done, deadline=None, alone=False):
        began.append(alone)
        return 0

    monkeypatch.setattr(Crew, "run", run)
    with Records(tmp_path, RUN) as records:
        for part in ("needle", "latency"):
            tasks = assigned(Described(), part=part)
            assignments.run(tasks, Crew(NoWorkers()), records)
    assert began == [False, True]
