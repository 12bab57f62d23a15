"""The experts' kernels compiled for chips that are not there, at the released models' shapes."""

import functools
import itertools

import jax.numpy as jnp
import pytest

from tests.support import aot
from tests.support.selection import first
from v4jax.kernels.grouped_matmul.api import Rounding
from v4jax.kernels.grouped_matmul.cases import REAL, Case, specs
from v4jax.kernels.grouped_matmul.gpu import matmul as pallas_gpu
from v4jax.kernels.grouped_matmul.tpu import matmul as pallas_tpu

FORMATS = ("bfloat16", "fp8", "fp4")
ALL = (*FORMATS, "float32")
# A training step's experts on one of 32 chips: weights, gradients and all fit the smallest.
SHARDED = {
    "flash": Case(rows=4096 * 6, experts=8, d=4096, f=2048),
    "pro": Case(rows=4096 * 6, experts=12, d=7168, f=3072),
}
FORWARD = list(itertools.product(REAL, FORMATS))
BACKWARD = list(itertools.product(SHARDED, ALL))
# What the quick suite compiles, for the first TPU and the H100.
QUICK, QUICK_BACKWARD = ("pro", "fp4"), ("flash", "bfloat16")
# What it lowers: the other forms there, the largest forward and training's backward elsewhere.
LOWERED = aot.rows(
    *itertools.product(("v5p", "h100"), ["flash"], ["bfloat16"]),
    *itertools.product(("v5p", "h100"), ["pro_decode"], ["fp8"]),
    *((chip, *QUICK) for chip in aot.TPU_CHIPS[1:]),
)
LOWERED_BACKWARD = aot.rows(
    ("v5p", "pro", "fp4"),
    ("h100", "pro", "fp4"),
    *((chip, *QUICK_BACKWARD) for chip in aot.TPU_CHIPS[1:]),
)


def on_chips(rows, quick):
    return first(
        {(*quick, aot.TPU_CHIPS[0])}, [(*row, chip) for row in rows for chip in aot.TPU_CHIPS]
    )


def bind(function):
    return functools.partial(function, limit=10.0, rounding=Rounding("bfloat16"), interpret=False)


def backward_specs(case, kind):
    x, gate, sizes, weights = specs(case, kind)
    return x, gate, sizes, weights, ((case.rows, case.d), jnp.bfloat16)


def module(chip):
    return pallas_gpu if chip == "h100" else pallas_tpu


@pytest.mark.parametrize("chip, case, kind", LOWERED)
def test_forward_lowers(chip, case, kind):
    assert aot.lowers_to_kernels(chip, bind(module(chip).forward), *specs(REAL[case], kind))


@pytest.mark.parametrize("chip, case, kind", LOWERED_BACKWARD)
def test_backward_lowers(chip, case, kind):
    arguments = backward_specs(SHARDED[case], kind)
    assert aot.lowers_to_kernels(chip, bind(module(chip).backward), *arguments)


@aot.needs_libtpu
@pytest.mark.parametrize("case, kind, chip", on_chips(FORWARD, QUICK))
def test_tpu_forward(case, kind, chip):
    if (chip, kind) == ("v6e", "bfloat16") and case.startswith("pro"):
        pytest.skip("384 bfloat16 experts of Pro are 48 GiB, and a v6e has 32")
    compiled = aot.compile_tpu(chip, bind(pallas_tpu.forward), *specs(REAL[case], kind))
    assert compiled.as_text().count("tpu_custom_call") >= 2


@aot.needs_libtpu
@pytest.mark.parametrize("case, kind, chip", on_chips(BACKWARD, QUICK_BACKWARD))
def test_tpu_backward(case, kind, chip):
    compiled = aot.compile_tpu(
        chip, bind(pallas_tpu.backward), *backward_specs(SHARDED[case], kind)
    )
    assert compiled.as_text().count("tpu_custom_call") >= (5 if "float" in kind else 3)


@aot.needs_cuda
@pytest.mark.parametrize("case, kind", first([QUICK], FORWARD))
def test_h100_forward(case, kind):
    compiled = aot.compile_h100(bind(pallas_gpu.forward), *specs(REAL[case], kind))
    assert compiled.as_text().count("triton") >= 2


@aot.needs_cuda
@pytest.mark.parametrize("case, kind", first([QUICK_BACKWARD], BACKWARD))
def test_h100_backward(case, kind):
    compiled = aot.compile_h100(bind(pallas_gpu.backward), *backward_specs(SHARDED[case], kind))
    assert compiled.as_text().count("triton") >= (5 if "float" in kind else 3)
