"""The compiler of a TPU that is not there: what is read of its words, full-size training steps."""

import dataclasses

import pytest

import v4jax
from tests.support import aot
from v4jax.config import CSA, HCA
from v4jax.plan import compiler, steps, topology
from v4jax.plan.job import Job, layout_of

# Flash's most common layers at full width.
PAIR = dataclasses.replace(v4jax.get_config("flash"), layers=(CSA, HCA), mtp_layers=())

BUFFERS = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <31 add @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4096, parameter 1, shape |f32[1024]| at ShapeIndex {}, maybe-live-out:
 value: <97 x @0> (size=4096,offset=0): f32[1024]{0:T(1024)}
allocation 2: size 8192, preallocated-temp:
 value: <110 y @0> (size=4096,offset=0): f32[1024]{0:T(1024)}
allocation 3: size 1048576, color 1, preallocated-temp:
 value: <111 z @1> (size=4096,offset=0): f32[1024]{0:T(1024)S(1)}
"""


def test_a_devices_memory_is_what_lies_in_it_and_not_in_vmem():
    assert compiler.placed(BUFFERS) == (4096, 512 + 4096 + 8192)


def test_a_program_that_does_not_fit_is_told_from_one_that_failed():
    said = "noise\nRESOURCE_EXHAUSTED: Ran out of\nmemory.\n\nLargest buffers: ..."
    assert compiler._no_room(said) == "Ran out of memory."
    with pytest.raises(RuntimeError, match="it was killed"):
        compiler._no_room("")


def checked(config, batch, name, sizes, parts):
    """A training step that fits, compiled on two cores in minutes and a laptop's memory."""
    job = Job(config, "train", 4096, batch, "float32", parts)
    where = topology.parse(name)
    found = compiler.compile_job(job, where, sizes)
    assert found.failure is None and found.peak < where.chip.memory
    assert found.host < 6e9
    assert found.processor < 240  # a busy machine's processors are slower too
    return found


@pytest.mark.slow
@aot.needs_libtpu
def test_a_decode_step_copies_no_cache_as_stored():
    """Scanned layers, several rows per device: no list is laid out anew for a write."""
    config = dataclasses.replace(PAIR, layers=(CSA, HCA) * 4)
    job = Job(config, "decode", 1 << 20, 8, numerics="native")
    found = compiler.compile_job(job, topology.parse("v5p:2x2x1"), {"expert": 4})
    arguments = sum(found.arguments.values())
    assert found.failure is None and found.argument == pytest.approx(arguments, rel=1e-3)
    assert found.peak - arguments < found.arguments["cache"]


@pytest.mark.slow
@aot.needs_libtpu
def test_a_pair_of_full_size_layers_trains_on_a_pod():
    """Four microbatches on 128 chips.

    Gradients are summed over shards, and so cut into their parts, in every microbatch.
    """
    found = checked(PAIR, 1024, "v5p:4x4x8", {"fsdp": 16, "expert": 8}, 4)
    scattered = [c for c in found.collectives if c.kind == "reduce-scatter" and c.bytes > 1e8]
    assert scattered and all(c.count % 4 == 0 for c in scattered)


@pytest.mark.slow
@aot.needs_libtpu
@pytest.mark.parametrize(
    "mode, context, batch, name, sizes",
    [
        ("train", 4096, 1024, "v5p:4x4x8", {"fsdp": 16, "expert": 8}),
        ("prefill", 65536, 1, "v5p:2x2x1", {"expert": 4}),
        ("decode", 1048576, 8, "v5p:2x2x1", {"expert": 4}),
    ],
)
def test_a_plan_is_of_a_program_that_can_be_finished(mode, context, batch, name, sizes):
    """Machine code, which plans leave out, is there; at most so much memory as they say.

    XLA's figure is of what lives at the worst moment: the gaps of a heap are not in it.
    """
    weights, parts = ("float32", 4) if mode == "train" else ("stored", 1)
    job = Job(PAIR, mode, context, batch, weights, parts)
    where = topology.parse(name)
    planned = compiler.compile_job(job, where, sizes)
    whole = steps.build(job, layout_of(job, sizes, where.devices)).lower().compile()
    analysis = whole.memory_analysis()
    print(mode, planned.peak, analysis.peak_memory_in_bytes)
    assert analysis.generated_code_size_in_bytes > 1e6
    assert analysis.argument_size_in_bytes == pytest.approx(planned.argument, rel=1e-3)
    assert planned.argument < analysis.peak_memory_in_bytes <= planned.peak


@pytest.mark.slow
@aot.needs_libtpu
@pytest.mark.parametrize(
    "config, batch, name, sizes, parts",
    [
        ("flash", 18432, "v5p:4x4x8", {"fsdp": 16, "expert": 8}, 144),
        ("pro", 23040, "v5p:8x8x16", {"fsdp": 16, "expert": 16, "sequence": 4}, 90),
    ],
)
def test_released_models_train_on_a_pod(config, batch, name, sizes, parts):
    """The report's batch of 4,096 tokens a row, every layer."""
    checked(v4jax.get_config(config), batch, name, sizes, parts)
