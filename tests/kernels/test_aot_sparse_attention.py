"""Sparse attention compiles for the chips it is meant for, at the released models' shapes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from tests.support import aot
from tests.support.selection import first
from v4jax.kernels.sparse_attention import api, cases, entries, stored

TRAINED = [name for name in cases.REAL if "decode" not in name]


# What the quick suite compiles, for the first TPU and the H100.
QUICK = ["flash_csa_prefill_4k"]
# What it lowers: each other kind of layer once, a decode step, and the same on the other TPUs.
LOWERED = aot.rows(
    *itertools.product(("v5p", "h100"), ["flash_window_4k", "flash_csa_decode_1m"]),
    *itertools.product(aot.TPU_CHIPS[1:], ["flash_csa_decode_1m"]),
)
LOWERED_BACKWARD = aot.rows(
    *itertools.product(("v5p", "h100"), ["flash_hca_prefill_4k_of_1m", "flash_window_4k"]),
    *itertools.product(aot.TPU_CHIPS[1:], QUICK),
)


def on_chips(names, quick):
    """Every chip and case; quick are `quick` on the first chip."""
    return first(
        {(aot.TPU_CHIPS[0], name) for name in quick}, itertools.product(aot.TPU_CHIPS, names)
    )


# The forms in which a cache keeps entries, and where they are read.
FORMS = {"lanes": entries.in_lanes, "stored": stored.pack}
CACHED = [name for name in cases.REAL if "csa_decode" in name or "prefill_4k_of_64k" in name]


def cached(name, form):
    """A case's arguments with the entries in that form."""
    diff, arrays = cases.specs(cases.REAL[name])
    return diff | {"entries_BCH": jax.eval_shape(FORMS[form], diff["entries_BCH"])}, arrays


def forward(case, diff, arrays):
    return api.sparse_attention(**diff, **arrays, scale=case.width**-0.5, window=case.window)


def gradients(case, diff, arrays):
    def loss(diff):
        return jnp.sum(forward(case, diff, arrays).astype(jnp.float32))

    return jax.grad(loss)(diff)


@pytest.mark.parametrize(("chip", "name"), LOWERED)
def test_forward_lowers(chip, name):
    case = cases.REAL[name]
    run = functools.partial(forward, case)
    assert aot.lowers_to_kernels(chip, run, *cases.specs(case))


@pytest.mark.parametrize(("chip", "name"), LOWERED_BACKWARD)
def test_backward_lowers(chip, name):
    case = cases.REAL[name]
    run = functools.partial(gradients, case)
    assert aot.lowers_to_kernels(chip, run, *cases.specs(case))


@aot.needs_libtpu
@pytest.mark.parametrize(("chip", "name"), on_chips(cases.REAL, QUICK))
def test_forward_compiles_for_tpus(chip, name):
    case = cases.REAL[name]
    compiled = aot.compile_tpu(chip, functools.partial(forward, case), *cases.specs(case))
    assert "tpu_custom_call" in compiled.as_text()


@aot.needs_libtpu
@pytest.mark.parametrize(("chip", "name"), on_chips(TRAINED, QUICK))
def test_backward_compiles_for_tpus(chip, name):
    case = cases.REAL[name]
    compiled = aot.compile_tpu(chip, functools.partial(gradients, case), *cases.specs(case))
    # forward, dq, and the gradient of every array of keys
    keys = 1 + (case.entries > 0)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2 + keys


@aot.needs_cuda
@pytest.mark.parametrize("name", first(QUICK, cases.REAL))
def test_forward_compiles_for_an_h100(name):
    case = cases.REAL[name]
    compiled = aot.compile_h100(functools.partial(forward, case), *cases.specs(case))
    assert "triton" in compiled.as_text()


@aot.needs_cuda
@pytest.mark.parametrize("name", first(QUICK, TRAINED))
def test_backward_compiles_for_an_h100(name):
    case = cases.REAL[name]
    compiled = aot.compile_h100(functools.partial(gradients, case), *cases.specs(case))
    assert "triton" in compiled.as_text()


@aot.needs_libtpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("chip", "name"), on_chips(CACHED, ["flash_csa_decode_1m"]))
def test_cached_entries_compile_for_tpus(chip, name, form):
    case = cases.REAL[name]
    compiled = aot.compile_tpu(chip, functools.partial(forward, case), *cached(name, form))
    assert "tpu_custom_call" in compiled.as_text()
    if "decode" in name:
        # A decode step copies nothing of the size of the cache.
        entry_bytes = case.batch * case.entries * 2 * case.width
        assert compiled.memory_analysis().temp_size_in_bytes < entry_bytes / 16


@aot.needs_cuda
@pytest.mark.parametrize("name", first(["flash_csa_decode_1m"], CACHED))
def test_stored_entries_compile_for_an_h100(name):
    case = cases.REAL[name]
    compiled = aot.compile_h100(functools.partial(forward, case), *cached(name, "stored"))
    assert "triton" in compiled.as_text()
