"""Two tiers: the protocol step by step, its ledger, and what policies cost, in closed form."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.eval.targets import Caller
from tests.eval.tiers import Reader, chat, digest, extracted, judged, place, right, sheet, step
from tests.eval.tokenizers import of_bytes
from tests.support import spawn
from v4jax.errors import InputError
from v4jax.eval import extraction, policies, quotes, tier_report, verdicts
from v4jax.eval.cost import Prices
from v4jax.eval.ledger import LEDGER, Ledger, step_key
from v4jax.eval.policies import REVIEWER, WORKER, TierPrices
from v4jax.eval.records import Records, read_records
from v4jax.eval.sample import Answer
from v4jax.eval.suite import run as run_jobs
from v4jax.eval.tier_tasks import Plan, Table, has_own_way
from v4jax.eval.verdicts import Verdict

ROOT = Path(__file__).resolve().parents[2]
RUN = {"suite": "tiers", "seed": 0}
SHARES = (0, 25, 50, 75, 100)


def plan(samples=4, tasks=("extraction",), revisions=2, form="json", lengths=(3000,)):
    return Plan(form, tasks, lengths, samples, 0, revisions)


def played(directory, worker, reviewer, of=None, concurrency=1):
    """All courses of a plan; records by task, and the ledger's lines in order."""
    of = of or plan()
    with Ledger(directory, RUN) as ledger, Records(directory, RUN) as records:
        table = Table(of, ledger, worker, reviewer)
        for course in ("draft", "reviewed", "worker", "reviewer"):
            keys = [
                k for k in of.every_sample() if course != "worker" or has_own_way(of.form, k[0])
            ]
            jobs = [table.job(key, course) for key in keys]
            run_jobs(jobs, worker, records, concurrency)
        return list(records.done.values()), list(ledger.done.values())


def of(records, course, task="extraction"):
    return [each for each in records if each["task"] == f"{task}/{course}"]


def actions(lines, sample=0, course="both"):
    return [
        (line["role"], line["action"], line["verdict"])
        for line in sorted(lines, key=step_key)
        if line["sample"] == sample and line["course"] == course
    ]


# The task.


def test_sheets_have_an_oracle_and_no_trick():
    for length in (1500, 6001):
        samples = [extraction.SHEETS.make(0, n, length, None, of_bytes) for n in range(6)]
        for sample in samples:
            text = sample.prompt.text
            oracle = right(text, sheet(text)[1])
            assert extraction.SHEETS.score(sample, oracle) == {"score": 1.0}
            assert extraction.SHEETS.score(sample, "")["score"] == 0.0
            assert extraction.SHEETS.score(sample, sample.about["source"])["score"] == 0.0
            for allowed in sample.expected.values():
                assert sample.about["source"].count(allowed[-1]) == 1
            assert 0 <= length - of_bytes(sample.prompt) - sample.budget <= 520
            assert text.startswith(sample.about["source"])
        guesses = [
            extraction.SHEETS.score(sample, right(s := other.prompt.text, sheet(s)[1]))["score"]
            for sample in samples
            for other in samples
            if sample is not other
        ]
        assert sum(guesses) == 0.0


def test_pairs_have_an_oracle_and_no_trick():
    from v4jax.datasets.lexicon import is_held_out

    for n in range(4):
        sample = extraction.PAIRS.make(0, n, 3000, None, of_bytes)
        (value,), source = sample.expected, sample.about["source"]
        assert extraction.PAIRS.score(sample, f'It is "{value}".')["score"] == 1.0
        assert extraction.PAIRS.score(sample, f" {value}.")["score"] == 1.0
        for bad in ("", source, "I do not know.", f'"{value}" or "x"'):
            assert extraction.PAIRS.score(sample, bad)["score"] == 0.0
        assert source.count(f'"{value}"') == 1 and source.count('" is "') > 30
        assert is_held_out(value)
    with pytest.raises(InputError, match="too few"):
        extraction.PAIRS.make(0, 0, 10**8, None, lambda prompt: len(prompt.messages[0]["content"]))


def test_the_same_seed_is_the_same_sample():
    for task in (extraction.SHEETS, extraction.PAIRS):
        one, again, other = (task.make(s, 2, 2000, None, of_bytes) for s in (3, 3, 4))
        assert one == again and one.prompt != other.prompt


DIGEST = "e879c4a45bcdec724c49a170f7547d41c912a778ac3469b095533156758b134a"


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_bytes_are_those_of_every_python(version):
    """A bare interpreter will do, as for the tasks of `v4jax eval`."""
    assert digest() == DIGEST
    homes = Path.home() / ".pyenv" / "versions"
    found = sorted(homes.glob(f"{version}.*/bin/python{version}"))
    if not found:
        pytest.skip(f"there is no Python {version}")
    code = "from tests.eval.tiers import digest; print(digest())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [found[-1], "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.stdout.strip() == DIGEST, done.stderr


