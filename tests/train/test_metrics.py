"""metrics.jsonl, TensorBoard files read back by hand, curves and the table of a sweep."""

import functools
import json
import struct
import time

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.tiny import tiny_config
from v4jax import accounting
from v4jax.cli.main import main
from v4jax.model.transformer import Transformer
from v4jax.train import curves, events, metrics, sweep


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


def test_the_known_value_of_crc32c():
    assert events.crc32c(b"123456789") == 0xE3069283


def records(content):
    """The payloads of an event file, lengths and CRCs checked."""
    at = 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        head, data = content[at : at + 8], content[at + 12 : at + 12 + length]
        assert content[at + 8 : at + 12] == events._masked_crc(head)
        assert content[at + 12 + length : at + 16 + length] == events._masked_crc(data)
        yield data
        at += 16 + length


def test_event_file(tmp_path):
    file = events.EventFile(tmp_path / "events")
    file.write(300, {"loss": 0.25, "note": "no number"})
    file.close()
    version, event = records((tmp_path / "events").read_bytes())
    assert version.endswith(b"brain.Event:2")
    # wall time (field 1, double), step 300 (field 2, varint), summary (field 5): tag, simple value.
    value = b"\x0a\x04loss\x15" + struct.pack("<f", 0.25)
    summary = b"\x0a" + bytes([len(value)]) + value
    assert event[9:] == b"\x10\xac\x02\x2a" + bytes([len(summary)]) + summary


def write_run(folder, losses):
    folder.mkdir()
    log = metrics.Metrics(folder, 0)
    for step, loss in enumerate(losses, 1):
        log.write(line(step, loss))
    log.close()
    return str(folder)


def test_a_step_takes_from_the_end_of_the_one_before_to_its_own():
    """Whenever its figures are read: those of the first two in one moment, behind both."""
    clock = metrics.Clock(tokens=100, length=50, flops=1.0)

    def step():
        time.sleep(0.02)
        ended = clock.watch(jnp.zeros(()))
        ended.result()
        return ended

    ends = [step(), step()]
    seconds = [clock.tick(ended)["seconds"] for ended in ends]
    time.sleep(0.5)  # an evaluation, a checkpoint
    clock.start()
    seconds.append(clock.tick(step())["seconds"])
    clock.close()
    assert all(0.02 <= second < 0.4 for second in seconds)


@functools.cache
def shapes():
    return Transformer(tiny_config(), min_repeats=2).abstract_variables()["params"]


def trained_flops(trained, adapters=None):
    """Operations of a step of a token, by what is trained, and of the forward pass's parts."""
    config = tiny_config()
    shares = metrics.passes(shapes() | (adapters or {}), trained, config)
    parts = accounting.flops_per_token(config, 32, accounting.ONE_EACH)
    return metrics.step_flops(config, 1, 64, shares), parts, sum(parts.values())


ADAPTER = {"a": np.zeros((1, 4)), "b": np.zeros((2, 1))}
ADAPTERS = {"lora": {"layers_0": {"block_0": {"attn": {"wq_a": ADAPTER}}}}}


def test_operations_are_those_of_what_is_trained():
    found, parts, forward = trained_flops(None)
    assert found == pytest.approx(3 * forward)
    assert trained_flops("^nothing/")[0] == pytest.approx(forward)
    # The indexer learns from a loss of its own, through which nothing else does.
    assert trained_flops("/indexer/")[0] == pytest.approx(forward + 2 * parts["indexer"])
    assert trained_flops("^(?!.*/indexer/)")[0] == pytest.approx(found - 2 * parts["indexer"])
    # Nothing flows back behind the head, and an embedding is a lookup.
    # Norms and biases are leaves without a product: shares of weights are off by a hundredth.
    assert trained_flops("^head/")[0] == pytest.approx(forward + 2 * parts["head"], rel=0.02)
    rest = forward - parts["indexer"]
    assert trained_flops("^embed/")[0] == pytest.approx(forward + rest + parts["attention"])
    adapted = trained_flops("^lora/", ADAPTERS)[0]
    assert adapted == pytest.approx(forward + rest + parts["attention"])


def test_experts_cost_what_a_token_chooses_of_them():
    whole, _, _ = trained_flops(None)
    experts, parts, _ = trained_flops("/experts/")
    rest, _, _ = trained_flops("^(?!.*/experts/)")
    lookup, _, _ = trained_flops("^embed/")  # gradients of activations alone
    config = tiny_config()
    chosen = 2 * 3 * config.hidden_size * config.moe_intermediate_size * len(config.layers)
    chosen *= config.num_experts_per_tok
    assert experts - lookup == pytest.approx(chosen, rel=0.02)
    assert whole > rest > lookup


def test_dense_attention_is_counted_whole():
    config = tiny_config(index_topk=2)
    sparse, dense = (
        metrics.step_flops(config, 1, 512, metrics.Passes(), dense) for dense in (False, True)
    )
    assert sparse < dense


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
