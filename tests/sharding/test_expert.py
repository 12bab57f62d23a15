"""Every exchange of tokens against one device: results, gradients, collectives, refusals."""

import collections
import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import routing
from tests.support.selection import first
from v4jax import quant
from v4jax.errors import InputError
from v4jax.plan import hlo
from v4jax.sharding import expert
from v4jax.sharding.rules import Layout

MESHES = [
    ("train", dict(expert=8)),
    ("train", dict(expert=2, sequence=4)),
    ("train", dict(data=2, fsdp=2, expert=2)),
    ("prefill", dict(fsdp=2, expert=2, sequence=2)),
    ("decode", dict(fsdp=2, expert=4)),
    ("decode_long", dict(fsdp=2, expert=4)),
    ("decode_long", dict(data=2, expert=2, tensor=2)),
]


@pytest.fixture(scope="module")
def inputs():
    x, weights, *stacks = routing.arrays()
    dy = jax.random.normal(jax.random.key(1), x.shape)
    return {
        name: (x, weights, jnp.asarray(chosen, jnp.int32), *stacks, dy)
        for name, chosen in routing.routings().items()
    }


@pytest.fixture(scope="module")
def expected(inputs):
    run = routing.with_gradients(Layout())
    return {name: jax.device_get(run(*args)) for name, args in inputs.items()}


def check(run, inputs, expected):
    for name, args in inputs.items():
        found = jax.device_get(run(*args))
        for ours, theirs in zip(
            jax.tree.leaves(found), jax.tree.leaves(expected[name]), strict=True
        ):
            scale = np.abs(theirs).max()
            np.testing.assert_allclose(ours / scale, theirs / scale, atol=2e-5, err_msg=name)


def test_one_device_is_the_plain_sum(inputs, expected):
    """Every expert on every token, weighted by a one-hot matrix."""
    for name, (x, weights, chosen, w1, w2, w3, _) in inputs.items():
        a, b = (jnp.einsum("xd,efd->xef", x, w, precision="highest") for w in (w1, w3))
        z = jax.nn.silu(jnp.minimum(a, 10.0)) * jnp.clip(b, -10.0, 10.0)
        y = jnp.einsum("xef,edf->xed", z, w2, precision="highest")
        share = (jax.nn.one_hot(chosen, routing.EXPERTS) * weights[..., None]).sum(1)
        y = jnp.einsum("xe,xed->xd", share, y, precision="highest")
        np.testing.assert_allclose(expected[name][0], y, atol=1e-5 * float(jnp.abs(y).max()))


# Slow are those whose axes the others have one by one.
@pytest.mark.parametrize(
    "strategy, sizes",
    [
        pytest.param(*row, marks=pytest.mark.slow if number in (2, 5) else ())
        for number, row in enumerate(MESHES)
    ],
)
def test_mesh_equals_one_device(strategy, sizes, inputs, expected):
    check(routing.with_gradients(routing.layout_on(strategy, **sizes)), inputs, expected)


WAVES = [("train", 2), ("train", 3), ("train", 6), ("decode", 3)]


@pytest.mark.parametrize("strategy, waves", first([("train", 3), ("decode", 3)], WAVES))
def test_waves(strategy, waves, inputs, expected):
    layout = routing.layout_on(strategy, data=2, expert=4, waves=waves)
    check(routing.with_gradients(layout), inputs, expected)


def test_rows_are_sorted_alike_where_key_and_row_do_not_fit_one_number():
    """The last key and row of 2^32 numbers, and one key more, which takes another sort."""
    fitting = (1 << 32) // 64
    key_R = jax.random.randint(jax.random.key(2), (64,), 0, 5).at[17].set(fitting - 1)
    for keys in (fitting, fitting + 1):
        places = jax.jit(expert._sorted, static_argnums=(1, 2))(key_R, keys, (16, 4))
        order = np.argsort(np.asarray(key_R), kind="stable")
        np.testing.assert_array_equal(places.source_R, order)
        np.testing.assert_array_equal(places.row_XK.reshape(-1)[order], np.arange(64))


