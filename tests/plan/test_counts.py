"""Operations and bytes by our own count, against sums by hand and the files' own sizes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import v4jax
from v4jax import accounting, weights
from v4jax.chips import CHIPS
from v4jax.errors import InputError
from v4jax.hf.tensors import tensor_table
from v4jax.model import sharded
from v4jax.model.transformer import Transformer
from v4jax.plan import exchange, memory, program, roofline, variables
from v4jax.plan.hlo import Collective
from v4jax.plan.job import Job, abstract_layout

MILLION = 2**20


@pytest.fixture(scope="module")
def tiny():
    """A tiny model's config and its variables as stored, in leaves."""
    config = v4jax.get_config("flash_tiny")
    return config, _leaves(config, "stored")


def _leaves(config, form):
    axes = Transformer(config).logical_axes()
    return variables.leaves(variables.stored_variables(config, form, 4), axes)


def _tables(config):
    """Bytes by which tables of ids are narrower than in the files."""
    return sum(spec.nbytes // 2 for spec in tensor_table(config) if spec.role == "table")


def test_stored_variables_are_the_files_bytes():
    """Flash: 159,609,485,896 bytes in the official files, tables of ids in 64 bits there."""
    config = v4jax.get_config("flash")
    tree = variables.stored_variables(config, "stored", 4)
    found = sum(leaf.size * leaf.dtype.itemsize for leaf in _arrays(tree))
    assert found + _tables(config) == 159_609_485_896


def _arrays(tree):
    import jax

    return jax.tree.leaves(tree)


def test_stored_variables_are_what_a_model_takes(tiny):
    """Same paths, logical shapes and types as `init` makes in float32."""
    import jax

    config = v4jax.get_config("flash_tiny")
    expected = Transformer(config).abstract_variables()
    found = variables.stored_variables(config, "float32", 4)
    described = [
        {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype.name) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (expected, found))
    ]
    assert described[0] == described[1]


@pytest.mark.parametrize("sizes, cut", [({"expert": 1}, 1), ({"expert": 4}, 4), ({"fsdp": 4}, 4)])
def test_held_weights(tiny, sizes, cut):
    """On a decode mesh experts are divided and the rest is on every device."""
    config, leaves = tiny
    job = Job(config, "decode", 256, 4)
    held = memory.held(job, abstract_layout(job, sizes), leaves)
    whole = sum(leaf.nbytes for leaf in leaves)
    experts = sum(leaf.nbytes for leaf in leaves if "experts" in leaf.path)
    cut = max(sizes.values())  # DECODE lays experts along fsdp and expert
    assert held.weights == whole - experts + experts / cut
    assert held.routed == experts / cut


def test_held_in_training(tiny):
    """Master, one moment a matrix's number, two of the others', one gradient."""
    config, _ = tiny
    leaves = _leaves(config, "float32")
    job = Job(config, "train", 64, 8, "float32")
    held = memory.held(job, abstract_layout(job, {"data": 8}), leaves)
    trained = [leaf for leaf in leaves if leaf.path[0] == "params"]
    numbers = sum(np.prod(leaf.shape) for leaf in trained)
    declared = weights.parameters(config, 4)
    others = sum(np.prod(leaf.shape) for leaf in trained if memory.moments(leaf, declared) == 2)
    assert held.gradients == 4 * numbers
    assert held.optimizer == 4 * (numbers + others)
    assert held.gathered == numbers
    parted = memory.held(job, abstract_layout(job, {"fsdp": 8}), leaves)
    assert parted.gathered == numbers
    assert parted.weights < held.weights / 6


def test_a_cache_by_hand():
    config = v4jax.get_config("flash")
    job = Job(config, "decode", MILLION, 16)
    layout = abstract_layout(job, {"expert": 32})
    assert layout.strategy.name == "decode_long"
    held = memory.held(job, layout, [])
    entries = 2 * 512 * MILLION
    rows = 16 * (21 * (entries / 4 + 2 * 128 * MILLION / 4) + 20 * entries / 128) / 32
    windows = 16 * 43 * 127 * 2 * 512
    csa, hca = 7 * 4 * (2048 + 512), 127 * 4 * 1024
    assert held.cache == pytest.approx(rows + windows + 16 * (21 * csa + 20 * hca))


@pytest.mark.parametrize("numerics", [None, "native"])
@pytest.mark.parametrize("name", ["flash", "pro"])
def test_a_cache_by_hand_is_the_arrays(name, numerics):
    """The program's own arrays on a device, whose lists are whole tiles at this length."""
    job = Job(v4jax.get_config(name), "decode", MILLION, 8, numerics=numerics)
    layout = abstract_layout(job, {"expert": 4})
    by_hand = memory.held(job, layout, []).cache
    model = Transformer(job.config, dtype="bfloat16", numerics=numerics, sharding=layout)
    cache = jax.eval_shape(functools.partial(model.init_cache, job.batch, job.context))
    described = program.with_shardings(cache, sharded.cache_shardings(layout, cache))
    found = program.Program(print, {"cache": described}, ()).bytes("cache")
    assert found == pytest.approx(by_hand, rel=1e-6)


