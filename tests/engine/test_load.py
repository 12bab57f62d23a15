"""A described load: what it refuses, and what it measures on a tiny engine."""

import numpy as np
import pytest

from tests.support.engines import tiny_engine
from v4jax.engine.load import Load, run
from v4jax.errors import InputError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requests": 0}, "requests is 0"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"concurrency": -1}, "concurrency is -1"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"shared": 1.5}, "shared is 1.5"),
        ({"rate": 2.0}, "expected one of them"),
        ({"concurrency": 0}, "expected one of them"),
    ],
)
def test_loads_that_say_nothing(changes, message):
    with pytest.raises(InputError, match=message):
        Load(**changes)


def test_prompts_share_their_beginning():
    prompts = Load(requests=3, prompt_tokens=20, shared=0.5).prompts(50)
    assert {len(prompt) for prompt in prompts} == {20}
    assert len({tuple(prompt[:10]) for prompt in prompts}) == 1
    assert len({tuple(prompt[10:]) for prompt in prompts}) == 3


def test_arrivals_come_at_the_rate():
    arrivals = Load(requests=4000, concurrency=0, rate=5.0).arrivals()
    assert (np.diff(arrivals) > 0).all()
    assert arrivals[-1] == pytest.approx(800, rel=0.1)


@pytest.mark.parametrize("by", [{"concurrency": 2}, {"concurrency": 0, "rate": 50.0}])
def test_what_is_measured(by):
    engine = tiny_engine()[0]
    ended = []
    load = Load(requests=5, prompt_tokens=40, new_tokens=6, **by)
    report = run(engine, load, ended.append)
    assert sum(ended) == 5
    assert report["output_tokens"] == 30
    assert report["tokens_per_second"] == pytest.approx(30 / report["seconds"])
    times = report["times"]
    assert (len(times["first_token"]), len(times["between_tokens"])) == (5, 25)
    assert 0 < report["first_token"]["median"] <= report["first_token"]["p99"]
    assert (report["cached_tokens"], report["prompt_tokens"]) == (0, 200)
    assert report["acceptance"] is None
