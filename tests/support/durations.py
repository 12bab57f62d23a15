"""What each test costs, and from that the order in which two workers end at the same time.

tests/durations.json holds the seconds of every test that takes one or more: of the processor where
`python -m pytest --keep_durations` measured them, which writes the file, else of a busy machine.
"""

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[1] / "durations.json"
SHORT = 1.0  # seconds; tests below it are not in the file
_ASSUMED = 0.1  # seconds of a test that is not in the file
_PROPERTY = "processor_seconds"


def order(items: list[pytest.Item]) -> None:
    """Files with the most to do come first, and of each file the longest tests.

    A worker asks for its next file when it has two tests left, so these have to be short ones.
    """
    seconds = json.loads(FILE.read_text())
    cost = {item: seconds.get(item.nodeid, _ASSUMED) for item in items}
    files = defaultdict(float)
    for item in items:
        files[item.path] += cost[item]
    items.sort(key=lambda item: (-files[item.path], str(item.path), -cost[item]))


def _processor_seconds() -> float:
    """Of this process and of those that it has waited for: a busy machine does not change it."""
    return sum(os.times()[:4])


class Recorder:
    """Measures every test where it runs, and writes the file where the run is directed from."""

    def __init__(self):
        self.found = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item):
        return (yield from self._measured(item))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        return (yield from self._measured(item))

    def _measured(self, item):
        start = _processor_seconds()
        try:
            return (yield)
        finally:
            item.user_properties.append((_PROPERTY, _processor_seconds() - start))

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":
            parts = (value for name, value in report.user_properties if name == _PROPERTY)
            self.found[report.nodeid] = round(sum(parts), 1)

    def pytest_sessionfinish(self, session):
        if "PYTEST_XDIST_WORKER" in os.environ:
            return
        kept = json.loads(FILE.read_text()) if FILE.exists() else {}
        kept = {name: value for name, value in (kept | self.found).items() if value >= SHORT}
        FILE.write_text(json.dumps(dict(sorted(kept.items())), indent=0) + "\n")
        files = defaultdict(float)
        for name, value in self.found.items():
            files[name.partition("::")[0]] += value
        for name, value in sorted(files.items(), key=lambda pair: -pair[1]):
            print(f"{value:8.1f} s  {name}")
        print(f"{sum(files.values()):8.1f} s of processor")
