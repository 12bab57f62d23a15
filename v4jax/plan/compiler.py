"""Compiling a job for devices that are not there: the program's buffers and its collectives.

Nine tenths of libtpu's time, and most of its memory, go into machine code: it writes that once the
program is optimised and scheduled and every buffer has its place, which is all that a plan reads.
No option stops it there. So a process of its own compiles for a TPU and leaves behind what it has
settled (`xla_dump_to`), and is ended as soon as that is complete.
"""

import dataclasses
import os
import pathlib
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping

import jax

from v4jax.plan import hlo, steps
from v4jax.plan.hlo import Collective
from v4jax.plan.job import Job, layout_of
from v4jax.plan.topology import Topology

ROOM = "RESOURCE_EXHAUSTED"  # how XLA says that a program does not fit
BUFFERS = "*.after_optimizations-buffer-assignment.txt"  # of what `xla_dump_to` leaves behind
_POLL = 0.2  # seconds
_PROGRAM = "*.after_optimizations_after_buffer_assignment.txt"
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says, bytes of one device.

    Attributes:
      arguments: by kind, as the program's shardings divide them.
      argument: all of them, by the compiler. peak: what its buffers take, arguments included; None
        where the program does not fit. failure: the compiler's words then.
      collectives, unknown_loops: see `hlo.collectives`.
      seconds: to trace, lower and compile; processor: seconds of processors, which a busy machine
        stretches over more time. host: peak memory of the process that compiled.
    """

    arguments: dict[str, int]
    argument: int | None
    peak: int | None
    failure: str | None
    collectives: list[Collective]
    unknown_loops: int
    seconds: float
    processor: float
    host: int


@dataclasses.dataclass(frozen=True)
class _Settled:
    """A compiler's result, whichever it is. text: the optimised program."""

    argument: int | None
    peak: int | None
    failure: str | None
    text: str
    processor: float
    host: int


def compile_job(job: Job, topology: Topology, sizes: Mapping[str, int]) -> Compiled:
    """Compiles; a program that does not fit is a result, not an error.

    Raises:
      InputError: sizes that are not the devices', or that do not divide the model or the job.
    """
    started = time.perf_counter()
    layout = layout_of(job, sizes, topology.devices)
    planned = steps.build(job, layout)
    tpu = topology.chip.platform == "tpu"
    settled = _until_placed(job, topology, sizes) if tpu else _whole(planned)
    seconds = time.perf_counter() - started
    found, unknown = [], 0
    if settled.failure is None:
        found, unknown = hlo.collectives(settled.text, dict(layout.mesh.shape))
    return Compiled(
        arguments={kind: planned.bytes(kind) for kind in planned.arguments},
        argument=settled.argument,
        peak=settled.peak,
        failure=settled.failure,
        collectives=found,
        unknown_loops=unknown,
        seconds=seconds,
        processor=settled.processor,
        host=settled.host,
    )


def _whole(planned):
    """XLA:GPU, to the end and in this process."""
    worked, analysis, text, failure = time.process_time(), None, "", None
    try:
        compiled = planned.lower().compile()
        analysis, text = compiled.memory_analysis(), compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        failure = _no_room(str(error))
    return _Settled(
        argument=analysis and analysis.argument_size_in_bytes,
        peak=analysis and _peak(analysis),
        failure=failure,
        text=text,
        processor=time.process_time() - worked,
        host=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


def _peak(analysis):
    """Bytes at the worst moment. XLA:GPU leaves its own figure out of ahead-of-time results."""
    found = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    found += analysis.temp_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.peak_memory_in_bytes or found


def _until_placed(job, topology, sizes):
    """libtpu, in another process and until every buffer has its place."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        usage, host, error = _compile_apart(job, topology, sizes, path)
        argument = peak = failure = None
        text = ""
        if error is None:
            argument, peak = placed(next(path.glob(BUFFERS)).read_text("utf-8", "replace"))
            text = next(path.glob(_PROGRAM)).read_text("utf-8", "replace")
        else:
            failure = _no_room(error)
    processor = usage.ru_utime + usage.ru_stime
    return _Settled(argument, peak, failure, text, processor, host)


def _compile_apart(job, topology, sizes, folder):
    """What the process used, its peak memory, and its error unless it got as far as it should."""
    # A topology that has been used holds devices, which only their process knows.
    work = pickle.dumps((job, dataclasses.replace(topology), dict(sizes), str(folder)))
    (folder / "work").write_bytes(work)
    command = [sys.executable, "-m", "v4jax.plan.compiler", str(folder / "work")]
    # A program read from JAX's cache would leave nothing behind.
    uncached = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    with (folder / "errors").open("wb") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors, env=uncached)
    ended, host = _wait(process, folder)
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    if _complete(folder):
        return ended[2], host, None
    return ended[2], host, (folder / "errors").read_text(errors="replace")


def _wait(process, folder):
    """Ends the process once the program's buffers are written down, or lets it end by itself.

    Returns:
      What `os.wait4` says, and the process's peak memory as of the last look at it: `ru_maxrss`
      begins at that of whoever started it.
    """
    size, host = None, 0
    try:
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            host = _peak_of(process.pid) or host
            before, size = size, _complete(folder)
            if size and size == before:
                break
            time.sleep(_POLL)
    finally:
        if not ended[0]:
            process.kill()
            ended = os.wait4(process.pid, 0)
    return ended, host or 1024 * ended[2].ru_maxrss


def _peak_of(pid):
    """Bytes that a running process has had in memory at most; None where that is not to be had."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def _complete(folder):
    """Size of the program's text, once it has been written to its end."""
    for path in folder.glob(_PROGRAM):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 8))
            if file.read().rstrip().endswith(b"}"):
                return size
    return None


def placed(text: str) -> tuple[int, int]:
    """Bytes of the arguments and of all buffers, by libtpu's list of allocations.

    A heap's size counts, not what lives in it at the worst moment: the gaps are lost.
    """
    found = [(int(size), words) for size, words in _ALLOCATION.findall(text)]
    here = [(size, words) for size, words in found if "color" not in words]  # not VMEM, not SMEM
    argument = sum(size for size, words in here if ", parameter" in words)
    return argument, sum(size for size, _ in here)


def _no_room(message):
    """What the compiler says before it lists its buffers.

    Raises:
      RuntimeError: it failed for another reason.
    """
    if ROOM not in message:
        raise RuntimeError(f"the compiler failed: {message[-2000:] or 'it was killed'}")
    text = message[message.index(ROOM) :].partition("\n\n")[0].replace("\n", " ")
    return " ".join(text.removeprefix(f"{ROOM}: ").split())[:400]


def _compile(path):
    """The other process; prints why it stopped, if it gets so far."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    job, topology, sizes, folder = pickle.loads(pathlib.Path(path).read_bytes())
    lowered = steps.build(job, layout_of(job, sizes, topology.devices)).lower()
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
        lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        print(error)


def _end_with(parent):
    """Ends this process once its parent has, however that ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    _compile(sys.argv[1])