def test_a_field_that_is_said_twice_is_not_said():
    said = extraction.said_fields("Dish: *Bread*.\nriver: a\nriver: b\nelse: c", ("dish", "river"))
    assert said == {"dish": "Bread"}


# Quotes and verdicts.

SOURCE = "one two one three. One."


@pytest.mark.parametrize(
    ("said", "kept", "exact", "invented", "refused"),
    [
        ([{"start": 0, "text": "one"}], [(0, "one")], 1, 0, 0),
        ([{"start": 7, "text": "one"}], [(8, "one")], 0, 0, 0),
        ([{"start": 1, "text": "one"}], [(0, "one")], 0, 0, 0),
        ([{"start": -9, "text": "one"}], [(0, "one")], 0, 0, 0),
        ([{"start": 10**30, "text": "one"}], [(8, "one")], 0, 0, 0),
        ([{"start": True, "text": "one"}], [(0, "one")], 0, 0, 0),
        ([{"text": " three. "}], [(12, "three.")], 0, 0, 0),
        ([{"start": 0, "text": "ONE"}], [], 0, 1, 0),
        ([{"start": 0, "text": "one  two"}], [], 0, 1, 0),
        ([{"start": 0, "text": ""}, {"start": 0}, "one", None, {"text": 3}], [], 0, 0, 5),
        ([{"start": 0, "text": "one"}] * 2, [(0, "one")], 1, 0, 1),
        ([], [], 0, 0, 0),
    ],
)
def test_quotes_are_held_against_the_text(said, kept, exact, invented, refused):
    found = quotes.read(SOURCE, json.dumps({"quotes": said}))
    assert [(each.start, each.text) for each in found.kept] == kept
    assert (found.exact, found.invented, found.refused) == (exact, invented, refused)
    assert found.said == len(said) and not found.problem


def test_quotes_cannot_carry_the_whole_text():
    source = "".join(f"{n:03}" for n in range(1000))
    long = [{"start": 0, "text": source[: quotes.LONGEST + 1]}]
    assert quotes.check(source, long).refused == 1
    many = [{"start": 9 * n, "text": source[9 * n : 9 * n + 290]} for n in range(20)]
    found = quotes.check(source, many)
    assert sum(len(each.text) for each in found.kept) <= quotes.TOTAL
    short = [{"start": 3 * n, "text": source[3 * n : 3 * n + 3]} for n in range(20)]
    assert len(quotes.check(source, short).kept) == quotes.MOST


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ('{"verdict": "accept", "issues": []}', "accept"),
        ('```json\n{"verdict": "redo", "issues": ["a"]}\n```', "redo"),
        ('{"verdict": "accept"}', "accept"),
        ("", "invalid"),
        ("I accept.", "invalid"),
        ('"accept"', "invalid"),
        ('{"verdict": "Accept"}', "invalid"),
        ('{"verdict": ["accept"]}', "invalid"),
        ('{"verdict": "accept", "verdict": "redo"}', "invalid"),
        ('{"verdict": "accept"} {"verdict": "redo"}', "invalid"),
        ('{"verdict": "accept", "issues": "none"}', "invalid"),
        ('{"verdict": "accept", "issues": [1]}', "invalid"),
        ('{"verdict": "revise", "text": 3}', "invalid"),
        ('{"verdict": "accept"', "invalid"),
        ("[" * 100_000, "invalid"),
        ('{"verdict": ' + "9" * 6000 + "}", "invalid"),
    ],
)
def test_verdicts_are_read_strictly(said, kind):
    assert verdicts.read(said).kind == kind


def test_a_verdict_has_a_text_only_to_revise():
    said = {"issues": [" a\n b ", "", "x" * 999], "text": "t"}
    for kind, text in (("accept", None), ("revise", "t"), ("redo", None)):
        found = verdicts.read(json.dumps(said | {"verdict": kind}))
        assert found == Verdict(kind, ("a b", "x" * 200), text)
    empty = verdicts.read('{"verdict": "revise", "text": " "}')
    assert empty.text is None


@settings(max_examples=50, deadline=None)
@given(st.text() | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists))
def test_any_answer_is_read(said):
    text = said if isinstance(said, str) else json.dumps(said)
    for answer in (text, json.dumps({"quotes": said}), json.dumps({"verdict": said, "text": said})):
        found = quotes.read(SOURCE, answer)
        assert all(SOURCE[q.start :].startswith(q.text) for q in found.kept)
        assert verdicts.read(answer).kind in (*verdicts.KINDS, "invalid")
        extraction.said_fields(answer, extraction.FIELDS)
        extraction.said_value(answer)


