"""metrics.jsonl, curves and the table of a sweep."""

import json

import pytest

from v4jax.cli.main import main
from v4jax.train import curves, metrics, sweep


def line(step, loss=1.0):
    return {
        "step": step, "loss": loss, "tokens_per_second": 10.0, "grad_norm": 0.5,
        "learning_rate": 0.1, "seconds": 6.0,
    }  # fmt: skip


def test_lines_after_the_step_that_a_run_goes_on_from_are_dropped(tmp_path):
    log = metrics.Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(line(step))
    log.close()
    with (tmp_path / metrics.FILE).open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    assert [found["step"] for found in metrics.read(tmp_path)] == [1, 2, 3]
    log = metrics.Metrics(tmp_path, 2)
    log.write(line(3))
    log.close()
    lines = [json.loads(text) for text in (tmp_path / metrics.FILE).read_text().splitlines()]
    assert lines == [line(1), line(2), line(3)]


def write_run(folder, losses):
    folder.mkdir()
    log = metrics.Metrics(folder, 0)
    for step, loss in enumerate(losses, 1):
        log.write(line(step, loss))
    log.close()
    return str(folder)


def test_a_batch_without_targets_has_no_loss_to_draw_or_average(tmp_path):
    lines = [line(1, 2.0), line(2, None), line(3, None)]
    assert curves.summary(lines)["step"] == 3 and "loss" not in curves.summary(lines[1:])
    curves.draw({"a": [lines]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_summary_is_of_targets_and_of_all_steps():
    """Losses weigh as many targets as they are of; a line stands for steps that are not logged."""
    lines = [line(10 * i, 9.0) for i in range(1, 19)]
    lines += [line(190, 1.0) | {"targets": 30.0}, line(200, 2.0) | {"targets": 10.0}]
    for each in lines:
        each["seconds"] = 6.0
    found = curves.summary(lines)
    assert found["loss"] == pytest.approx(1.25) and found["minutes"] == pytest.approx(20)


def test_plot_draws_runs(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / name, [3.0, 2.0, 1.5]) for name in ("a", "b")]
    out = tmp_path / "curves.png"
    assert main(["v4jax", "plot", *runs, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "2 runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["plot"], "DIR... is missing"),
        (["plot", "nowhere"], "--out is missing"),
        (["plot", "nowhere", "--out=x.png"], "nowhere: holds no metrics.jsonl"),
        (["sweep", "nowhere"], "nowhere: has no sweep.py"),
        (["train"], "--config is missing"),
        (["train", "--config=nothing.py"], "--workdir is missing"),
        (["train", "--config=nothing.py", "--workdir=x"], "there is no such file"),
        (["train", "--config.seed"], "--config.seed has no value"),
    ],
)
def test_mistakes_on_the_command_line(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["v4jax", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_sweeps_table(tmp_path):
    runs = {"a": [[3.0, 1.0], [3.0, 3.0]], "b": [[2.0, 2.0]]}
    results = {
        name: [
            curves.summary(metrics.read(tmp_path / f"{name}{i}"))
            for i, losses in enumerate(seeds)
            if write_run(tmp_path / f"{name}{i}", losses)
        ]
        for name, seeds in runs.items()
    }
    table = sweep._table(results).splitlines()
    assert table[2].startswith("| a | 2 ± 1.4 | - |") and table[3].startswith("| b | 2 | - |")


def test_a_sweep_compares_runs_of_the_same_seed():
    held_out = {"a": [1.0, 3.0, 5.0], "b": [1.5, 3.7, 5.3], "c": [2.0]}
    results = {name: [{"held_out": value} for value in values] for name, values in held_out.items()}
    last = [line.split(" | ")[-1].strip(" |") for line in sweep._table(results).splitlines()]
    # Differences 0.5, 0.7 and 0.3: mean 0.5, deviation 0.2, standard error 0.2 / sqrt(3).
    assert last[0] == "held_out less a's" and last[3:] == ["+0.500 ± 0.12", "+1.000"]
