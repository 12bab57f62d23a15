"""Many processes as one program: joining, speaking with one voice, agreeing, stopping together.

JAX's own runtime (`jax.distributed`) does the work. TPU pods, SLURM steps and Open MPI are found by
themselves; elsewhere three flags say where the others are.
"""

import contextlib
import glob
import itertools
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from v4jax.errors import InputError

WAIT_SECONDS = 120  # for all processes to come
HEARTBEAT_SECONDS = 30  # a process that was silent for so long is dead
COMPILE_SECONDS = 3600  # by which one process may be faster in compiling than another
BAD_INPUT, DIED = 2, 1

_meetings = itertools.count()  # a barrier's name may be used once; all processes count alike


class Disagreement(InputError):
    """Input on which processes differ: all of them find it, and the first one says so."""


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    wait: int | None = None,
    heartbeat: int | None = None,
) -> Iterator[None]:
    """Runs its body in this process as one of many; alone where there are no others.

    Only process 0 writes to stdout and stderr, the others only when they fail. A process that fails
    says so and ends at once, without waiting for those that wait for it; they are stopped within
    `heartbeat` seconds, with a message.

    Args:
      coordinator, num_processes, process_id: all three, or none and JAX finds them (TPU pods,
        SLURM, Open MPI) or there is one process.
      wait: seconds until all must have come. heartbeat: see above.

    Raises:
      InputError: some of the three, or a coordinator that does not answer.
    """
    environment = _environment()
    if coordinator is None and num_processes is None and process_id is None and not environment:
        yield
        return
    _check(coordinator, num_processes, process_id, environment)
    if not _initialize(coordinator, num_processes, process_id, wait, heartbeat):
        yield
        return
    import jax

    try:
        with _one_voice():
            yield
        sys.stdout.flush()
        # Not left to the interpreter's end: whoever is slower still needs this process.
        jax.distributed.shutdown()
    except BaseException as error:
        _leave(error)


def index() -> int:
    """Which process this is; 0 where there is one."""
    import jax

    return jax.process_index() if jax.distributed.is_initialized() else 0


def count() -> int:
    """How many processes there are; one does not start its devices to know it."""
    import jax

    return jax.process_count() if jax.distributed.is_initialized() else 1