@pytest.mark.slow  # ten thousand answers
def test_ten_thousand_answers_are_read():
    """Pieces of right answers, spoilt: quotes that are kept are in the text, verdicts are known."""
    rng = random.Random(0)
    whole = [
        json.dumps({"quotes": [{"start": 8, "text": "one"}, {"start": 0, "text": "two one"}]}),
        json.dumps({"verdict": "revise", "issues": ["a"], "text": "t"}),
        '```json\n{"verdict": "accept", "issues": []}\n```',
    ]
    alphabet = "[](){}\"',:-019eE.truefalsnu \n\t\x00é\u202e\U0001f600\ud800"
    for _ in range(10_000):
        said = list(rng.choice(whole))
        for _ in range(rng.randrange(6)):
            at = rng.randrange(len(said) + 1)
            said[at : at + rng.randrange(8)] = rng.choices(alphabet, k=rng.randrange(5))
        found = quotes.read(SOURCE, "".join(said))
        assert all(SOURCE[q.start :].startswith(q.text) and q.text for q in found.kept)
        verdict = verdicts.read("".join(said))
        assert verdict.kind in (*verdicts.KINDS, "invalid")
        assert verdict.text is None or verdict.kind == "revise"


# The protocol.


def test_what_is_accepted_is_the_draft(tmp_path):
    records, lines = played(tmp_path, chat(Reader()), chat(Reader()))
    assert actions(lines) == [
        ("worker", "extract", None),
        ("worker", "draft", None),
        ("reviewer", "review", "accept"),
    ]
    assert actions(lines, course="worker") == [("worker", "answer", None)]
    assert actions(lines, course="reviewer") == [("reviewer", "answer", None)]
    for course in ("draft", "reviewed", "worker", "reviewer"):
        assert [each["score"] for each in of(records, course)] == [1.0] * 4
    (first, *_) = of(records, "reviewed")
    assert (first["by"], first["attempts"], first["reviews"]) == ("worker", 1, 1)
    assert first["confidence"] == 1.0
    names = {"role", "model", "cached_tokens", "output_tokens", "seconds", "verdict"}
    assert all(names <= line.keys() for line in lines)


def test_the_reviewer_does_not_see_the_text(tmp_path):
    worker, reviewer = chat(Reader(lambda text: False)), chat(Reader())
    played(tmp_path, worker, reviewer, plan(2))
    seen = [prompt.text for prompt in reviewer.asked if step(prompt) == "review"]
    assert seen and all("village" not in text for text in seen)
    assert all(
        prompt.schema == verdicts.SCHEMA for prompt in reviewer.asked if "You review" in prompt.text
    )
    schemas = [prompt.schema for prompt in worker.asked if step(prompt) == "extract"]
    assert schemas and all(each == quotes.SCHEMA for each in schemas)


@pytest.mark.parametrize("revisions", [0, 1, 2, 3])
def test_after_so_many_revisions_the_reviewer_answers(tmp_path, revisions):
    worker = chat(Reader(lambda text: False))
    records, lines = played(tmp_path, worker, chat(Reader()), plan(1, revisions=revisions))
    assert [each for each in actions(lines) if each[1] != "extract"] == [
        ("worker", "draft", None),
        *[("reviewer", "review", "revise"), ("worker", "revise", None)] * revisions,
        ("reviewer", "review", "revise"),
        ("reviewer", "answer", None),
    ]
    (record,) = of(records, "reviewed")
    assert (record["by"], record["score"]) == ("reviewer", 1.0)
    assert (record["attempts"], record["reviews"]) == (revisions + 2, revisions + 1)
    assert of(records, "draft")[0]["score"] == 0.0


def test_a_worker_that_listens_revises(tmp_path):
    """It is told what was wrong, sees its last answer, and keeps its quotes."""
    worker = chat(Reader(lambda text: "WRONG LAST TIME:\n- wrong" in text))
    records, lines = played(tmp_path, worker, chat(Reader()), plan(1))
    assert actions(lines)[-3:] == [
        ("reviewer", "review", "revise"),
        ("worker", "revise", None),
        ("reviewer", "review", "accept"),
    ]
    assert any("YOUR LAST ANSWER:\n" in prompt.text for prompt in worker.asked)
    (record,) = of(records, "reviewed")
    assert (record["by"], record["score"], record["attempts"]) == ("worker", 1.0, 2)


