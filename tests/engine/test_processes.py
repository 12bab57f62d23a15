"""An engine in two processes gives the tokens of one; its messages come whole and in order."""

import json

import pytest

from tests.support import serving, spawn

SERVING = "tests.support.serving:"


def agree(found, expected):
    """A request that was cancelled got as far as it got; no step says when in tokens."""
    for mine, theirs in zip(found, expected, strict=True):
        if "cancelled" in (mine["finish"], theirs["finish"]):
            count = min(len(mine["tokens"]), len(theirs["tokens"]))
            assert mine["tokens"][:count] == theirs["tokens"][:count]
        else:
            assert mine == theirs


def served(mesh, count, processes=2, pause="0", **options):
    """What process 0 says of `serving.serve`."""
    arguments = (mesh, json.dumps({"draft": None} | options), str(count), pause)
    ended = spawn.run_function(SERVING + "serve", processes, *arguments, timeout=500)
    for each in ended:
        assert each.status == 0, each.stderr[-3000:]
    assert all(each.stdout == "" for each in ended[1:])
    return json.loads(ended[0].stdout)


def test_two_processes_give_the_tokens_of_one():
    said = served("data=2,expert=2", 12, prefixes=True)
    expected = serving.alone(12)
    for found in said["found"]:
        agree(found, expected)
    assert {x["finish"] for x in expected} == {"stop", "length", "cancelled"}
    assert said["stats"]["cached_tokens"] > 0 and said["stats"]["finished_error"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, options",
    [
        ("sequence=4", {"draft": "mtp"}),
        ("sequence=4", {"draft": "dspark", "slots": 3, "exact": False, "prefixes": True}),
        ("data=2,expert=2", {"draft": "dspark", "exact": False}),
    ],
)
def test_drafts_in_two_processes(mesh, options):
    """Also where the clock decides how many drafts are verified."""
    said = served(mesh, 40, **options)
    expected = serving.alone(40, draft=options["draft"])
    for found in said["found"]:
        agree(found, expected)
    assert said["stats"]["accepted"] > 0


@pytest.mark.slow
def test_an_engine_that_is_idle_for_longer_than_one_look():
    assert served("data=2,expert=2", 3, pause="25")["found"]


def test_engines_that_differ():
    ended = spawn.run_function(SERVING + "differ", 2)
    assert [each.status for each in ended] == [2, 2]
    assert "disagree on the engine: slots is 4 in process 0 and 8 in process 1" in ended[0].stderr