def agree(what: str, fields: Mapping[str, Any]) -> None:
    """Holds the fields (JSON values, nested ones too) of all processes against one another.

    Raises:
      Disagreement: in every process, naming the first field that differs and two values of it.
    """
    if count() == 1:
        return
    everyone = [dict(_flat("", each)) for each in _gathered(fields)]
    for name in sorted(set().union(*everyone)):
        values = [each.get(name) for each in everyone]
        other = next((i for i, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise Disagreement(
                f"the processes disagree on {what}: {name} is {values[0]!r} in process 0 and "
                f"{values[other]!r} in process {other}; start all of them with the same"
            )


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def compiled() -> None:
    """Waits until every process has compiled what all are about to run.

    Through the coordinator, not the devices: there Gloo gives up after 30 s on a process that has
    not begun to connect.
    """
    if count() > 1:
        from orbax.checkpoint.multihost import get_barrier_sync_fn

        name = f"v4jax_compiled_{next(_meetings)}"
        get_barrier_sync_fn()(key=name, timeout_ms=1000 * COMPILE_SECONDS)


def gathered(value: Any) -> list[Any]:
    """Every process's JSON value, in all of them."""
    return [value] if count() == 1 else _gathered(value)


def anywhere(flag: bool) -> bool:
    """Whether it is so in any process; all of them ask."""
    if count() == 1:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def run_outside(function: Callable[..., Any], *args: Any) -> Any:
    """Runs a module's function in a process of its own, on a CPU, that has not joined the others.

    For libraries that make a joined process wait for all. It ends with this one.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, fresh, _begin_outside, (os.getpid(),)) as pool:
        return pool.submit(function, *args).result()


def _begin_outside(parent):
    import time

    import jax

    jax.config.update("jax_platforms", "cpu")

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(DIED)

    threading.Thread(target=watch, daemon=True).start()


def _gathered(value):
    import numpy as np
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value, sort_keys=True).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(text.size))).reshape(-1)
    padded = np.pad(text, (0, int(lengths.max()) - text.size))
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def _flat(name, value):
    if not isinstance(value, dict):
        yield name, value
        return
    for key, child in value.items():
        yield from _flat(f"{name}.{key}" if name else key, child)


def _environment() -> str | None:
    """What has started several processes, if anything that JAX knows has."""
    if "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return "SLURM"
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return "TPU" if "tpu" in platforms and chips else None


def _check(coordinator, num_processes, process_id, environment):
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    absent = [name for name, value in given.items() if value is None]
    if absent and len(absent) < 3 and not environment:
        there = [name for name in given if name not in absent]
        raise InputError(
            f"{' and '.join(absent)} missing next to {' and '.join(there)}; expected "
            "all three, or none of them on a TPU pod, SLURM or Open MPI"
        )
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise InputError(f"--coordinator is {coordinator!r}; expected HOST:PORT of process 0")
    if num_processes is not None and process_id is not None and process_id >= num_processes:
        raise InputError(
            f"--process_id is {process_id} and --num_processes {num_processes}; expected one from "
            f"0 to {num_processes - 1}"
        )


def _initialize(coordinator, num_processes, process_id, wait, heartbeat) -> bool:
    """Joins the others; whether there are any."""
    import jax

    wait = WAIT_SECONDS if wait is None else wait
    if coordinator is not None and process_id:
        _await_coordinator(coordinator, wait)
    absent = (
        f"not all of the {num_processes or 'expected'} processes met at "
        f"{coordinator or 'the coordinator that JAX found'} within {wait} s; check the address and "
        "that all have started"
    )
    # JAX's client gives up with a dump of its own, so this comes first.
    giving_up = threading.Timer(wait, _give_up, (absent,))
    giving_up.daemon = True
    giving_up.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=wait + 10,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS if heartbeat is None else heartbeat,
            shutdown_timeout_seconds=WAIT_SECONDS,
        )
    except ValueError:
        if coordinator is None and process_id is None:
            return False  # a TPU that is on its own
        raise
    except RuntimeError as error:
        raise InputError(f"{absent} ({str(error).splitlines()[0][:120]})") from error
    finally:
        giving_up.cancel()
    return True


def _give_up(sentence):
    print(f"v4jax: {sentence}", file=sys.stderr, flush=True)
    os._exit(BAD_INPUT)


def _await_coordinator(address, wait):
    """Raises where nothing listens: JAX's client would end the process with a dump of its own."""
    import socket
    import time

    host, _, port = address.rpartition(":")
    end = time.monotonic() + wait
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise InputError(
                    f"the coordinator {address} did not answer within {wait} s ({error}); check "
                    "--coordinator, and that process 0 runs there and can be reached"
                ) from None
        time.sleep(0.2)


@contextlib.contextmanager
def _one_voice():
    """Only process 0 writes, and to stdout only what Python prints there.

    The connections' own library tells stdout about them; in process 0 that goes to stderr.
    """
    sys.stdout.flush()
    with contextlib.ExitStack() as stack:
        # As main() has made stdout: what its encoding lacks is escaped.
        form = {"encoding": getattr(sys.stdout, "encoding", None), "errors": "backslashreplace"}
        own = stack.enter_context(open(os.dup(1), "w", buffering=1, **form))
        nowhere = stack.enter_context(open(os.devnull, "w"))
        os.dup2(nowhere.fileno(), 1)
        stack.callback(lambda: os.dup2(own.fileno(), 1))
        process = index()  # here all connect
        if process == 0:
            os.dup2(2, 1)
            stack.enter_context(contextlib.redirect_stdout(own))
        else:
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def _leave(error) -> NoReturn:
    """Ends this process at once; JAX's own way out would wait for the others."""
    process = index()
    who = f"v4jax: process {process} of {count()}"
    status = error.code if isinstance(error, SystemExit) else None
    if isinstance(error, InputError):
        status = BAD_INPUT
        if process == 0 or not isinstance(error, Disagreement):
            print(f"{who}: {error}", file=sys.stderr)
    elif not isinstance(error, (SystemExit, KeyboardInterrupt)):
        if _is_lost(error):
            reason = " ".join(str(error).split())[:300]
            print(
                f"{who}: another process ended or cannot be reached, so this one stops; the first "
                f"to end says why ({reason})",
                file=sys.stderr,
            )
        else:
            traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else DIED)


def _is_lost(error):
    import jax

    signs = ("gloo", "connection", "heartbeat", "coordination", "peer", "unavailable", "socket")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(
        sign in str(error).lower() for sign in signs
    )