def test_a_reviewer_may_give_the_words_itself(tmp_path):
    def reviewer(prompt, **options):
        if step(prompt) == "review":
            return judged(prompt.text, wording=True)
        return Reader()(prompt)

    records, lines = played(tmp_path, chat(Reader(lambda text: False)), chat(reviewer), plan(1))
    assert actions(lines)[-1] == ("reviewer", "review", "revise")
    (record,) = of(records, "reviewed")
    assert (record["by"], record["score"], record["attempts"]) == ("review", 1.0, 1)


def test_redo_has_the_quotes_taken_anew(tmp_path):
    verdict = json.dumps({"verdict": "redo", "issues": ["more quotes"]})
    worker = chat(Reader())
    _, lines = played(tmp_path, worker, chat(lambda prompt, **o: verdict), plan(1, revisions=1))
    assert [action for _, action, _ in actions(lines)] == [
        *("extract", "draft", "review", "extract", "draft", "review", "answer")
    ]
    told = [p.text for p in worker.asked if step(p) == "extract"][-1]
    assert "- more quotes" in told


def test_invented_quotes_never_reach_the_reviewer(tmp_path):
    worker = chat(Reader(quotes=lambda text: extracted(text, text="It was founded by Nobody.")))
    reviewer = chat(Reader())
    records, lines = played(tmp_path, worker, reviewer, plan(1))
    once = [("worker", "extract", None), ("check", "check", "redo")]
    assert actions(lines) == [*once * 3, ("reviewer", "answer", None)]
    assert not any(step(prompt) == "review" for prompt in reviewer.asked)
    check = next(line for line in lines if line["role"] == "check")
    assert check["prompt_tokens"] == check["output_tokens"] == check["seconds"] == 0
    assert "None of your quotes" in worker.asked[1].text
    (record,) = of(records, "reviewed")
    assert (record["by"], record["score"]) == ("reviewer", 1.0)
    assert of(records, "draft")[0]["confidence"] == 0.0


def test_some_invented_quotes_are_left_out(tmp_path):
    def some(text):
        found = json.loads(extracted(text))["quotes"]
        return json.dumps({"quotes": [*found, {"start": 0, "text": "SECRET"}]})

    reviewer = chat(Reader())
    records, lines = played(tmp_path, chat(Reader(quotes=some)), reviewer, plan(1))
    assert not any("SECRET" in prompt.text for prompt in reviewer.asked)
    counts = next(line["quotes"] for line in lines if line["action"] == "extract")
    assert (counts["said"], counts["invented"], len(counts["kept"])) == (4, 1, 3)
    assert of(records, "draft")[0]["confidence"] == (3 / 4 + 1) / 2


def test_a_broken_reviewer_is_asked_twice_and_then_answers(tmp_path):
    def broken(prompt, **options):
        return "Looks fine to me!" if step(prompt) == "review" else Reader()(prompt)

    reviewer = chat(broken)
    records, lines = played(tmp_path, chat(Reader()), reviewer, plan(1))
    assert actions(lines)[2:] == [
        ("reviewer", "review", "invalid"),
        ("reviewer", "review", "invalid"),
        ("reviewer", "answer", None),
    ]
    assert "could not be read: it is no JSON" in reviewer.asked[1].text
    assert (of(records, "reviewed")[0]["by"], of(records, "reviewed")[0]["invalid"]) == (
        "reviewer",
        2,
    )

    def mends(prompt, **options):
        fine = step(prompt) != "review" or "could not be read" in prompt.text
        return Reader()(prompt) if fine else "{"

    _, lines = played(tmp_path / "mends", chat(Reader()), chat(mends), plan(1))
    assert [verdict for _, _, verdict in actions(lines)[2:]] == ["invalid", "accept"]


def test_a_tier_that_raises_has_an_empty_answer(tmp_path):
    def raises(prompt, **options):
        raise RuntimeError("boom")

    records, lines = played(tmp_path / "w", chat(raises), chat(Reader()), plan(1))
    assert of(records, "reviewed")[0]["score"] == 1.0 and of(records, "draft")[0]["score"] == 0.0
    assert of(records, "reviewed")[0]["errors"] == 3  # the quotes, three times
    assert [line["error"] for line in lines if line["role"] == "worker"][0] == "RuntimeError: boom"
    records, _ = played(tmp_path / "r", chat(Reader()), chat(raises), plan(1))
    (record,) = of(records, "reviewed")
    assert (record["score"], record["invalid"], record["by"]) == (0.0, 2, "reviewer")
    records, _ = played(tmp_path / "t", chat(raises), chat(raises), plan(1, ("chain_3", "refuse")))
    assert {each["score"] for each in records} == {0.0}


