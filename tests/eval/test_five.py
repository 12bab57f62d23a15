"""The five tests at an endpoint: all parts, in their time, into one report."""

import json

import pytest

from tests.eval.test_endpoint import says, serving
from v4jax.cli import main
from v4jax.eval import five
from v4jax.eval.records import read_records


def test_lengths_grow_with_the_minutes_up_to_the_models():
    assert five.lengths(10.0, 4096, False) == (1024, 4096)
    assert five.lengths(10.0, None, False) == (1024, 4096, 16384)
    assert five.lengths(2.0, None, False) == (1024, 2048)
    assert five.lengths(10.0, None, True)[-1] == 2**20
    assert five.lengths(10.0, 512, False) == (512,)
    assert five.lengths(0.001, 4096, False) == (1024,)


def test_parts_share_the_time():
    left = list(five.SHARES)
    assert five.deadline("needle", left, 0.0, 100.0) == pytest.approx(30.0)
    assert five.deadline("controls", ["controls"], 40.0, 100.0) == 100.0
    assert five.deadline("controls", ["controls"], 140.0, 100.0) == 140.0


def test_all_five_run_at_an_endpoint(tmp_path, capsys):
    with serving(says("hello"), models=({"id": "m"},)) as server:
        command = ["v4jax", "eval", "five", f"--endpoint={server.url}", "--model=m"]
        command += ["--lengths=1500,2500", "--minutes=5", "--concurrency=4"]
        command += ["--price_output=2", f"--out={tmp_path / 'five'}"]
        assert main.main([*command, "--format=json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    tasks = {each["task"] for each in summary["results"]}
    assert {"needle", "cold_x1", "warm_x4", "while_reading", "cost_needle"} <= tasks
    assert {"chain_20", "single", "refuse", "access_with_key", "tenants_apart"} <= tasks
    results = {(each["task"], each["length"]): each for each in summary["results"]}
    assert results["needle", 2500]["n"] == five.SAMPLES["needle"]
    assert results["cost_needle", 1500]["cost"]["attempts_per_task"] == 3
    assert results["cost_needle", 1500]["cost"]["cost_per_task"] is None
    assert results["refuse", 0]["mean"] == 1.0 and results["chain_3", 0]["mean"] == 0.0
    assert results["chain_3", 0]["pass_k"]["3"]["n"] == five.SAMPLES["tools"]
    assert "mean" not in results["tenants_apart", 0]
    assert summary["notes"] == []
    page = (tmp_path / "five" / "report.html").read_text()
    for said in ("Long context:", "Tool calls:", "Cost:", "Latency:", "Data controls:"):
        assert said in page
    records = read_records(tmp_path / "five")
    assert len({(r["task"], r["length"], r["sample"]) for r in records}) == len(records)