def test_all_to_all_sums_in_the_same_order(inputs, expected):
    """Not close: equal, whatever the mesh."""
    for sizes in (dict(expert=8), dict(data=4, expert=2)):
        y, _ = routing.with_gradients(routing.layout_on("train", **sizes))(*inputs["random"])
        np.testing.assert_array_equal(y, expected["random"][0])


def test_capacity_that_suffices(inputs, expected):
    random = {"random": inputs["random"]}
    layout = routing.layout_on("train", data=2, expert=4, capacity=3.0)
    check(routing.with_gradients(layout), random, expected)


def pass_the_capacity():
    """18 rows a shard, all to the last one, and room for 1.5 times an even spread."""
    x, weights, *stacks = routing.arrays()
    chosen = routing.routings()["all to the last expert's shard"].astype(np.int32)
    layout = routing.layout_on("train", expert=8, capacity=1.5)
    y = jax.jit(routing.routed(layout))(x, weights, chosen, *stacks)
    print("came through", np.asarray(y).sum())


def test_capacity_that_is_passed_raises():
    """In a process of its own, which it ends."""
    code = "from tests.sharding import test_expert; test_expert.pass_the_capacity()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "came through" not in done.stdout
    # The last shard holds two experts, so 6 tokens send it 12 rows: 8 blocks of 12.
    needed = "needs room for 96 rows on a shard and has 32, 1.78 times an even spread of 18"
    assert needed in done.stderr
    assert "capacity of at least 5.34 in Layout" in done.stderr


def test_an_expert_chosen_twice_is_never_dropped_silently():
    """Three choices of the same expert, where a shard has two: more rows than distinct ones."""
    x, weights, *stacks = routing.arrays()
    chosen = jnp.zeros((routing.TOKENS, routing.CHOICES), jnp.int32)
    y = jax.jit(routing.routed(routing.layout_on("train", expert=8)))(x, weights, chosen, *stacks)
    assert np.isnan(np.asarray(y)).all()
    gathered = routing.routed(routing.layout_on("decode", expert=8))
    one = routing.routed(Layout())(x, weights, chosen, *stacks)
    y = jax.jit(gathered)(x, weights, chosen, *stacks)
    np.testing.assert_allclose(y, one, atol=2e-5 * float(jnp.abs(one).max()))


def test_mixed_axes_are_refused():
    layout = routing.layout_on("train", fsdp=2, expert=4)
    table = dict(layout.strategy.table, batch=("data", "fsdp"), expert=("fsdp", "expert"))
    mixed = dataclasses.replace(layout.strategy, table=tuple(table.items()))
    with pytest.raises(InputError, match=r"\['fsdp'\].*different tokens.*\['expert'\].*the same"):
        routed = routing.routed(dataclasses.replace(layout, strategy=mixed))
        jax.eval_shape(routed, *specs())


def test_experts_that_do_not_divide_are_refused():
    x, weights, *stacks = routing.arrays(experts=24)
    routed = routing.routed(routing.layout_on("train", expert=8), experts=12)
    with pytest.raises(InputError, match="expert has size 12.*expert=8"):
        routed(x, weights, jnp.zeros((routing.TOKENS, 3), jnp.int32), *stacks)


def specs(dtype="float32"):
    x, weights, *stacks = routing.arrays()
    chosen = jax.ShapeDtypeStruct((routing.TOKENS, routing.CHOICES), jnp.int32)
    return x.astype(dtype), weights, chosen, *(w.astype(dtype) for w in stacks)


def collectives(layout, function, *args):
    """Kinds and counts; sums over mesh axes of length 1 move nothing."""
    text = jax.jit(function).lower(*args).compile().as_text()
    found, _ = hlo.collectives(text, dict(layout.mesh.shape))
    real = [each for each in found if each.group > 1]
    return dict(collections.Counter(each.kind for each in real for _ in range(each.count)))