def test_a_target_that_fails_stops_the_run_and_is_asked_again(tmp_path):
    """Its absence is no wrong answer: no line is made of it."""
    left = [5]

    def fails(prompt, **options):
        left[0] -= 1
        if left[0] == 0:
            raise InputError("nothing answers there")
        return Reader()(prompt)

    with pytest.raises(InputError, match="nothing answers there"):
        played(tmp_path / "a", chat(fails), chat(Reader()))
    found, lines = played(tmp_path / "a", chat(fails), chat(Reader()))
    whole, others = played(tmp_path / "b", chat(Reader()), chat(Reader()))
    assert sorted(lines, key=step_key) == sorted(others, key=step_key)
    assert found == whole


def test_half_right_workers_are_mended(tmp_path):
    worker = chat(Reader(lambda text: bool(ord(place(text)[0]) % 2)))
    records, _ = played(tmp_path, worker, chat(Reader()), plan(8))
    drafts = [each["score"] for each in of(records, "draft")]
    assert 0 < sum(drafts) < 8
    assert [each["score"] for each in of(records, "reviewed")] == [1.0] * 8


# Conversations with tools.

TOOLS = ("single", "refuse", "chain_3")


def obedient(prompt, **options):
    """Obeys single calls as well as chains."""
    last = prompt.messages[-1]
    single = re.match(r"Call (\w+) with (.*)\. Then tell", prompt.messages[0]["content"])
    if not single:
        return Caller()(prompt)
    if last["role"] == "tool":
        return json.loads(last["content"])["number"]
    pieces = re.findall(r'(\w+) ("[^"]*"|[\w.]+)', single[2])
    arguments = "{" + ", ".join(f'"{name}": {value}' for name, value in pieces) + "}"
    return Answer(
        calls=[{"id": "c", "name": single[1], "arguments": arguments}],
        prompt_tokens=10,
        output_tokens=5,
        seconds=0.5,
    )


def test_tool_tasks_have_an_oracle(tmp_path):
    both = [chat(Reader(tools=obedient)) for _ in range(2)]
    records, lines = played(tmp_path, *both, plan(3, TOOLS))
    assert all(each["score"] == 1.0 for each in records if "refuse" not in each["task"])
    for task in ("single", "chain_3"):
        assert all(each["by"] == "worker" for each in of(records, "reviewed", task))
        assert all(each["confidence"] == 1.0 for each in of(records, "draft", task))
    chain = [line for line in lines if line["task"] == "chain_3" and line["sample"] == 0]
    assert [line["action"] for line in sorted(chain, key=step_key)][:5] == ["draft"] * 4 + [
        "review"
    ]
    shown = next(p.text for p in both[1].asked if "CALLS:" in p.text)
    assert shown.count(" -> {") in (1, 3)
    assert all(each["score"] == 1.0 for each in of(records, "draft", "refuse"))


def test_calls_that_are_sent_back_are_played_anew(tmp_path):
    def sloppy(prompt, **options):
        """Its first call is wrong, unless it has been told so."""
        told = "WRONG LAST TIME" in prompt.messages[0]["content"]
        if told:  # what was said first is what counts
            first = dict(prompt.messages[0])
            first["content"] = first["content"].split("\n\nWRONG")[0]
            prompt = type(prompt)((first, *prompt.messages[1:]), tools=prompt.tools)
        return Caller(lambda turn, a: a if told else {"code": 7})(prompt)

    records, lines = played(
        tmp_path, chat(Reader(tools=sloppy)), chat(Reader()), plan(2, ("chain_3",))
    )
    assert [each["score"] for each in of(records, "draft", "chain_3")] == [0.0] * 2
    for each in of(records, "reviewed", "chain_3"):
        assert (each["score"], each["by"], each["attempts"]) == (1.0, "worker", 2)
    assert all(each["confidence"] == 0.0 for each in of(records, "draft", "chain_3"))


def test_in_words_a_review_is_a_second_answer(tmp_path):
    def answer(prompt, **options):
        facts, question = prompt.messages[0]["content"], prompt.messages[-1]["content"]
        key = question.split('"')[1]
        found = facts.split(f'"{key}" is "')
        return (
            f'It is "{found[1].split(chr(34))[0]}".'
            if len(found) > 1
            else f'I do not know "{key}".'
        )

    def half(prompt, **options):
        facts = prompt.messages[0]["content"]
        key = prompt.messages[-1]["content"].split('"')[1]
        if ord(key[0]) % 2:
            return answer(prompt)
        return "It is " + facts.split(" is ")[1].split(".")[0] + "."

    of_words = plan(8, form="words")
    records, lines = played(tmp_path, chat(half), chat(answer), of_words)
    drafts = {each["sample"]: each["score"] for each in of(records, "draft")}
    assert 0 < sum(drafts.values()) < 8
    for each in of(records, "reviewed"):
        assert each["score"] == 1.0
        assert each["by"] == ("worker" if drafts[each["sample"]] else "reviewer")
    assert not has_own_way("words", "extraction") and not of(records, "worker")
    assert "redo" in {line["verdict"] for line in lines}


