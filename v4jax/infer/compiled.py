"""Programs made ready ahead of their first call, so that no answer waits for a compiler."""

import concurrent.futures
import contextlib
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from v4jax.infer.executables import Executables, Program, asking_the_compiler
from v4jax.sharding import processes

OnCompile = Callable[[str, float | None], None]


class Progress:
    """How far a number of programs has got; one thread makes it, any thread may read.

    Attributes:
      total: programs that are not ready at first. done: how many of them are compiled.
    """

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self._began, self._compiled_at = time.perf_counter(), 0.0
        self._tracing = ""
        self._compiling: list[str] = []

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._began

    @property
    def seconds_left(self) -> float | None:
        """By what the programs so far took on average; None before the first of them."""
        if not self.done:
            return None
        return max(0.0, self._compiled_at * self.total / self.done - self.seconds)

    def trace(self, name: str) -> None:
        """A program is traced from now on."""
        self._tracing = name

    def compile(self, name: str, function: Callable[[], Any]) -> Any:
        """What the function returns, which compiles a program."""
        self._compiling.append(name)
        found = function()
        self._compiling.remove(name)
        self.done, self._compiled_at = self.done + 1, self.seconds
        return found

    def __str__(self) -> str:
        """Such as "3 of 13 programs compiled in 41 s, about 140 s left: first token"."""
        if self.done == self.total:
            return (
                f"{self.total} programs compiled in {self.seconds:.0f} s, other processes are not"
            )
        left = self.seconds_left
        told = f"{self.done} of {self.total} programs compiled in {self.seconds:.0f} s"
        told += "" if left is None else f", about {left:.0f} s left"
        names = self._compiling.copy() or [self._tracing]
        return f"{told}: {', '.join(names)}"


class CompiledPrograms:
    """Programs by name: each is found among those that were kept on disk, or compiled.

    Args:
      executables: where compiled programs are kept for other processes, if anywhere.
      on_compile: called with the names of the programs that are about to be compiled and None, and
        again with the seconds that it took.

    Attributes:
      compiled: how many programs were compiled here so far. seconds: how long making programs
        ready has taken. progress: of what is being made ready now, or None.
    """

    def __init__(self, executables: Executables | None = None, on_compile: OnCompile | None = None):
        self._executables, self._on_compile = executables, on_compile
        self._ready: dict[str, Any] = {}
        self.compiled, self.seconds = 0, 0.0
        self.progress: Progress | None = None

    def prepare(self, programs: Sequence[Program]) -> float:
        """Makes all of them ready; the seconds that it took."""
        started = time.perf_counter()
        missing = self._missing([each for each in programs if each.name not in self._ready])
        if missing:
            names = ", ".join(program.name for program in missing)
            tell = self._on_compile or (lambda names, seconds: None)
            tell(names, None)
            self.progress = Progress(len(missing))
            self._compile_all(missing, self.progress)
            tell(names, time.perf_counter() - started)
        processes.compiled()
        self.progress = None
        took = time.perf_counter() - started
        self.seconds += took
        return took

    def run(self, program: Program) -> Any:
        """What the program returns; it is compiled first where it is not ready."""
        if program.name not in self._ready:
            self.prepare([program])
        return self._ready[program.name](*program.arguments)

    def _missing(self, programs):
        """Those that were not kept; the others are then ready."""
        if self._executables is None or not programs:
            return programs
        # A program of megabytes takes a second of one core to link.
        with concurrent.futures.ThreadPoolExecutor(len(programs)) as pool:
            found = list(pool.map(self._executables.find, programs))
        names = [program.name for program in programs]
        self._ready |= {name: each for name, each in zip(names, found, strict=True) if each}
        return [program for program in programs if program.name not in self._ready]

    def _compile_all(self, programs, progress):
        """Each is traced while those before it are compiled."""
        # An accelerator's compiler may time kernels on it, which wants no company.
        cores = min(len(programs), os.cpu_count() or 1)
        at_once = cores if jax.default_backend() == "cpu" else 1
        keeps = self._executables is not None and all(map(self._executables.keeps, programs))
        with (
            asking_the_compiler() if keeps else contextlib.nullcontext(),
            concurrent.futures.ThreadPoolExecutor(at_once) as pool,
        ):
            compiling = []
            for each in programs:
                progress.trace(each.name)
                lowered = each.function.lower(each.model, *each.arguments)
                how = lowered.compile
                if keeps:
                    how = functools.partial(self._executables.compile, each, lowered)
                compiling.append(pool.submit(progress.compile, each.name, how))
            done = [future.result() for future in compiling]
        self.compiled += len(programs)
        names = [program.name for program in programs]
        self._ready |= dict(zip(names, done, strict=True))
