"""A run's records: resumed at any line, none twice, those of another run refused."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.eval.targets import Caller, Fake, needle_reader
from tests.support import spawn
from v4jax.errors import InputError
from v4jax.eval import compare, controls, latency, needle, probes, report, tool_use
from v4jax.eval.dice import Dice
from v4jax.eval.records import Records, read_records
from v4jax.eval.sample import Task
from v4jax.eval.suite import Job, jobs_of, run
from v4jax.eval.summary import summarize

RUN = {"suite": "needle", "seed": 0, "model": "fake"}
ROOT = Path(__file__).resolve().parents[2]


def jobs(samples=6, lengths=(3000, 4000)):
    return jobs_of(needle.task("plain"), lengths, samples, 0)


def told(directory):
    """The records without their times, in no order."""
    lines = read_records(directory)
    for line in lines:
        line.pop("seconds"), line.pop("first_token_seconds")
    return sorted(lines, key=lambda each: (each["length"], each["sample"]))


def test_records_have_what_section_7_says(tmp_path):
    with Records(tmp_path, RUN) as records:
        assert run(jobs(), Fake(needle_reader), records) == 0
    names = "task seed length depth prompt_tokens cached_tokens output_tokens seconds"
    names = f"{names} first_token_seconds answer expected score".split()
    lines = read_records(tmp_path)
    assert len(lines) == 12
    for line in lines:
        assert set(names) <= line.keys()
        assert line["score"] == 1.0 and line["prompt_tokens"] <= line["length"]
    assert sorted({line["depth"] for line in lines}) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_a_run_goes_on_at_any_byte(tmp_path):
    with Records(tmp_path / "whole", RUN) as records:
        run(jobs(), Fake(needle_reader), records)
    whole = (tmp_path / "whole" / "records.jsonl").read_bytes()
    for cut in (0, 1, 7, len(whole) // 3, len(whole) // 2, len(whole) - 1, len(whole)):
        part = tmp_path / str(cut)
        with Records(part, RUN):
            pass
        (part / "records.jsonl").write_bytes(whole[:cut])
        target = Fake(needle_reader)
        with Records(part, RUN) as records:
            run(jobs(), target, records)
        assert told(part) == told(tmp_path / "whole")
        assert len(target.asked) == 12 - whole[:cut].count(b"\n")


CHILD = """
import sys
from tests.eval.targets import Fake, needle_reader
from tests.eval.test_suite import RUN, jobs
from v4jax.eval.records import Records
from v4jax.eval.suite import run
with Records(sys.argv[1], RUN) as records:
    run(jobs(20), Fake(needle_reader, seconds=0.002), records, concurrency=3)