def test_in_words_tools_are_reviewed_from_their_results(tmp_path):
    def calls(prompt, **options):
        last = prompt.messages[-1]
        if last["role"] == "tool":
            result = json.loads(last["content"])
            if "value" in result:
                return f'It is "{result["value"]}".'
            ((name, key),) = result.items()
        else:
            text = last["content"]
            if '"' not in text:
                return "I have no tool for that."
            first = text.split()[0].lower()
            kinds = {"entry": "get", "file": "open", "user": "find"}
            name = kinds[text.split()[1]] if first == "follow" else first
            key = text.split('"')[1]
        (tool,) = (t["function"] for t in prompt.tools if t["function"]["name"] == name)
        (parameter,) = tool["parameters"]["properties"]
        call = {"id": "c", "name": name, "arguments": json.dumps({parameter: key})}
        return Answer(calls=[call], prompt_tokens=5, output_tokens=5, seconds=0.1)

    def misreads(prompt, **options):
        found = calls(prompt)
        return found if isinstance(found, Answer) else "It is lost."

    tasks = ("single", "refuse", "chain_3", "chain_5")
    records, _ = played(tmp_path / "a", chat(calls), chat(calls), plan(2, tasks, form="words"))
    assert {(each["score"], each["by"]) for each in records if "/reviewer" not in each["task"]} == {
        (1.0, "worker")
    }
    records, _ = played(
        tmp_path / "b", chat(misreads), chat(calls), plan(2, ("chain_3",), form="words")
    )
    assert {each["by"] for each in of(records, "reviewed", "chain_3")} == {"review"}
    assert {each["score"] for each in of(records, "reviewed", "chain_3")} == {1.0}


# The ledger.


