"""mHC at the released models' sizes, compiled for chips that are not there."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from tests.support import aot
from tests.support.selection import first
from v4jax.kernels.hyper_connections import api, cases

OPS = ("pre", "post", "post_pre")


def specs(case, op, dtype):
    (b, t, m, d), x = case.shape, case.rows
    y, h = ((b, t, d), dtype), ((b, t, m, d), dtype)
    mixing = ((b, t, m), jnp.float32), ((b, t, m, m), jnp.float32)
    weights = ((x, m * d), jnp.float32), ((x,), jnp.float32), ((3,), jnp.float32)
    if op == "pre":
        return h, *weights
    return (y, h, *mixing) if op == "post" else (y, h, *mixing, *weights)


def forward(case, op, dtype, implementation=None):
    options = {"dtype": dtype, "implementation": implementation}
    options |= {} if op == "post" else case.options
    return lambda *arrays: getattr(api, op)(*arrays, **options)


def both(case, op, dtype, implementation=None):
    """The results and the gradients."""
    f = forward(case, op, dtype, implementation)

    def run(*arrays):
        out, vjp = jax.vjp(f, *arrays)
        return out, vjp(jax.tree.map(jnp.ones_like, out))

    return run


def kernels(compiled, target):
    return sum(f'custom_call_target="{target}"' in line for line in compiled.as_text().splitlines())


TPU, GPU = "tpu_custom_call", "__gpu$xla.gpu.triton"
# What the quick suite compiles: `post_pre` is the seam's code and both its halves'.
ON_CHIPS = first(
    [("v5p", "post_pre", cases.FLASH)], itertools.product(aot.TPU_CHIPS, OPS, cases.REAL)
)
ON_H100 = first([(cases.FLASH, "post_pre")], itertools.product(cases.REAL, OPS))
# What it lowers: the halves, and the seam on the other TPUs.
LOWERED = aot.rows(
    *itertools.product(("v5p", "h100"), ["pre", "post"]),
    *itertools.product(aot.TPU_CHIPS[1:], ["post_pre"]),
)
OTHERS = {"eight_streams": (cases.WIDE, "bfloat16"), "float32": (cases.FLASH, "float32")}


def label(x):
    return x.name if isinstance(x, cases.Case) else x


@pytest.mark.parametrize(("chip", "op"), LOWERED)
def test_lowers(chip, op):
    f = both(cases.FLASH, op, jnp.bfloat16)
    assert aot.lowers_to_kernels(chip, f, *specs(cases.FLASH, op, jnp.bfloat16))


@pytest.mark.parametrize(("chip", "op"), aot.rows(*itertools.product(("v5p", "h100"), OPS)))
def test_decode_lowers(chip, op):
    case = cases.DECODE[0]
    f = forward(case, op, jnp.bfloat16)
    assert aot.lowers_to_kernels(chip, f, *specs(case, op, jnp.bfloat16))


@pytest.mark.parametrize(("chip",), aot.rows(("v5p",), ("h100",)))
def test_eight_streams_lower(chip):
    f = both(cases.WIDE, "post_pre", jnp.bfloat16)
    assert aot.lowers_to_kernels(chip, f, *specs(cases.WIDE, "post_pre", jnp.bfloat16))


@aot.needs_libtpu
@pytest.mark.parametrize(("chip", "op", "case"), ON_CHIPS, ids=label)
def test_tpu(chip, op, case):
    """Nobody asked for a kernel by name: the platform chose it, one forward and one backward."""
    f = both(case, op, jnp.bfloat16)
    compiled = aot.compile_tpu(chip, f, *specs(case, op, jnp.bfloat16))
    assert kernels(compiled, TPU) == 2


@aot.needs_libtpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", first([], cases.DECODE), ids=label)
def test_tpu_decode(case, op):
    f = forward(case, op, jnp.bfloat16)
    compiled = aot.compile_tpu("v5p", f, *specs(case, op, jnp.bfloat16))
    assert kernels(compiled, TPU) == 1


@aot.needs_libtpu
@pytest.mark.parametrize("name", first([], OTHERS))
def test_tpu_other_shapes(name):
    case, dtype = OTHERS[name]
    op = "pre" if case is cases.WIDE else "post_pre"
    f = both(case, op, jnp.dtype(dtype))
    assert kernels(aot.compile_tpu("v5p", f, *specs(case, op, jnp.dtype(dtype))), TPU) == 2


@aot.needs_cuda
@pytest.mark.parametrize(("case", "op"), ON_H100, ids=label)
def test_h100(case, op):
    """Forward: logits, small numbers, collapse. Backward the same again, and one for `post`."""
    compiled = aot.compile_h100(both(case, op, jnp.bfloat16), *specs(case, op, jnp.bfloat16))
    assert kernels(compiled, GPU) == {"pre": 6, "post": 2, "post_pre": 7}[op]


@aot.needs_cuda
@pytest.mark.parametrize("op", first([], OPS))
def test_h100_decode(op):
    case = cases.DECODE[0]
    compiled = aot.compile_h100(forward(case, op, jnp.bfloat16), *specs(case, op, jnp.bfloat16))
    assert kernels(compiled, GPU) == {"pre": 3, "post": 1, "post_pre": 3}[op]


@aot.needs_cuda
@pytest.mark.parametrize("name", first([], OTHERS))
def test_h100_other_shapes(name):
    case, dtype = OTHERS[name]
    f = both(case, "post_pre", jnp.dtype(dtype))
    # Eight streams are recombined first and multiplied in a kernel of their own.
    wanted = 8 if case is cases.WIDE else 7
    compiled = aot.compile_h100(f, *specs(case, "post_pre", jnp.dtype(dtype)))
    assert kernels(compiled, GPU) == wanted
