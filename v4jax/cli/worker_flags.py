"""Where a command's work is done: in this process, in others, or on a Ray cluster."""

from absl import flags

from v4jax.errors import InputError
from v4jax.workers.crew import Crew
from v4jax.workers.pool import Make

FLAGS = flags.FLAGS
LOCAL, PROCESSES, RAY = EXECUTORS = ("local", "processes", "ray")


def define_flags(local: str):
    """Declares the flags; `local` says what the command does without workers."""
    flags.DEFINE_enum(
        "executor",
        LOCAL,
        EXECUTORS,
        f"local: {local}; processes: --workers of this machine; ray: --workers of a Ray cluster",
    )
    flags.DEFINE_integer(
        "workers", None, "Workers of --executor processes or ray (default: 2)", lower_bound=1
    )
    flags.DEFINE_string(
        "worker_resources",
        None,
        "What each worker of a Ray cluster gets, as CPU=4,GPU=1 (default: CPU=1)",
    )


def check() -> None:
    """Raises `InputError` for flags that do not go together."""
    if FLAGS.executor == LOCAL and FLAGS.workers is not None:
        raise InputError(
            f"--workers is {FLAGS.workers}, and --executor local has none; expected --executor "
            "processes or ray with it"
        )
    if FLAGS.executor != RAY and FLAGS.worker_resources is not None:
        raise InputError("--worker_resources is given without --executor ray, which alone uses it")
    _resources()


def crew(make: Make, many: int, tell) -> Crew | None:
    """The workers that the flags ask for, with so many tasks at a time each; None for local."""
    check()
    count = FLAGS.workers or 2
    if FLAGS.executor == PROCESSES:
        from v4jax.workers.processes import ProcessPool

        return Crew(ProcessPool(make, count, many), tell)
    if FLAGS.executor == RAY:
        from v4jax.workers.ray_pool import RayPool

        return Crew(RayPool(make, count, many, _resources()), tell)
    return None


def _resources() -> dict[str, float] | None:
    if FLAGS.worker_resources is None:
        return None
    found = {}
    for part in FLAGS.worker_resources.split(","):
        name, _, amount = part.strip().partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            found[name] = -1.0
        if not name or not 0 < found[name] < 1e9:
            raise InputError(
                f"--worker_resources has {part[:100]!r}; expected names and amounts above 0, such "
                "as CPU=4,GPU=1"
            )
    return found
