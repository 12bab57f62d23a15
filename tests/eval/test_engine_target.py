"""nano in this process: asked as it was trained, prefixes counted, memory that runs out."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from v4jax.cli import main
from v4jax.engine.constraint import Grammar
from v4jax.errors import InputError
from v4jax.eval import engine_target
from v4jax.eval.engine_target import EngineTarget
from v4jax.eval.records import read_records
from v4jax.eval.sample import asked


@pytest.mark.slow  # compiles nano, a minute and a half of one core
def test_nano_finds_needles_and_reads_shared_prefixes_once(tmp_path, capsys):
    out = tmp_path / "run"
    command = ["v4jax", "eval", "needle", "--lengths=640", "--samples=4", f"--out={out}"]
    assert main.main([*command, "--format=json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["mean"] == 1.0 and result["n"] == 4
    records = read_records(out)
    assert [each["depth"] for each in records] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    cached = [each["cached_tokens"] for each in records]
    # What lies before a needle was read with the one before it, in whole pages of 128.
    assert cached[0] == 0 and cached == sorted(cached) and cached[-1] >= 384
    assert (out / "report.html").exists() and (out / "summary.json").exists()


class _Stream(list):
    def __init__(self, error):
        super().__init__()
        self._error = error

    def result(self):
        return SimpleNamespace(error=self._error)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("the engine stopped: XlaRuntimeError: RESOURCE_EXHAUSTED: ...", "no memory was left"),
        (MemoryError(), "no memory was left"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "no memory was left"),
        ("logits are not finite", "the engine failed .logits are not finite"),
    ],
)
def test_memory_that_runs_out_is_one_sentence(error, sentence, monkeypatch):
    target = EngineTarget("nano", 256)

    def submit(request):
        if isinstance(error, Exception):
            raise error
        return _Stream(error)

    monkeypatch.setattr(EngineTarget, "engine", SimpleNamespace(submit=submit))
    with pytest.raises(InputError, match=f"{sentence}.*records are kept"):
        target.ask(asked("def f("), 4)


def test_lengths_beyond_the_models_are_refused_unless_asked_for():
    with pytest.raises(InputError, match="reads at most 4096: give shorter --lengths"):
        EngineTarget("nano", 5000)
    assert EngineTarget("nano", 5000, max_positions=8192).max_length == 8192


def test_a_schema_is_a_grammar_where_there_is_one(monkeypatch):
    pytest.importorskip("llguidance")
    seen = []

    def submit(request):
        seen.append(request.constraint)
        return _Stream("no model here")

    monkeypatch.setattr(EngineTarget, "engine", SimpleNamespace(submit=submit))
    target, schema = EngineTarget("nano", 256), {"type": "object"}
    for prompt in (asked("x"), dataclasses.replace(asked("x"), schema=schema)):
        with pytest.raises(InputError, match="no model here"):
            target.ask(prompt, 4)
    assert seen == [None, Grammar("json_schema", schema)]
    monkeypatch.setattr(engine_target.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="no model here"):
        target.ask(prompt, 4)
    assert seen[-1] is None  # without the extra it is asked for in words alone
