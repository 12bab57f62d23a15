"""Which implementation of an operation runs: by platform, or the one asked for by name.

Pallas kernels are compiled on their own platform and, asked for by name, interpreted elsewhere.
"""

import functools
from collections.abc import Callable

import jax

from v4jax.ops import varying

PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}


def run(op: str, implementation: str | None, functions: dict[str, Callable], refuse, *args):
    """`functions[implementation](*args)`, or for None the best one that can take the arguments.

    Args:
      op: the operation's name, for errors.
      implementation: a key of `functions`, or None: the platform's Pallas kernel where there is
        one that can take the arguments, else "xla". The choice is made when the program is lowered,
        so ahead-of-time compilation gets its own platform's kernel.
      functions: by name. Pallas functions take `args` and `interpret=`.
      refuse: (name, *args) -> why that Pallas implementation cannot take the arguments, or None.
      args: pytrees of arrays.

    Raises:
      NotImplementedError: there is no such implementation, or it cannot take the arguments (it is
        never replaced by another), or a second derivative is asked for.
    """
    if implementation != "reference":
        _refuse_second(op, args)
    args = varying.alike(*args)
    functions = {name: _in_32_bits(function) for name, function in functions.items()}
    if implementation is not None:
        return _named(op, implementation, functions, refuse, *args)
    kernels = {
        PLATFORMS[name]: functools.partial(function, interpret=False)
        for name, function in functions.items()
        if name in PLATFORMS and (_refuse_checked() or refuse(name, *args)) is None
    }
    if not kernels:
        return functions["xla"](*args)
    return jax.lax.platform_dependent(*args, default=functions["xla"], **kernels)


def _named(op, implementation, functions, refuse, *args):
    if implementation not in functions:
        raise NotImplementedError(
            f"{op} has no implementation {implementation!r}; expected one of {sorted(functions)}"
        )
    function = functions[implementation]
    if implementation not in PLATFORMS:
        return function(*args)
    reason = _refuse_checked() or refuse(implementation, *args)
    if reason is not None:
        raise NotImplementedError(f"{op}, implementation {implementation!r}: {reason}")
    compiled = {PLATFORMS[implementation]: functools.partial(function, interpret=False)}
    interpreted = functools.partial(function, interpret=True)
    return jax.lax.platform_dependent(*args, default=interpreted, **compiled)


def _refuse_second(op, args):
    """Refuses a derivative of a kernel: it has a gradient, and that has none.

    A gradient written by hand gets plain values, so a tracer of derivatives means a second one, or
    a derivative through the gradient.
    """
    # By name: these classes have no public one.
    names = {type(x).__name__ for x in jax.tree.leaves(args)}
    if names & {"JVPTracer", "LinearizeTracer"}:
        raise NotImplementedError(
            f"{op} has a gradient and no other derivative; for jax.jvp, jax.linearize and second "
            "derivatives build the model with kernels='reference'"
        )


def _refuse_checked():
    """Pallas kernels do not say over which mesh axes their results vary."""
    if varying.checked():
        return (
            "it stands in a jax.shard_map that checks how values vary over mesh axes; pass "
            "check_vma=False to shard_map"
        )
    return None


def _in_32_bits(function):
    """The function traced without 64-bit types, whatever `JAX_ENABLE_X64` says.

    Pallas' own loop counters and grid indices become int64 under it, which no kernel's arithmetic
    and no accelerator takes. Nothing that comes in or goes out is wider than 32 bits.
    """

    @functools.wraps(function)
    def traced(*args, **options):
        with jax.enable_x64(False):
            return function(*args, **options)

    return traced
