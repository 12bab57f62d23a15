"""Scores on hand-made cases, intervals and pass^k against closed forms, and fuzzed answers."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.eval.test_tasks import LENGTH, TASKS
from tests.eval.tokenizers import of_bytes
from v4jax.eval import graphwalks, mrcr
from v4jax.eval.cost import Prices, priced
from v4jax.eval.intervals import mean_interval, paired, pass_hat
from v4jax.eval.sample import Sample, asked
from v4jax.eval.schemas import Tool, checked, same
from v4jax.eval.scores import any_found, first_line_is, set_f1, share_found
from v4jax.eval.summary import pass_k, sentences, summarize


def test_share_of_strings_found():
    assert share_found(["Ab", "cd"], "xxaBxx") == 0.5
    assert share_found(["ab", "cd"], "CD and AB") == 1.0
    assert share_found(["ab"], "") == share_found(["ab"], " \n\t") == 0.0
    assert share_found(["1234567"], "123\x004567") == 0.0  # a control character is a line break
    assert share_found(["a\nb"], "a\x07b") == 1.0
    assert any_found(["Rome", "Roma"], "it is roma") == 1.0
    assert any_found(["Rome"], "") == 0.0


def test_first_line():
    assert first_line_is("word", " word\nmore") == 1.0
    assert first_line_is("word", "words") == first_line_is("word", "") == 0.0


def test_f1_of_sets():
    assert set_f1(set(), set()) == 1.0
    assert set_f1({"a"}, set()) == set_f1(set(), {"a"}) == set_f1({"a"}, {"b"}) == 0.0
    assert set_f1({"a", "b"}, {"b", "c"}) == 0.5
    assert set_f1({"a", "b", "c"}, {"a"}) == 0.5


def mrcr_score(answer, mark="MaRk", truth="a text of some length"):
    (task,) = (task for task in TASKS if task.name == "mrcr_2")
    return task.score(Sample(asked(""), [mark, truth], 1), answer)


def test_mrcr():
    assert mrcr_score("MaRka text of some length") == {"score": 1.0, "repeated": 1.0}
    assert mrcr_score(" MaRka text of some length")["score"] == 0.0  # spaces are not stripped
    assert mrcr_score("marka text of some length")["score"] == 0.0  # case counts
    assert mrcr_score("MaRk")["score"] == 0.0  # the string alone
    assert mrcr_score("")["score"] == 0.0
    found = mrcr_score("MaRka text")
    assert found == {"score": pytest.approx(2 * 6 / (6 + 21)), "repeated": 0.0}
    assert mrcr.ratio("MaRk" + "x" * 10**6, "MaRk", "a text") < 0.04


def graph_score(answer, expected=("a1", "b2"), scoring=""):
    task = graphwalks.tasks(scoring)[0]
    return task.score(Sample(asked(""), list(expected), 1), answer)


def test_graphwalks():
    assert graph_score("so\nFinal Answer: [a1, b2]")["score"] == 1.0
    assert graph_score("Final Answer: [b2,a1,b2,]")["score"] == 1.0  # order, repeats, empty names
    assert graph_score("Final Answer: [\"a1\", 'b2']\n\n")["score"] == 1.0  # quotes and blanks
    assert graph_score("Final Answer: [a1]")["score"] == pytest.approx(2 / 3)
    assert graph_score("Final Answer: []")["score"] == 0.0
    assert graph_score("Final Answer: []", ())["score"] == 1.0
    assert graph_score("Final Answer: [x]", ())["score"] == 0.0
    late = graph_score("Final Answer: [a1, b2]\nI hope that helps.")
    assert late == {"score": 0.0, "lenient": 1.0}  # not in the last line
    assert graph_score("nothing")["score"] == graph_score("")["score"] == 0.0
    assert graph_score("first [x, y], then [a1, b2] at last")["lenient"] == 1.0


def test_graphwalks_as_published():
    """Its first name keeps what is before the bracket, and no overlap at all is 1."""
    assert graph_score("Final Answer: [a1, b2]", scoring="published")["score"] == 0.5
    assert graph_score("Final Answer: [x, y]", scoring="published")["score"] == 1.0
    assert graph_score("x", scoring="published")["score"] == 0.0


def test_numbers_of_aggregates():
    (task,) = (task for task in TASKS if task.name == "sum")
    sample = Sample(asked(""), ["1200"], 1)
    for answer in (" 1200 crowns", "1,200.", "it is 1200, not 7"):
        assert task.score(sample, answer)["score"] == 1.0
    assert task.score(sample, "1100") == {"score": 0.0, "closeness": pytest.approx(11 / 12)}
    assert task.score(sample, "9" * 5000)["score"] == 0.0


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_hat_counts_the_draws(n):
    for c in range(n + 1):
        trials = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            draws = list(itertools.combinations(trials, k))
            assert pass_hat(c, n, k) == pytest.approx(sum(map(all, draws)) / len(draws))
        assert pass_hat(c, n, n + 1) is None  # undefined, not 0


def test_pass_k_of_records():
    scores = {0: [1, 1, 0, 0], 1: [1, 1, 1, 1], 2: [0, 0, 0, 0]}
    records = [{"item": i, "score": float(s)} for i, trials in scores.items() for s in trials]
    found = pass_k(records)
    assert [found[k]["mean"] for k in "1234"] == pytest.approx(
        [1.5 / 3, (1 / 6 + 1) / 3, 1 / 3, 1 / 3]
    )
    assert found["2"]["n"] == 3


def test_the_interval_is_that_of_the_normal_law_for_many_samples():
    values = np.random.default_rng(0).normal(3.0, 2.0, 4000)
    found = mean_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found["mean"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.01)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.01)
    assert found == mean_interval(values)
    assert mean_interval([1.0] * 5) == {"n": 5, "mean": 1.0, "low": 1.0, "high": 1.0}


def test_the_interval_covers_the_truth_as_often_as_said():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        found = mean_interval(rng.random(60) < 0.7, seed=trial)
        hits += found["low"] <= 0.7 <= found["high"]
    assert 0.88 <= hits / 200 <= 0.99


def test_the_paired_test_is_exact_for_few_and_near_it_for_many():
    found = paired([0.0] * 5, [1.0] * 5)
    assert found["mean"] == 1.0 and found["p"] == 2 / 2**5  # the signs all one way, or all another
    assert paired([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])["p"] == 1.0
    first, second = [0.0] * 11 + [1.0] * 9, [1.0] * 11 + [0.0] * 9
    assert paired(first, second)["p"] > 0.5
    assert paired([0.0] * 30, [1.0] * 30)["p"] < 0.001


def test_cost_per_completed_task():
    each = {"prompt_tokens": 1000, "cached_tokens": 400, "output_tokens": 100, "seconds": 36.0}
    records = [each | {"score": 1.0, "attempts": 1}, each | {"score": 0.0, "attempts": 3}]
    prices = Prices(prompt=10.0, cached=1.0, output=50.0, hour=2.0)
    one = (600 * 10 + 400 * 1 + 100 * 50) / 1e6 + 36 / 3600 * 2
    assert prices.of(each) == pytest.approx(one)
    found = priced(records, prices)
    assert found["cost_per_task"] == pytest.approx(2 * one)
    assert found["success"] == 0.5 and found["attempts_per_task"] == 2
    assert found["tokens_per_solved"] == 2200
    none = priced(records[1:], prices)
    assert none["cost_per_task"] is None and none["low"] is None and none["success"] == 0.0


def test_arguments_of_calls():
    tool = Tool("f", {"n": {"type": "integer"}, "s": {"type": "string", "enum": ["a", "b"]}})
    assert checked(tool, '{"n": 3, "s": "a"}').valid
    wrong = checked(tool, '{"n": "3", "s": "a"}')
    assert not wrong.valid and wrong.wrong_types == 1
    for text in (
        '{"n": 3}',
        '{"n": 3, "s": "c"}',
        '{"n": 3, "s": "a", "x": 1}',
        '{"n": 3, "s"',
        "[]",
        "3",
        "",
        '{"n": true, "s": "a"}',
        '{"n": 3.5, "s": "a"}',
        "[" * 100_000,
    ):
        assert not checked(tool, text).valid
    assert same({"a": 7}, {"a": 7.0}) and not same({"a": 1}, {"a": True})
    assert not same("7", 7) and not same({"a": 1}, {"a": 1, "b": 2})


SAMPLES = [(task, task.make(0, 0, LENGTH, None, of_bytes)) for task in TASKS]
AWKWARD = ["", "\x00", "[" * 5000, '{"a": [', "Final Answer: [", "Final Answer: []", "\ud800"]
AWKWARD += [
    "9" * 4000,
    "-",
    "é" * 3000,
    "\u202e\u0000[x]",
    "]" * 99,
    "Final Answer: [" + "," * 9999,
]


def bounded(answer):
    for task, sample in SAMPLES:
        for score in task.score(sample, answer).values():
            assert isinstance(score, float) and 0.0 <= score <= 1.0


@pytest.mark.parametrize("answer", AWKWARD, ids=range(len(AWKWARD)))
def test_awkward_answers_have_a_score(answer):
    bounded(answer)
    for _, sample in SAMPLES[:: len(SAMPLES) // 3]:
        bounded("".join(map(str, sample.expected)) + answer)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=400) | st.binary(max_size=400).map(lambda b: b.decode("latin-1")))
def test_any_answer_has_a_score(answer):
    bounded(answer)


@pytest.mark.slow  # ten thousand answers
def test_ten_thousand_answers_have_a_score():
    rng = random.Random(0)
    alphabet = "[](){}\"',:-0123456789abcdefABC \n\t\x00é\u202e\U0001f600"
    heads = ["", "Final Answer: [", "{", "[", "-", *(str(s.expected[0]) for _, s in SAMPLES)]
    for _ in range(10_000):
        size = int(rng.expovariate(1 / 80))
        bounded(rng.choice(heads) + "".join(rng.choices(alphabet, k=size)))


def test_a_summary_says_what_matters():
    needle = {"prompt_tokens": 100, "cached_tokens": 40, "output_tokens": 1, "seconds": 0.5}
    records = [
        needle | {"task": "needle", "length": n, "sample": i, "score": float(n < 4096 or i > 0)}
        for n in (1024, 4096)
        for i in range(4)
    ]
    summary = summarize({"suite": "needle"}, records)
    assert [(r["length"], r["n"], r["mean"]) for r in summary["results"]] == [
        (1024, 4, 1.0),
        (4096, 4, 0.75),
    ]
    assert summary["cached_tokens"] == 320
    first, *_, last = sentences(summary)
    assert "75.0% on average at 4,096" in first and "up to 1,024" in first
    assert "320 of 800 prompt tokens (40%)" in last
    assert sentences(summarize({}, [])) == []
