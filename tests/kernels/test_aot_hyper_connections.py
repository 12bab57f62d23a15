"""mHC at the released models' sizes, compiled for chips that are not there."""

import jax
import jax.numpy as jnp
import pytest

from tests.kernels import aot
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
by_name = pytest.mark.parametrize("case", cases.REAL, ids=lambda case: case.name)


# Every chip, operation and case; beside the first chip only Flash's `post_pre` in the quick suite.
ON_CHIPS = [
    pytest.param(
        chip,
        op,
        case,
        marks=() if quick else pytest.mark.slow,
        id=f"{chip}-{op}-{case.name}",
    )
    for chip in aot.TPU_CHIPS
    for op in OPS
    for case in cases.REAL
    for quick in [chip == aot.TPU_CHIPS[0] or (op, case) == ("post_pre", cases.FLASH)]
]


@aot.needs_libtpu
@pytest.mark.parametrize(("chip", "op", "case"), ON_CHIPS)
def test_tpu(chip, op, case):
    """Nobody asked for a kernel by name: the platform chose it, one forward and one backward."""
    f = both(case, op, jnp.bfloat16)
    compiled = aot.compile_tpu(chip, f, *specs(case, op, jnp.bfloat16))
    assert kernels(compiled, TPU) == 2


@aot.needs_libtpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", cases.DECODE, ids=lambda case: case.name)
def test_tpu_decode(case, op):
    f = forward(case, op, jnp.bfloat16)
    compiled = aot.compile_tpu("v5p", f, *specs(case, op, jnp.bfloat16))
    assert kernels(compiled, TPU) == 1


@aot.needs_libtpu
@pytest.mark.parametrize(
    "case, op, dtype",
    [(cases.WIDE, "pre", "bfloat16"), (cases.FLASH, "post_pre", "float32")],
    ids=["eight_streams", "float32"],
)
def test_tpu_other_shapes(case, op, dtype):
    f = both(case, op, jnp.dtype(dtype))
    assert kernels(aot.compile_tpu("v5p", f, *specs(case, op, jnp.dtype(dtype))), TPU) == 2


@aot.needs_cuda
@pytest.mark.parametrize("op", OPS)
@by_name
def test_h100(case, op):
    """Forward: logits, small numbers, collapse. Backward the same again, and one for `post`."""
    compiled = aot.compile_h100(both(case, op, jnp.bfloat16), *specs(case, op, jnp.bfloat16))
    assert kernels(compiled, GPU) == {"pre": 6, "post": 2, "post_pre": 7}[op]


@aot.needs_cuda
@pytest.mark.parametrize("op", OPS)
def test_h100_decode(op):
    case = cases.DECODE[0]
    compiled = aot.compile_h100(forward(case, op, jnp.bfloat16), *specs(case, op, jnp.bfloat16))
    assert kernels(compiled, GPU) == {"pre": 3, "post": 1, "post_pre": 3}[op]


@aot.needs_cuda
@pytest.mark.parametrize(
    "case, dtype",
    [(cases.WIDE, "bfloat16"), (cases.FLASH, "float32")],
    ids=["eight_streams", "float32"],
)
def test_h100_other_shapes(case, dtype):
    f = both(case, "post_pre", jnp.dtype(dtype))
    # Eight streams are recombined first and multiplied in a kernel of their own.
    wanted = 8 if case is cases.WIDE else 7
    compiled = aot.compile_h100(f, *specs(case, "post_pre", jnp.dtype(dtype)))
    assert kernels(compiled, GPU) == wanted
