"""Programs made ready ahead: how far that is."""

import jax
import jax.numpy as jnp

from v4jax.infer.compiled import CompiledPrograms, Progress
from v4jax.infer.executables import Program


def test_progress_is_told_while_programs_compile():
    """The second program is traced when the first one is there already, or is being compiled."""
    programs, seen = CompiledPrograms(), []

    def function(model, x):
        seen.append(str(programs.progress))
        return x + model

    jitted = jax.jit(function, static_argnums=0)
    names = ["prefill of 8 tokens", "first token"]
    made = [Program(n, jitted, i, (jnp.zeros(i + 1),), None) for i, n in enumerate(names)]
    assert programs.progress is None
    programs.prepare(made)
    assert programs.progress is None and programs.compiled == 2
    assert seen[0] == "0 of 2 programs compiled in 0 s: prefill of 8 tokens"
    assert " of 2 programs compiled in " in seen[1]
    assert programs.run(made[1]).tolist() == [1.0, 1.0] and len(seen) == 2


def test_what_is_left_goes_by_what_was_done(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress = Progress(4)
    progress.trace("a")
    assert progress.seconds_left is None and str(progress).endswith("0 s: a")

    def compiled():
        now[0] += 10
        return "program"

    assert progress.compile("a", compiled) == "program"
    now[0] += 6
    progress.trace("b")
    assert str(progress) == "1 of 4 programs compiled in 16 s, about 24 s left: b"
    now[0] += 100
    assert progress.seconds_left == 0
    for name in "bcd":
        progress.compile(name, compiled)
    assert str(progress) == "4 programs compiled in 146 s, other processes are not"


def test_what_is_compiled_is_named_before_what_is_traced():
    progress = Progress(3)
    progress.trace("c")
    told = progress.compile("a", lambda: progress.compile("b", lambda: str(progress)))
    assert told.endswith(": a, b")
