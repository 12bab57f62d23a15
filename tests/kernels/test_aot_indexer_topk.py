"""The indexer's kernels compile for TPUs and an H100 at the released models' shapes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from tests.support import aot
from tests.support.selection import first
from v4jax.kernels.indexer_topk import api, cases, stored_keys

# What the quick suite compiles, for the first TPU and the H100.
QUICK = ["flash_prefill_64k"]
# What it lowers: the same on the other TPUs, a decode step, and the other forms of keys.
LOWERED = aot.rows(
    *itertools.product(aot.TPU_CHIPS[1:], QUICK),
    *itertools.product(("v5p", "h100"), ["flash_decode_1m"]),
)
LOWERED_STORED = aot.rows(
    *itertools.product(("v5p", "h100"), QUICK), *itertools.product(aot.CHIPS, ["flash_decode_1m"])
)


def on_chips(names, quick=()):
    """Every chip and case; quick are `quick` on the first chip."""
    return first(
        {(aot.TPU_CHIPS[0], name) for name in quick}, itertools.product(aot.TPU_CHIPS, names)
    )


def member(case, native=False, dtype=jnp.bfloat16):
    return functools.partial(api.indexer_member, topk=case.topk, native=native), cases.specs(
        case, dtype
    )


def stored(case):
    """The choice from stored keys."""
    function, (q, weight, keys, *bounds) = member(case)
    keys = jax.eval_shape(stored_keys.pack, jax.ShapeDtypeStruct(*keys))
    return function, (q, weight, keys, *bounds)


def scores(case, dtype=jnp.bfloat16):
    """Forward and backward of the dense scores."""
    *args, _, _ = cases.specs(case, dtype)
    g = ((case.batch, case.length, case.entries), jnp.float32)

    def both(q, weight, keys, g):
        value, backward = jax.vjp(api.index_scores, q, weight, keys)
        return value, backward(g)

    return both, (*args, g)


def kernels(compiled):
    text = compiled.as_text()
    return text.count("tpu_custom_call") + text.count("__gpu$xla.gpu.triton")


@pytest.mark.parametrize(("chip", "name"), LOWERED)
def test_choice_lowers(chip, name):
    function, specs = member(cases.RELEASED[name])
    assert aot.lowers_to_kernels(chip, function, *specs)


@pytest.mark.parametrize(("chip", "name"), LOWERED_STORED)
def test_choice_from_stored_keys_lowers(chip, name):
    function, specs = stored(cases.RELEASED[name])
    assert aot.lowers_to_kernels(chip, function, *specs)


@pytest.mark.parametrize(("chip",), aot.rows(("v5p",), ("h100",)))
@pytest.mark.parametrize("options", [{"native": True}, {"dtype": jnp.float32}])
def test_choice_in_other_numbers_lowers(chip, options):
    function, specs = member(cases.RELEASED["flash_prefill_64k"], **options)
    assert aot.lowers_to_kernels(chip, function, *specs)


@pytest.mark.parametrize(("chip",), aot.rows(*((chip,) for chip in aot.TPU_CHIPS[1:])))
def test_scores_and_gradients_lower(chip):
    function, specs = scores(cases.TRAINING["block_64k"])
    assert aot.lowers_to_kernels(chip, function, *specs)


@aot.needs_libtpu
@pytest.mark.parametrize(("chip", "name"), on_chips(cases.RELEASED, QUICK))
def test_choice_compiles_for_a_tpu(chip, name):
    function, specs = member(cases.RELEASED[name])
    compiled = aot.compile_tpu(chip, function, *specs)
    assert kernels(compiled) >= 1


@aot.needs_libtpu
@pytest.mark.parametrize(("chip", "name"), on_chips(cases.RELEASED))
def test_choice_from_stored_keys_compiles_for_a_tpu(chip, name):
    function, specs = stored(cases.RELEASED[name])
    assert kernels(aot.compile_tpu(chip, function, *specs)) >= 1


@aot.needs_cuda
@pytest.mark.parametrize("name", first([], cases.RELEASED))
def test_choice_from_stored_keys_compiles_for_an_h100(name):
    function, specs = stored(cases.RELEASED[name])
    assert kernels(aot.compile_h100(function, *specs)) >= 3


@aot.needs_libtpu
@pytest.mark.parametrize(("chip", "name"), on_chips(QUICK))
def test_choice_through_the_chain_compiles_for_a_tpu(chip, name):
    function, specs = member(cases.RELEASED[name], native=True)
    assert kernels(aot.compile_tpu(chip, function, *specs)) >= 1


@pytest.mark.slow
@aot.needs_libtpu
def test_choice_in_float32_compiles_for_a_tpu():
    function, specs = member(cases.RELEASED["flash_prefill_64k"], dtype=jnp.float32)
    assert kernels(aot.compile_tpu("v5p", function, *specs)) >= 1


@aot.needs_cuda
@pytest.mark.parametrize("name", first([], ["flash_prefill_64k", "pro_decode_1m"]))
def test_choice_in_float32_compiles_for_an_h100(name):
    function, specs = member(cases.RELEASED[name], dtype=jnp.float32)
    assert kernels(aot.compile_h100(function, *specs)) >= 3


@aot.needs_libtpu
@pytest.mark.parametrize(("chip", "name"), on_chips(cases.TRAINING, ["block_64k"]))
def test_scores_and_gradients_compile_for_a_tpu(chip, name):
    function, specs = scores(cases.TRAINING[name])
    assert kernels(aot.compile_tpu(chip, function, *specs)) >= 3


@aot.needs_cuda
@pytest.mark.parametrize("name", first(QUICK, cases.RELEASED))
def test_choice_compiles_for_an_h100(name):
    function, specs = member(cases.RELEASED[name])
    assert kernels(aot.compile_h100(function, *specs)) >= 3


@pytest.mark.slow
@aot.needs_cuda
def test_choice_through_the_chain_compiles_for_an_h100():
    function, specs = member(cases.RELEASED["flash_prefill_64k"], native=True)
    assert kernels(aot.compile_h100(function, *specs)) >= 3


@aot.needs_cuda
@pytest.mark.parametrize("name", first(["block_64k"], cases.TRAINING))
def test_scores_and_gradients_compile_for_an_h100(name):
    function, specs = scores(cases.TRAINING[name])
    assert kernels(aot.compile_h100(function, *specs)) >= 3


@aot.needs_cuda
def test_workspace_does_not_grow_with_the_queries():
    """A 1M context's scores of 4096 queries would be 4 GiB."""
    function, specs = member(cases.RELEASED["flash_prefill_1m"])
    compiled = aot.compile_h100(function, *specs)
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 30
