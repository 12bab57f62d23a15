"""How a test's programs are compiled where conftest.py's flags will not do, and which were."""

import contextlib
from collections.abc import Iterator

import jax

# As they run elsewhere: programs that LLVM leaves unoptimised, as conftest.py has them, round more
# often; sums of this size are then off by up to 3e-5 themselves.
OPTIMIZED = {"xla_backend_optimization_level": 3}


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the programs that XLA compiles while its body runs."""
    names = []

    def listener(event, duration, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
