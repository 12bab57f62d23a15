"""An engine in two processes gives the tokens of one."""

import collections
import dataclasses
import json
import pickle
import sys

import jax
import numpy as np
import pytest

from tests.support import serving, spawn
from tests.support.checkpoints import synthetic
from tests.support.serving import Play
from v4jax.engine.functions import Row
from v4jax.engine.processes import Leader, follow
from v4jax.errors import InputError

QUICK = Play(10, scored=False, layers=(0, 1))


def check_agree(found, expected):
    """A request that was cancelled got as far as it got."""
    for mine, theirs in zip(found, expected, strict=True):
        if "cancelled" in (mine["finish"], theirs["finish"]):
            count = min(len(mine["tokens"]), len(theirs["tokens"]))
            assert mine["tokens"][:count] == theirs["tokens"][:count]
        else:
            assert mine == theirs


def check_served(mesh, play, processes=2):
    """Two processes agree with one device; what process 0 counted."""
    asked = json.dumps(dataclasses.asdict(play))
    ended = spawn.run_function("tests.support.serving:serve", processes, mesh, asked, timeout=1000)
    for each in ended:
        assert each.status == 0, each.stderr[-3000:]
    assert all(each.stdout == "" for each in ended[1:])
    said = json.loads(ended[0].stdout)
    expected = serving.alone(dataclasses.replace(play, prefixes=False, pause=0.0))
    for mine, theirs in zip(said["found"], expected, strict=True):
        check_agree(mine, theirs)
    assert {x["finish"] for x in expected[0]} == {"stop", "length", "cancelled"}
    assert said["stats"]["finished_error"] == 0
    return said["stats"]


def test_two_processes_give_the_tokens_of_one():
    check_served("data=2,expert=2", QUICK)


@pytest.mark.slow
def test_prefixes_in_two_processes():
    """And a process that hears nothing for longer than one look goes on waiting."""
    play = Play(16, times=2, prefixes=True, pause=25.0)
    assert check_served("data=2,expert=2", play)["cached_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, options, prefixes",
    [
        ("sequence=4", {"draft": "mtp"}, False),
        ("sequence=4", {"draft": "dspark", "slots": 3, "exact": False}, True),
        ("data=2,expert=2", {"draft": "dspark", "exact": False}, False),
    ],
)
def test_drafts_in_two_processes(mesh, options, prefixes):
    """Also where the clock decides how many drafts are verified."""
    play = Play(24, times=2, options=options, prefixes=prefixes)
    assert check_served(mesh, play)["accepted"] > 0


@pytest.mark.slow
def test_generate_with_a_prefix_cache(tmp_path):
    """The command, twice: the second run finds the prompt that the first one has read."""
    prompt = ",".join(str(7 * i % 60) for i in range(150))
    flags = [f"--checkpoint={synthetic(tmp_path / 'official')}", f"--prompt_ids={prompt}"]
    flags += ["--max_new_tokens=8", "--format=json"]
    command = [sys.executable, "-m", "v4jax.cli.main", "generate", *flags]
    (alone,) = spawn.run(lambda _: command, 1, devices=1)
    flags += ["--mesh=sequence=4", f"--prefix_cache={tmp_path / 'prefixes'}"]
    for cached in (0, 128):
        ended = spawn.run_command(["generate", *flags], 2, timeout=500)
        assert [each.status for each in ended] == [0, 0], ended[0].stderr[-2000:]
        said = json.loads(ended[0].stdout)
        assert said["tokens"] == json.loads(alone.stdout)["tokens"]
        assert said["cached_tokens"] == [cached]
        assert ended[1].stdout == ""


class Calls:
    """Stands in for programs: keeps what it is called with, returns arrays of its own."""

    def __init__(self):
        self.seen = []

    def __getattr__(self, name):
        def call(*arguments):
            leaves = jax.tree.leaves(arguments)
            self.seen.append((name, jax.tree.structure(arguments), list(map(_bits, leaves))))
            made = [np.full(3, 10 * len(self.seen) + i, np.float32) for i in range(2)]
            return Row(*map(jax.device_put, made)), 0.5, None

        return call


def _bits(leaf):
    """A leaf's type, shape and bytes."""
    array = np.asarray(leaf)
    return str(array.dtype), array.shape, array.tobytes()


class Queue:
    """Messages within one process."""

    def __init__(self):
        self.sent = collections.deque()
        self.sizes = []

    def send(self, value):
        self.sent.append(pickle.dumps(value))
        self.sizes.append(len(self.sent[-1]))

    def receive(self):
        return pickle.loads(self.sent.popleft())


def test_the_others_make_the_same_calls():
    """Random calls, whose arguments are results of earlier ones or arrays of the host."""
    rng = np.random.default_rng(0)
    first, second, messages = Calls(), Calls(), Queue()
    leader = Leader(first, messages)
    kept = [leader.fresh_row()[0]]
    host = [
        np.full((4, 1000), 0xFFFFFFFF, np.uint32),
        np.array([0.0, -0.0] * 100),
        np.zeros(100, bool),
        np.arange(999),
        np.array([np.nan] * 99, np.float32),
        7,
        True,
    ]
    for _ in range(300):
        row = kept[rng.integers(len(kept))]
        chosen = [host[i] for i in rng.integers(0, len(host), rng.integers(0, 4))]
        name = ("read", "put", "verify", "write_rest")[rng.integers(4)]
        kept.append(getattr(leader, name)(row, row.draft, *chosen)[0])
        if len(kept) > 5:
            kept.pop(rng.integers(5))
    assert len(leader._known) <= 2 * len(kept)  # what is gone here may go there
    assert max(messages.sizes) < 16_000  # the mask of ones has as many bytes
    leader.end()
    leader.end()
    follow(second, messages)
    assert second.seen == first.seen
    assert not messages.sent
    with pytest.raises(InputError, match="the engine is closed"):
        leader.fresh_row()
