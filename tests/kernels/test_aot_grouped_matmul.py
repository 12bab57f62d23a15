"""The experts' kernels compiled for chips that are not there, at the released models' shapes."""

import functools

import jax.numpy as jnp
import pytest

from tests.kernels import aot
from v4jax.kernels.grouped_matmul import pallas_gpu, pallas_tpu
from v4jax.kernels.grouped_matmul.api import Rounding
from v4jax.kernels.grouped_matmul.cases import REAL, Case, specs

FORMATS = ("bfloat16", "fp8", "fp4")
ALL = (*FORMATS, "float32")
# A training step's experts on one of 32 chips: weights, gradients and all fit the smallest.
SHARDED = {
    "flash": Case(rows=4096 * 6, experts=8, d=4096, f=2048),
    "pro": Case(rows=4096 * 6, experts=12, d=7168, f=3072),
}
# Every pair of a case and a form compiles; these go first, the others run with the slow tests.
QUICK = {
    ("flash", "bfloat16"),
    ("flash", "fp8"),
    ("flash_decode", "fp4"),
    ("pro", "fp4"),
    ("pro_decode", "fp8"),
}
QUICK_BACKWARD = {("flash", "bfloat16"), ("pro", "fp4"), ("pro", "float32")}


def matrix(cases, kinds, quick):
    return [
        pytest.param(case, kind, marks=() if (case, kind) in quick else pytest.mark.slow)
        for case in cases
        for kind in kinds
    ]


def bind(function):
    return functools.partial(function, limit=10.0, rounding=Rounding("bfloat16"), interpret=False)


def backward_specs(case, kind):
    x, gate, sizes, weights = specs(case, kind)
    return x, gate, sizes, weights, ((case.rows, case.d), jnp.bfloat16)


@aot.needs_libtpu
@pytest.mark.parametrize("chip", aot.TPU_CHIPS)
@pytest.mark.parametrize("case, kind", matrix(REAL, FORMATS, QUICK))
def test_tpu_forward(chip, case, kind):
    if (chip, kind) == ("v6e", "bfloat16") and case.startswith("pro"):
        pytest.skip("384 bfloat16 experts of Pro are 48 GiB, and a v6e has 32")
    compiled = aot.compile_tpu(chip, bind(pallas_tpu.forward), *specs(REAL[case], kind))
    assert compiled.as_text().count("tpu_custom_call") >= 2


@aot.needs_libtpu
@pytest.mark.parametrize("chip", aot.TPU_CHIPS)
@pytest.mark.parametrize("case, kind", matrix(SHARDED, ALL, QUICK_BACKWARD))
def test_tpu_backward(chip, case, kind):
    compiled = aot.compile_tpu(
        chip, bind(pallas_tpu.backward), *backward_specs(SHARDED[case], kind)
    )
    assert compiled.as_text().count("tpu_custom_call") >= (5 if "float" in kind else 3)


@aot.needs_cuda
@pytest.mark.parametrize("case, kind", matrix(REAL, FORMATS, QUICK))
def test_h100_forward(case, kind):
    compiled = aot.compile_h100(bind(pallas_gpu.forward), *specs(REAL[case], kind))
    assert compiled.as_text().count("triton") >= 2


@aot.needs_cuda
@pytest.mark.parametrize("case, kind", matrix(SHARDED, ALL, QUICK_BACKWARD))
def test_h100_backward(case, kind):
    compiled = aot.compile_h100(bind(pallas_gpu.backward), *backward_specs(SHARDED[case], kind))
    assert compiled.as_text().count("triton") >= (5 if "float" in kind else 3)