def test_native_numerics_are_not_planned_in_training():
    with pytest.raises(InputError, match="training was asked for with numerics='native'"):
        Job(v4jax.get_config("flash_tiny"), "train", 64, 1, "bf16", numerics="native")
    with pytest.raises(InputError, match="numerics is 'fp8'; expected None or 'native'"):
        Job(v4jax.get_config("flash_tiny"), "decode", 64, 1, numerics="fp8")


def test_operations_of_a_decoded_token_are_the_accounts():
    config = v4jax.get_config("flash")
    job = Job(config, "decode", MILLION, 1)
    found = roofline.operations(job, abstract_layout(job, {"data": 1}))
    expected = accounting.flops_per_token(config, MILLION, accounting.ONE_EACH)
    assert sum(found.values()) == pytest.approx(sum(expected.values()))


def test_prefill_is_the_sum_over_tokens(tiny):
    config, _ = tiny
    job = Job(config, "prefill", 1024, 2)
    found = sum(roofline.operations(job, abstract_layout(job, {"data": 1})).values())
    head = 2 * config.hidden_size * config.vocab_size
    tokens = [
        sum(accounting.flops_per_token(config, n + 1, accounting.ONE_EACH).values()) - head
        for n in range(1024)
    ]
    assert found == pytest.approx(2 * (sum(tokens) + head), rel=5e-3)


def test_training_is_four_forward_passes(tiny):
    config = dataclasses.replace(tiny[0], mtp_layers=())
    forward, step = Job(config, "prefill", 512, 2), Job(config, "train", 512, 2, "float32")
    layout = abstract_layout(forward, {"data": 1})
    once, all_ = roofline.operations(forward, layout), roofline.operations(step, layout)
    for part in once:
        assert all_[part] == pytest.approx((4 * 512 if part == "head" else 4) * once[part])


def test_work_is_divided_by_the_axes_that_share_it(tiny):
    config, _ = tiny
    job = Job(config, "decode", 1024, 1)
    alone = roofline.operations(job, abstract_layout(job, {"data": 1}))
    spread = roofline.operations(job, abstract_layout(job, {"expert": 4}))
    ratio = {part: alone[part] / spread[part] for part in alone}
    shared = {"index_scores", "attention", "experts"}
    assert {part for part, times in ratio.items() if times == 4} == shared
    assert {times for part, times in ratio.items() if part not in shared} == {1}


def test_the_last_slice_of_a_sequence_has_the_most_work():
    config = v4jax.get_config("flash")
    job = Job(config, "prefill", MILLION, 1)
    uneven = [roofline.imbalance(job, abstract_layout(job, {"sequence": n})) for n in (1, 2, 8, 64)]
    assert uneven[0] == 1 and uneven == sorted(uneven)
    # Of 1.37e15 operations 54 % grow with the position, so the last token has up to 1.5 times.
    assert 1.4 < uneven[-1] < 2


def test_times_of_a_roofline():
    chip = CHIPS["v5p"]
    gather = Collective("all-gather", 8, 8, ("fsdp",), 10, 2e9)
    time = roofline.times(chip, 459e12, 1.5, 2765e9, [gather])
    assert time.compute == pytest.approx(1.5)
    assert time.memory == pytest.approx(1.0)
    assert time.interconnect == pytest.approx(10 * (0.01 + 3e-6))
    assert time.floor == time.compute and time.sum == pytest.approx(2.6, rel=1e-3)


def test_a_group_across_nodes_goes_through_adapters():
    chip = CHIPS["h100"]
    inside = Collective("all-gather", 8, 8, ("fsdp",), 1, 1e9)
    across = dataclasses.replace(inside, span=16)
    ratio = roofline.interconnect_seconds(chip, across) / roofline.interconnect_seconds(
        chip, inside
    )
    assert 8.9 < ratio < 9


def test_expected_exchanges_of_training(tiny):
    config, _ = tiny
    leaves = _leaves(config, "float32")
    job = Job(config, "train", 64, 8, "float32")
    found = exchange.expected(job, abstract_layout(job, {"fsdp": 2, "expert": 4}), leaves)
    kinds = {(c.kind, c.axes) for c in found}
    assert ("all-to-all", ("expert",)) in kinds and ("all-gather", ("fsdp",)) in kinds
    assert not any("tensor" in c.axes or "sequence" in c.axes for c in found)
    tokens = 8 * 64 / 8
    sent = tokens * config.num_experts_per_tok * config.hidden_size * 2 * 3 / 4
    assert {c.bytes for c in found if c.kind == "all-to-all"} == {sent}


def test_bad_jobs(tiny):
    config, _ = tiny
    with pytest.raises(InputError, match="max_position_embeddings"):
        Job(config, "decode", 10**9, 1)
    with pytest.raises(InputError, match="--weights"):
        Job(config, "train", 64, 1)
    with pytest.raises(InputError, match="expert has size .* expert=3"):
        abstract_layout(Job(config, "decode", 64, 3), {"expert": 3})