@pytest.mark.parametrize(
    "strategy, waves, expected",
    [
        # Counts of rows; then tokens, their weights, and results.
        ("train", 1, {"all-gather": 1, "all-to-all": 3}),
        ("train", 2, {"all-gather": 2, "all-to-all": 6}),
        # Tokens, choices and weights; results.
        ("decode", 1, {"all-gather": 3, "reduce-scatter": 1}),
        ("decode_long", 1, {"all-reduce": 1}),
    ],
)
def test_collectives(strategy, waves, expected):
    layout = routing.layout_on(strategy, expert=8, waves=waves)
    assert collectives(layout, routing.routed(layout), *specs()) == expected


def test_collectives_of_the_gradient():
    """Each exchange once more, the other way; nothing of a weight's size."""
    layout = routing.layout_on("train", expert=8)

    def run(x, weights, chosen, *stacks):
        function = routing.routed(layout)
        y, pull = jax.vjp(lambda x, w, *s: function(x, w, chosen, *s), x, weights, *stacks)
        return y, pull(y)

    assert collectives(layout, run, *specs()) == {"all-gather": 1, "all-to-all": 6}


@pytest.mark.parametrize("kind", ("fp8", "fp4"))
@pytest.mark.parametrize("strategy", ("train", "decode"))
def test_stored_experts_stay_stored(kind, strategy):
    """Only rows travel, in the activations' type; no byte of an FP8 or FP4 weight does."""
    x, weights, *stacks = routing.arrays(width=64, hidden=32)
    quantize = {"fp8": quant.quantize_fp8, "fp4": quant.quantize_fp4}[kind]
    stacks = [quantize(w) for w in stacks]
    chosen = jnp.asarray(routing.routings()["random"], jnp.int32)
    layout = routing.layout_on(strategy, expert=8)
    program = jax.jit(routing.routed(layout)).lower(x, weights, chosen, *stacks).compile()
    moves = [
        line
        for line in program.as_text().splitlines()
        if any(f" {kind}(" in line or f" {kind}-start(" in line for kind in hlo.KINDS)
    ]
    assert moves and not any("u8[" in line or "f8e4m3fn[" in line for line in moves)
    expected = routing.routed(Layout())(x, weights, chosen, *stacks)
    found = program(x, weights, chosen, *stacks)
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(jnp.abs(expected).max()))


def test_rows_travel_in_the_activations_type():
    layout = routing.layout_on("train", expert=8)
    jaxpr = str(jax.make_jaxpr(routing.routed(layout))(*specs("bfloat16")))
    sent = [line for line in jaxpr.splitlines() if "all_to_all[" in line and "ragged" not in line]
    width = f",{routing.WIDTH}]"
    wide = [line for line in sent if width in line.split("=")[0]]
    assert len(wide) == 2 and all("bf16[" in line for line in wide)


def test_one_device_has_no_collective_and_no_mask():
    text = jax.jit(routing.routed(Layout())).lower(*specs()).as_text()
    assert not any(kind.replace("-", "_") in text for kind in hlo.KINDS)


def test_kernels_on_rows_past_the_last_group():
    """The interpreted kernels leave rows without an expert alone, and no gradient comes of them."""
    from v4jax.kernels.grouped_matmul import api

    x, weights, *stacks = routing.arrays(tokens=24, width=32, hidden=16, experts=4, choices=1)
    sizes = jnp.asarray([3, 0, 9, 0], jnp.int32)
    own = (jnp.arange(24) < 12)[:, None]

    def run(kernels, x, gate, *stacks):
        y = api.expert_ffn(
            jnp.where(own, x, 0), gate, sizes, *stacks, limit=10.0, implementation=kernels
        )
        return jnp.where(own, y, 0.0)

    def gradients(kernels):
        y, pull = jax.vjp(functools.partial(run, kernels), x, weights[:, 0], *stacks)
        dx, dgate, *dstacks = pull(jnp.ones_like(y))
        return y, dx, dgate[:12], dstacks

    expected = gradients("reference")
    for kernels in ("xla", "pallas_tpu", "pallas_gpu"):
        found = gradients(kernels)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max())),
            found,
            expected,
        )
