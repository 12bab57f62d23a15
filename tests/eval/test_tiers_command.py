"""`v4jax tiers`: two endpoints, resumed; wrong arguments, each a sentence."""

import json

import pytest

from tests.eval.test_endpoint import says, serving
from tests.eval.tiers import Reader
from v4jax.cli import main
from v4jax.eval.ledger import LEDGER
from v4jax.eval.sample import asked


def reads(good=lambda text: True):
    """What an endpoint's model answers to the one turn of a body."""
    reader = Reader(good)
    return says(lambda body: reader(asked(body["messages"][0]["content"])))


def test_the_command_runs_both_and_goes_on(tmp_path, capsys):
    out = tmp_path / "run"
    with serving(reads(lambda text: "MARKET" in text)) as worker, serving(reads()) as reviewer:
        command = ["v4jax", "tiers", f"--worker={worker.url}", f"--reviewer={reviewer.url}"]
        command += ["--worker_model=m", "--reviewer_model=m", "--lengths=2000", "--samples=4"]
        command += [f"--out={out}", "--revisions=1", "--concurrency=2"]
        command += ["--worker_price_prompt=1", "--reviewer_price_prompt=10"]
        assert main.main([*command, "--shares=0,50", "--format=json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        rows = {row["policy"]: row for row in summary["policies"]}
        assert list(rows) == ["worker alone", "0 % reviewed", "50 % reviewed", "reviewer alone"]
        assert [row["mean"] for row in rows.values()] == [0.0, 0.0, 0.5, 1.0]
        assert rows["0 % reviewed"]["cost_per_task"] is None
        # Twelve of the stand-in's tokens are read in a step, eight of them from its cache.
        assert rows["reviewer alone"]["cost_per_task"] == pytest.approx(4 * 10 / 1e6)
        half = 4 * (2 * 4) + 2 * (4 + 2 * 10 * 4 + 10 * 4)
        assert rows["50 % reviewed"]["cost_per_task"] == pytest.approx(half / 2 / 1e6)
        assert summary == json.loads((out / "summary.json").read_text())
        before = len(worker.bodies), len(reviewer.bodies)
        lines = (out / LEDGER).read_text().count("\n")
        assert lines == sum(before)
        assert main.main([*command, "--shares=0,50", "--rule=hash"]) == 0  # other reviews, perhaps
        assert "50 % reviewed" in capsys.readouterr().out
        assert main.main([*command, "--shares=100"]) == 0
        said = capsys.readouterr()
        assert "100 % reviewed" in said.out and "4 of 4 are there" in said.err
        assert len(worker.bodies) - before[0] <= 2 and len(reviewer.bodies) - before[1] <= 6
        assert all(
            "response_format" in body for _, body in reviewer.bodies if "You review" in str(body)
        )
        assert main.main([*command, "--seed=1"]) == 2
        assert "another run: its seed is 0" in capsys.readouterr().err
        assert main.main([*command, "--lengths=4500"]) == 2
        assert "needs 5524 tokens with what the steps add" in capsys.readouterr().err


def test_each_endpoint_gets_its_own_key(tmp_path, capsys, monkeypatch):
    with serving(reads(), key="w") as worker, serving(reads(), key="r") as reviewer:
        command = ["v4jax", "tiers", f"--worker={worker.url}", f"--reviewer={reviewer.url}"]
        command += ["--worker_model=m", "--reviewer_model=m", "--lengths=1500", "--samples=1"]
        monkeypatch.setenv("V4JAX_API_KEY", "w")
        assert main.main([*command, f"--out={tmp_path}"]) == 2
        assert "refuses the key" in capsys.readouterr().err
        monkeypatch.setenv("V4JAX_WORKER_KEY", "w")
        assert main.main([*command, f"--out={tmp_path}"]) == 2
        monkeypatch.setenv("V4JAX_REVIEWER_KEY", "r")
        assert main.main([*command, f"--out={tmp_path}"]) == 0


def test_an_endpoint_that_fails_keeps_the_ledger(tmp_path, capsys, monkeypatch):
    from v4jax.eval import endpoint

    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)
    fine = reads()

    def fails(handler, body):
        if len(handler.server.bodies) > 3:
            handler._json(500, {"error": {"message": "down"}})
        else:
            fine(handler, body)

    out = tmp_path / "run"
    with serving(fails) as worker, serving(reads()) as reviewer:
        command = ["v4jax", "tiers", f"--worker={worker.url}", f"--reviewer={reviewer.url}"]
        command += ["--worker_model=m", "--reviewer_model=m", "--lengths=2000", "--samples=3"]
        assert main.main([*command, f"--out={out}"]) == 2
        assert "status 500 (down)" in capsys.readouterr().err
        assert (out / LEDGER).read_text().count("\n") == 3
        worker.answers = fine
        assert main.main([*command, f"--out={out}", "--noalone"]) == 0
        assert "100 % reviewed" in (text := capsys.readouterr().out)
        assert "reviewer alone" not in text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "--reviewer is missing"),
        (["--reviewer=/nowhere"], "/nowhere"),
        (["--reviewer=http://127.0.0.1:9/v1"], "--reviewer_model is missing"),
        (["--reviewer=nano", "--reviewer_model=x"], "--reviewer is no URL"),
        (["--worker="], "--worker is missing"),
        (
            ["--reviewer=nano", "--tasks=singel"],
            "there is no task 'singel' of two tiers, maybe single",
        ),
        (["--reviewer=nano", "--tasks="], "tasks is empty"),
        (["--reviewer=nano", "--tasks=single,single"], "the task single is named twice"),
        (["--reviewer=nano", "--tasks=single"], "calls tools, and --worker is a checkpoint"),
        (["--reviewer=nano", "--lengths=4000"], "reads at most 4096"),
        (["--reviewer=nano", "--lengths=a"], "--lengths is 'a'"),
        (["--reviewer=nano", "--lengths="], "lengths is empty"),
        (["--reviewer=nano", "--lengths=0"], "a length is 0"),
        (["--reviewer=nano", "--samples=0"], "samples is 0; expected 1 or more"),
        (["--reviewer=nano", "--seed=-1"], "seed is -1"),
        (["--reviewer=nano", "--revisions=-1"], "revisions is -1; expected 0 to 20"),
        (["--reviewer=nano", "--shares="], "shares is empty"),
        (["--reviewer=nano", "--shares=101"], "a share is 101; expected 0 to 100"),
        (["--reviewer=nano", "--rule=best"], "--rule is 'best'; expected confidence or hash"),
        (["--reviewer=nano", "--worker_price_hour=-1"], "price of hour is -1.0"),
        (["x"], "there is an argument too many"),
    ],
)
def test_bad_input_is_one_sentence(flags, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["v4jax", "tiers", *flags]) == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert sentence in said
    assert not list(tmp_path.rglob(LEDGER))