"""


def test_killed_at_any_moment_and_run_again(tmp_path):
    """With three workers: the same records as without, none twice."""
    with Records(tmp_path / "whole", RUN) as records:
        run(jobs(20), Fake(needle_reader), records)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    path = tmp_path / "killed" / "records.jsonl"
    for enough in (1, 15):
        spawn.kill_at(enough, path, command, cwd=ROOT, env=environment)
    done = subprocess.run(command, cwd=ROOT, env=environment)
    assert done.returncode == 0
    assert told(tmp_path / "killed") == told(tmp_path / "whole")
    assert path.read_bytes().count(b"\n") == 40


def test_records_of_another_run_are_refused(tmp_path):
    with Records(tmp_path, RUN):
        pass
    for name, value in (("seed", 1), ("model", "other"), ("suite", "ruler")):
        with pytest.raises(InputError, match=f"another run: its {name} is"):
            Records(tmp_path, RUN | {name: value})
    with pytest.raises(InputError, match="version"):
        Records(tmp_path, RUN | {"version": "9"})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        Records(tmp_path, RUN)
    (tmp_path / "run.json").unlink()
    Records(tmp_path, RUN).close()  # there were no records yet
    (tmp_path / "run.json").unlink()
    (tmp_path / "records.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="nobody knows whose"):
        Records(tmp_path, RUN)


def test_damaged_lines_and_a_second_process_are_refused(tmp_path):
    with Records(tmp_path, RUN) as records:
        records.add({"task": "a", "length": 1, "sample": 0})
        with pytest.raises(InputError, match="another process"):
            Records(tmp_path, RUN)
    path = tmp_path / "records.jsonl"
    path.write_text('{"task": "a"}\n' + path.read_text())
    with pytest.raises(InputError, match=r"records.jsonl:1: is no record"):
        Records(tmp_path, RUN)
    with pytest.raises(InputError, match="cannot be used"):
        Records(path / "below", RUN)


def test_a_score_that_raises_is_named_and_records_are_kept(tmp_path):
    task = needle.task("plain")

    def judge(sample, answer):
        if len(records.done) == 3:
            raise KeyError("no such verdict")
        return {"score": 1.0}

    broken = Task(task.name, task.make, judge, depths=True)
    with Records(tmp_path, RUN) as records:
        with pytest.raises(InputError, match="score of needle raised KeyError for sample 3"):
            run(jobs_of(broken, (3000,), 6, 0), Fake(needle_reader), records)
        assert len(records.done) == 3
        assert run(jobs(6, (3000,)), Fake(needle_reader), records) == 0
    assert len(read_records(tmp_path)) == 6


def test_lengths_that_are_too_short_are_left_out(tmp_path):
    said = []
    with Records(tmp_path, RUN) as records:
        assert run(jobs(2, (60, 3000)), Fake(needle_reader), records, skip=said.append) == 0
        assert len(records.done) == 2
    assert len(set(said)) == 1 and "expected a length of" in said[0]


def test_time_that_is_up_leaves_jobs_for_later(tmp_path):
    with Records(tmp_path, RUN) as records:
        ended = time.monotonic() - 1
        assert run(jobs(), Fake(needle_reader), records, deadline=ended) == 12
        assert not records.done


def test_workers_share_the_jobs(tmp_path):
    meet = threading.Barrier(3, timeout=20)

    def answer(prompt, **options):
        meet.wait()  # three at a time, or never
        return needle_reader(prompt)

    with Records(tmp_path, RUN) as records:
        run(jobs(3), Fake(answer), records, concurrency=3)
    assert len(read_records(tmp_path)) == 6


def test_runs_that_may_be_cut_short_take_far_depths_first():
    found = jobs_of(needle.task("plain"), (1000, 2000), 8, 0, spread=True)
    order = [job.sample for job in found if job.length == 1000]
    assert order == [0, 4, 2, 6, 1, 5, 3, 7]
    assert [job.length for job in found[:4]] == [1000, 2000, 1000, 2000]


# Conversations with tools.


def played(answer, script):
    return tool_use.play(Fake(answer, style="chat"), script, 0.0, 0)


def test_a_chain_that_is_obeyed_scores_1():
    for calls in (1, 3, 20):
        script = tool_use.chain(Dice("t", calls), calls)
        record = played(Caller(), script)
        assert record["score"] == record["in_order"] == record["exact_calls"] == 1.0
        assert record["turns"] == calls + 1 and record["steps_done"] == 1.0
        assert record["prompt_tokens"] == 10 * calls
        assert record["expected"] == record["answer"]


def test_a_chain_that_is_spoilt_is_counted_where():
    script = tool_use.chain(Dice("t"), 5)
    record = played(Caller(lambda turn, a: "{half" if turn == 2 else a), script)
    assert record["score"] == record["ended_right"] == 0.0
    assert record["steps_done"] == 2 / 5 and record["valid_calls"] == 2 / 3
    record = played(Caller(lambda turn, a: {"code": 7} if turn == 0 else a), script)
    assert record["wrong_types"] == 1.0 and record["steps_done"] == 0.0
    again = played(lambda prompt, **options: Caller()(_first(prompt)), script)
    assert again["in_order"] == 0.0 and again["steps_done"] == 1 / 5  # the first call, repeated


def _first(prompt):
    return type(prompt)(prompt.messages[:1], tools=prompt.tools)


def test_refusals_are_right_without_a_call():
    script = tool_use.refusal(Dice("r"))
    assert played(lambda prompt, **options: "the second", script)["score"] == 1.0
    assert played(lambda prompt, **options: "", script)["score"] == 0.0
    caller = {"id": "1", "name": script.tools[0].name, "arguments": "{}"}

    def call(prompt, **options):
        from v4jax.eval.sample import Answer

        return Answer(text="x", calls=[caller])

    assert played(call, script)["score"] == 0.0


def test_single_calls_are_held_against_types():
    """Every kind of value, as it ought to be and as text."""
    for number in range(40):
        script = tool_use.single(Dice("s", number))
        (step,) = script.steps

        def answer(prompt, spoilt=None, step=step, **options):
            from v4jax.eval.sample import Answer

            if prompt.messages[-1]["role"] == "tool":
                return json.loads(prompt.messages[-1]["content"]).get("number", "?")
            arguments = dict(step.arguments)
            if spoilt:
                arguments[spoilt] = str(arguments[spoilt]) + ("" if spoilt != "label" else "!")
            call = {"id": "1", "name": step.name, "arguments": json.dumps(arguments)}
            return Answer(calls=[call])

        assert played(answer, script)["score"] == 1.0
        for name, value in step.arguments.items():
            if not isinstance(value, str):
                bad = played(lambda p, **o: answer(p, name, **o), script)  # noqa: B023
                assert bad["score"] == 0.0 and bad["wrong_types"] == 1.0


def test_nanos_own_words_are_scripts_too():
    for make in (tool_use.looked_up, lambda dice: tool_use.followed(dice, 4)):
        script = make(Dice("n"))
        assert (
            script.steps[0].arguments.keys()
            == tool_use.find(script.tools, script.steps[0].name).parameters.keys()
        )
        (key,) = script.steps[0].arguments.values()
        assert f'"{key}".' in script.user
        assert list(script.steps[-1].result) == ["value"]
        assert script.final in script.steps[-1].result.values()
    for step, after in zip(script.steps[:-1], script.steps[1:], strict=True):
        assert step.result == {after.name: next(iter(after.arguments.values()))}
    assert tool_use.declined(Dice("n")).steps == ()


def test_jobs_of_tools_repeat_their_scripts():
    found = tool_use.jobs(0, 2, 3)
    assert len({job.key for job in found}) == len(found) == 6 * 2 * 3
    record = found[0].run(Fake(Caller(), style="chat"))
    assert {"item", "trial", "score"} <= record.keys()


# What needs times, tokens or a server.


def test_latency_records_both_waits():
    found = latency.jobs(0, (100,), (1, 3))
    assert [job.task for job in found] == ["cold_x1", "warm_x1", "cold_x3", "warm_x3"] + [
        "while_reading"
    ]
    for job in found[:4]:
        record = job.run(Fake())
        many = record["concurrency"]
        assert record["output_tokens"] == many * latency.NEW_TOKENS
        assert record["prompt_tokens"] == many * (100 - latency.NEW_TOKENS)
        assert record["first_token_seconds"] == pytest.approx(0.1)
        assert record["between_median"] == pytest.approx(0.01)
    assert found[4].run(Fake())["tokens_meanwhile"] >= 0
    assert latency.gaps([(1.0, 1), (3.0, 2)]) == [1.0, 1.0]


def test_probes_cover_every_offset_and_lay_needles_there():
    found = probes.jobs(0, (600,), 2, "facts")
    seen = {"offset_4": set(), "offset_128": set()}
    away = set()
    for job in found:
        if job.task.startswith("copy"):
            continue
        if job.task == "indexer_recall":
            with pytest.raises(InputError, match="needs a --checkpoint"):
                job.run(Fake())
            continue
        record = job.run(Fake())
        assert record["prompt_tokens"] == 600 - probes.BUDGET
        if job.task in seen:
            seen[job.task].add(record[f"mod_{job.task.split('_')[1]}"])
        if job.task == "window":
            away.add(record["away"])
    assert seen == {"offset_4": set(range(4)), "offset_128": set(range(128))}
    assert away == {128 + each for each in probes.AROUND}


def test_reports_are_files_that_ask_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    hostile = "<script>alert(1)</script>"

    def answer(prompt, **options):
        return needle_reader(prompt) if len(target.asked) % 3 else hostile

    target = Fake(answer)
    with Records(tmp_path, RUN) as records:
        run(jobs(), target, records)
        made = [job for job in tool_use.jobs(0, 1, 2) if job.task.startswith("chain")]
        run(made, Fake(Caller(), style="chat"), records)
        run(latency.jobs(0, (100, 200), (1,)), target, records)
        everything = list(records.done.values())
    summary = summarize(RUN, everything)
    assert report.write(tmp_path, everything, summary) is None
    page = (tmp_path / "report.html").read_text()
    assert hostile not in page and "&lt;script&gt;" in page
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page.replace("data:image", "") and "url(" not in page
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    (chain,) = (each for each in summary["results"] if each["task"] == "chain_10")
    assert chain["pass_k"]["2"]["mean"] == 1.0


def test_runs_are_compared_in_pairs(tmp_path):
    for name, spoilt in (("a", 2), ("b", 10**9)):
        target = Fake()
        target._answer = lambda prompt, t=target, s=spoilt, **o: (
            needle_reader(prompt) if len(t.asked) % s else "no"
        )
        with Records(tmp_path / name, RUN) as records:
            run(jobs(), target, records)
    directories = [str(tmp_path / "a"), str(tmp_path / "b")]
    runs, summaries = compare.read(directories)
    found = compare.compared(runs)
    assert [each["length"] for each in found] == [3000, 4000, 0]
    every = found[-1]
    assert every["n"] == 12 and every["first"] == 0.5 and every["this"] == 1.0
    assert every["mean"] == 0.5 and every["p"] == 2 / 2**6
    assert summaries["b"]["results"][0]["mean"] == 1.0
    rows = compare.as_rows(found)
    report.write_comparison(tmp_path / "c.html", runs, summaries, compare.COLUMNS, rows)
    assert "+0.500" in (tmp_path / "c.html").read_text()
    with pytest.raises(InputError, match="two or more"):
        compare.read(directories[:1])
    with Records(tmp_path / "other", RUN | {"seed": 3}):
        pass
    with pytest.raises(InputError, match="another seed"):
        compare.read([*directories, str(tmp_path / "other")])


def test_a_control_that_was_not_checked_has_no_score():
    from v4jax.eval.http_client import Client

    server = controls.Controlled(Client("http://127.0.0.1:9/v1"), "m")
    outcomes = {job.task: job.run(None) for job in controls.jobs(server)}
    assert outcomes["access_with_key"]["score"] == 0.0
    assert "nothing answers" in outcomes["access_with_key"]["answer"]
    assert outcomes["tenants_apart"]["score"] is None
    assert "--other_key" in outcomes["tenants_apart"]["expected"]


def test_jobs_have_keys():
    assert Job("a", 1, 2, dict).key == ("a", 1, 2)
