"""Programs made ready ahead of their first call, so that no answer waits for a compiler."""

import concurrent.futures
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from v4jax.infer.executables import Executables, Program, asking_the_compiler
from v4jax.sharding import processes

OnCompile = Callable[[str, float | None], None]


class CompiledPrograms:
    """Programs by name: each is found among those that were kept on disk, or compiled.

    Args:
      executables: where compiled programs are kept for other processes, if anywhere.
      on_compile: called with the names of the programs that are about to be compiled and None, and
        again with the seconds that it took.

    Attributes:
      compiled: how many programs were compiled here so far. seconds: how long making programs
        ready has taken.
    """

    def __init__(self, executables: Executables | None = None, on_compile: OnCompile | None = None):
        self._executables, self._on_compile = executables, on_compile
        self._ready: dict[str, Any] = {}
        self.compiled, self.seconds = 0, 0.0

    def prepare(self, programs: Sequence[Program]) -> float:
        """Makes all of them ready; the seconds that it took."""
        started = time.perf_counter()
        missing = self._missing([each for each in programs if each.name not in self._ready])
        if missing:
            names = ", ".join(program.name for program in missing)
            tell = self._on_compile or (lambda names, seconds: None)
            tell(names, None)
            self._compile_all(missing)
            tell(names, time.perf_counter() - started)
        processes.compiled()
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

    def _compile_all(self, programs):
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
                lowered = each.function.lower(each.model, *each.arguments)
                if keeps:
                    compiling.append(pool.submit(self._executables.compile, each, lowered))
                else:
                    compiling.append(pool.submit(lowered.compile))
            done = [future.result() for future in compiling]
        self.compiled += len(programs)
        names = [program.name for program in programs]
        self._ready |= dict(zip(names, done, strict=True))