def test_a_run_goes_on_at_any_byte(tmp_path):
    worker = Reader(lambda text: bool(ord(place(text)[0]) % 2))
    whole, lines = played(tmp_path / "whole", chat(worker), chat(Reader()))
    raw = (tmp_path / "whole" / LEDGER).read_bytes()
    for cut in (0, 1, len(raw) // 3, len(raw) // 2, len(raw) - 1, len(raw)):
        part = tmp_path / str(cut)
        with Ledger(part, RUN):
            pass
        (part / LEDGER).write_bytes(raw[:cut])
        both = [chat(worker), chat(Reader())]
        found, again = played(part, *both)
        assert again == lines and found == whole
        made = sum(len(target.asked) for target in both)
        checks = sum(line["role"] == "check" for line in lines)
        assert checks == 0 and made == len(lines) - raw[:cut].count(b"\n")


CHILD = """
import sys
from tests.eval.test_tiers import played, plan
from tests.eval.tiers import Reader, chat
slow = [chat(Reader()), chat(Reader())]
for target in slow:
    target._seconds = 0.004
played(sys.argv[1], *slow, plan(12), 3)
"""


def test_killed_at_any_moment_and_run_again(tmp_path):
    """With three at a time: the same steps as without, none twice."""
    whole, lines = played(tmp_path / "whole", chat(Reader()), chat(Reader()), plan(12))
    path = tmp_path / "killed" / LEDGER
    command = [sys.executable, "-c", CHILD, str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for enough in (1, 30):
        spawn.kill_at(enough, path, command, cwd=ROOT, env=environment)
    found, again = played(tmp_path / "killed", chat(Reader()), chat(Reader()), plan(12))
    assert sorted(again, key=step_key) == sorted(lines, key=step_key)
    assert sorted(map(str, found)) == sorted(map(str, whole))
    assert path.read_bytes().count(b"\n") == len(lines)
    assert len(read_records(tmp_path / "killed")) == len(whole)


def test_a_ledger_of_another_run_or_damaged_is_refused(tmp_path):
    played(tmp_path, chat(Reader()), chat(Reader()), plan(1))
    with pytest.raises(InputError, match="another run: its seed is 0"):
        Ledger(tmp_path, RUN | {"seed": 1})
    path = tmp_path / LEDGER
    (tmp_path / "records.jsonl").unlink()
    whole = path.read_text()
    path.write_text(whole.replace('"action": "draft"', '"action": "guess"'))
    with pytest.raises(InputError, match=r"worker \(guess\), and worker \(draft\) comes next"):
        played(tmp_path, chat(Reader()), chat(Reader()), plan(1))
    path.write_text("{}\n" + whole)
    with pytest.raises(InputError, match=r"ledger.jsonl:1: is no record"):
        Ledger(tmp_path, RUN)


# Policies and what they cost.


def priced(records, rule="confidence", prices=None, shares=SHARES):
    prices = prices or TierPrices(Prices(1e6), Prices(1e6))
    rows = policies.compared(records, shares, rule, prices)
    return {row["policy"]: row for row in rows}


def record(course, sample, score, worker=0, reviewer=0, confidence=1.0, by="worker", attempts=1):
    empty = dict.fromkeys(("cached_tokens", "output_tokens", "seconds"), 0)
    return {
        "task": f"extraction/{course}",
        "length": 100,
        "sample": sample,
        "score": score,
        "confidence": confidence,
        "by": by,
        "attempts": attempts,
        "prompt_tokens": worker + reviewer,
        **empty,
        "by_role": {
            "worker": {"prompt_tokens": worker, **empty},
            "reviewer": {"prompt_tokens": reviewer, **empty},
        },
    }


def four():
    """Four tasks: the worker solves the first two at 1 each, the reviewer all at 10 each.

    A review costs 2 where it accepts, and 14 where the reviewer answers itself in the end. The
    worker's confidence knows which drafts are wrong.
    """
    found = []
    for n in range(4):
        good = float(n < 2)
        spent = (1, 2, "worker", 1) if good else (2, 14, "reviewer", 3)
        found += [
            record("draft", n, good, 1, confidence=good),
            record("reviewed", n, 1.0, *spent[:2], confidence=good, by=spent[2], attempts=spent[3]),
            record("reviewer", n, 1.0, 0, 10, by="reviewer"),
        ]
    return found


def test_costs_are_those_of_the_closed_form():
    rows = priced(four())
    expected = {
        WORKER: (0.5, 4 / 2, 1.0, 0.0),
        "0 % reviewed": (0.5, 4 / 2, 1.0, 0.0),
        "25 % reviewed": (0.75, (3 + 16) / 3, 1.5, 0.25),
        "50 % reviewed": (1.0, (2 + 32) / 4, 2.0, 0.5),
        "75 % reviewed": (1.0, (1 + 3 + 32) / 4, 2.0, 0.5),
        "100 % reviewed": (1.0, (6 + 32) / 4, 2.0, 0.5),
        REVIEWER: (1.0, 10.0, 1.0, 1.0),
    }
    assert list(rows) == list(expected)
    for name, (success, cost, attempts, own) in expected.items():
        row = rows[name]
        assert (row["mean"], row["attempts_per_task"], row["own"]) == (success, attempts, own)
        assert row["cost_per_task"] == pytest.approx(cost)
        assert row["low"] <= row["mean"] <= row["high"] and row["n"] == 4
    assert [rows[f"{s} % reviewed"]["reviewed"] for s in SHARES] == [0, 0.25, 0.5, 0.75, 1]
    assert rows["100 % reviewed"]["worker_tokens"] == 6
    assert rows["100 % reviewed"]["reviewer_tokens"] == 32


def test_each_tier_has_prices_of_its_own():
    prices = TierPrices(Prices(prompt=1.0), Prices(prompt=100.0, hour=3600.0))
    assert priced(four(), prices=prices)[REVIEWER]["cost_per_task"] == pytest.approx(1e-3)
    assert priced(four(), prices=prices)[WORKER]["cost_per_task"] == pytest.approx(2e-6)
    free = TierPrices()
    timed = four()
    for each in timed:
        each["by_role"]["worker"]["seconds"] = 0.5
    assert free.unit == "seconds"
    assert priced(timed, prices=free)[WORKER]["cost_per_task"] == pytest.approx(1.0)


def test_nothing_solved_costs_without_end():
    lost = [each | {"score": 0.5} for each in four()]
    assert all(row["cost_per_task"] is None for row in priced(lost).values())


def test_shares_are_of_the_drafts_by_rule():
    assert [policies.count(share, 10) for share in (0, 4, 5, 25, 75, 100)] == [0, 0, 1, 3, 8, 10]
    drafts = [record("draft", n, 1.0, confidence=c) for n, c in enumerate((0.5, 0.0, 1.0, 0.5))]
    by_confidence = policies.order(drafts, "confidence", 0)
    assert by_confidence[0] == 1 and by_confidence[-1] == 2
    hashed = [policies.order(drafts, "hash", seed) for seed in range(20)]
    assert len({tuple(each) for each in hashed}) > 5
    assert policies.order(drafts[::-1], "hash", 3) == hashed[3]
    assert policies.to_review(four(), (0, 50), "confidence", 0) == {
        ("extraction", 100, 2),
        ("extraction", 100, 3),
    }


def test_policies_whose_records_are_missing_are_left_out():
    some = [
        each for each in four() if not (each["task"].endswith("/reviewed") and each["sample"] < 2)
    ]
    assert list(priced(some)) == [
        WORKER,
        "0 % reviewed",
        "25 % reviewed",
        "50 % reviewed",
        REVIEWER,
    ]
    few = [
        each for each in four() if not (each["task"].endswith("/reviewer") and each["sample"] == 3)
    ]
    assert {row["n"] for row in priced(few).values()} == {3}
    assert not priced([])


def test_tasks_are_pooled():
    other = [each | {"task": each["task"].replace("extraction", "single")} for each in four()]
    rows = policies.compared([*four(), *other], SHARES, "hash", TierPrices())
    pooled = [row for row in rows if row["task"] == policies.ALL]
    assert len(pooled) == 7 and {row["n"] for row in pooled} == {8}


def test_ledger_and_records_have_the_same_totals(tmp_path):
    worker = chat(Reader(lambda text: bool(ord(place(text)[0]) % 2)))
    records, lines = played(tmp_path, worker, chat(Reader()), plan(6))
    for role in ("worker", "reviewer"):
        for name in ("prompt_tokens", "output_tokens", "seconds"):
            of_lines = sum(line[name] for line in lines if line["role"] == role)
            kept = [each for each in records if not each["task"].endswith("/draft")]
            assert of_lines == pytest.approx(sum(each["by_role"][role][name] for each in kept))
    rows = priced(records)
    assert rows["0 % reviewed"]["mean"] <= rows["100 % reviewed"]["mean"] == 1.0


def test_the_report_asks_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    hostile = "<script>alert(1)</script>"
    worker = chat(Reader(lambda text: bool(ord(place(text)[0]) % 2)), hostile)
    records, lines = played(tmp_path, worker, chat(Reader()), plan(4))
    run = RUN | {"worker": {"model": hostile}, "reviewer": {"model": "r"}}
    prices = TierPrices(Prices(1.0), Prices(10.0))
    summary = tier_report.summarize(run, records, lines, SHARES, "confidence", prices)
    assert tier_report.write(tmp_path, summary) is None
    page = (tmp_path / "report.html").read_text()
    assert hostile not in page and "&lt;script&gt;" in page
    assert "http" not in page.replace("data:image", "") and "url(" not in page
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["verdicts"]["reviewer: accept"] > 0
    text = tier_report.as_table(summary)
    assert "75 % reviewed" in text and "reviewer alone" in text
    lost = [each | {"score": 0.0} for each in records]
    lost = tier_report.summarize(run, lost, lines, SHARES, "hash", prices)
    assert tier_report.write(tmp_path, lost) is None
    assert "no policy solved any" in tier_report.sentences(lost)[0]
    assert "without end" in tier_report.as_table(lost)


CALLS = st.fixed_dictionaries(
    {
        "id": st.text(),
        "name": st.text() | st.sampled_from(["get", "open", "find"]),
        "arguments": st.text() | st.sampled_from(["", "{}", "[]", '{"key": "x"}', '{"code": 1}']),
    }
)
SAID = (
    st.text()
    | st.sampled_from(["{}", "null", '{"quotes": [{"text": "I"}]}', '{"verdict": "redo"}'])
    | st.tuples(st.text(), st.lists(CALLS, max_size=3))
)


@settings(max_examples=12, deadline=None)
@given(st.lists(SAID))
def test_any_answers_end_in_records(tmp_path_factory, said):
    """Answers and calls drawn at random, of both tiers, never break the protocol."""
    tasks = ("extraction", "single", "refuse", "chain_3")
    said = [Answer(*each) if isinstance(each, tuple) else each for each in said]
    for form in ("json", "words"):
        answers = iter([*said, *[""] * 400])
        both = [chat(lambda prompt, answers=answers, **options: next(answers)) for _ in range(2)]
        directory = tmp_path_factory.mktemp("fuzzed")
        records, lines = played(directory, *both, plan(1, tasks, 1, form, (1500,)))
        assert len({step_key(line) for line in lines}) == len(lines)
        assert all(0 <= each["score"] <= 1 for each in records)
        (directory / "records.jsonl").unlink()  # from the ledger alone it comes out the same
        silent = [chat(lambda prompt, **options: 1 / 0) for _ in range(2)]
        assert played(directory, *silent, plan(1, tasks, 1, form, (1500,))) == (records, lines)
