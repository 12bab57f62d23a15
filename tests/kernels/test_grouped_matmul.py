"""Grouped experts against every expert on every row, with gradients and stored weights."""

import dataclasses
import functools
import itertools
import json

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from tests.support.selection import first
from v4jax import quant
from v4jax.kernels.grouped_matmul import api, cases, formats, work_items
from v4jax.kernels.grouped_matmul.cases import GROUPS, REAL, ROWS, specs
from v4jax.kernels.grouped_matmul.gpu import matmul as pallas_gpu
from v4jax.kernels.grouped_matmul.gpu.tiles import plan as plan_gpu
from v4jax.kernels.grouped_matmul.tpu import matmul as pallas_tpu
from v4jax.kernels.grouped_matmul.tpu.tiles import plan as plan_tpu
from v4jax.kernels.quantized_matmul import api as quantized_matmul

FLOAT32, BFLOAT16 = api.Rounding(), api.Rounding("bfloat16")
IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")
KERNELS = IMPLEMENTATIONS[1:]
STORED = {
    "fp4": quant.quantize_fp4,
    "fp8": quant.quantize_fp8,
    "fp8_float_scales": lambda w: quant.quantize_fp8(w, scale_dtype="float32"),
}
# At these, (512, 256) has several tiles of columns and several chunks of the contracted axis.
SMALL_BLOCKS = {
    "v5p": {"grouped_matmul": {"rows": 32, "columns": 128, "depth": 256}},
    "h100": {"grouped_matmul": {"rows": 32, "columns": 128, "depth": 64}},
}


@pytest.fixture(scope="module", autouse=True)
def small_blocks(tmp_path_factory):
    path = tmp_path_factory.mktemp("blocks") / "blocks.json"
    path.write_text(json.dumps(SMALL_BLOCKS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("V4JAX_BLOCKS", str(path))
        yield


@functools.cache
def inputs(*args, **options):
    """By one program; not to be changed."""
    return jax.jit(lambda: cases.inputs(*args, **options))()


@functools.cache
def compiled(implementation, rounding, limit, frozen):
    """The result, and gradients of x, gate and (unless frozen) weights through a sine of it."""

    def loss(x, gate, weights, sizes):
        y = api.expert_ffn(
            x, gate, sizes, *weights, limit=limit, rounding=rounding, implementation=implementation
        )
        return jnp.sum(jnp.sin(3 * y.astype(jnp.float32))), y

    grad = jax.value_and_grad(loss, argnums=(0, 1) if frozen else (0, 1, 2), has_aux=True)
    return jax.jit(grad)


def run(args, implementation, limit=0.3, rounding=FLOAT32, frozen=False):
    (_, y), grads = compiled(implementation, rounding, limit, frozen)(*args)
    return [y, *jax.tree.leaves(grads)]


def assert_close(ours, wanted, tolerance=1e-5):
    for value, expected in zip(ours, wanted, strict=True):
        expected = np.asarray(expected, np.float32)
        size = max(float(np.abs(expected).max(initial=0)), 1)
        np.testing.assert_allclose(
            np.asarray(value, np.float32), expected, atol=tolerance * size, rtol=tolerance
        )


@functools.partial(jax.jit, static_argnums=1)
def store(weights, kind):
    return tuple(jax.vmap(STORED[kind])(w) for w in weights)


@jax.jit
def expanded(stored):
    return tuple(w.dequantize(jnp.float32) for w in stored)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("groups", GROUPS)
def test_forward_and_gradients(groups, implementation):
    args = inputs(GROUPS[groups], 512, 256, rows=ROWS)
    check(args, GROUPS[groups], implementation)


def check(args, sizes, implementation):
    """What rows behind the last group give is anything, and reaches no weight's gradient."""
    (*ours, dw1, dw2, dw3), (*wanted, a, b, c) = run(args, implementation), run(args, "reference")
    rows = sum(sizes)
    assert_close([x[:rows] for x in ours], [x[:rows] for x in wanted])
    assert_close([dw1, dw2, dw3], [a, b, c])
    for dweight in (dw1, dw2, dw3):
        assert np.all(np.asarray(dweight)[np.asarray(sizes) == 0] == 0)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@hypothesis.given(data=strategies.data())
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_groups(implementation, data):
    """Groups of any sizes, rows behind the last, one expert alone, as few rows as a decode step."""
    rows, experts = data.draw(strategies.sampled_from([(ROWS, 6), (40, 1), (5, 6), (9, 12)]))
    cuts = strategies.lists(
        strategies.integers(0, rows), min_size=experts, max_size=experts, unique=False
    )
    ends = np.sort(data.draw(cuts))
    if data.draw(strategies.booleans()):
        ends[-1] = rows
    sizes = tuple(int(n) for n in np.diff(ends, prepend=0))
    check(inputs(sizes, 64, 32, rows=rows), sizes, implementation)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("d, f", first([(200, 144)], [(32, 16), (200, 144)]))
def test_sizes_that_no_tile_divides(d, f, implementation):
    args = inputs(GROUPS["skewed"], d, f)
    assert_close(run(args, implementation), run(args, "reference"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_within_twice_the_references_own_error(implementation):
    x, gate, weights, sizes = inputs(GROUPS["skewed"], 512, 256, dtype="bfloat16")
    # Far from the clamp: a value rounded across it would swamp every other error.
    args = (x, gate, tuple(w / 8 for w in weights), sizes)
    exact = run(jax.tree.map(_widen, args), "reference", limit=10.0)
    reference = run(args, "reference", limit=10.0, rounding=BFLOAT16)
    ours = run(args, implementation, limit=10.0, rounding=BFLOAT16)
    for mine, theirs, true in zip(ours, reference, exact, strict=True):
        assert mine.dtype == theirs.dtype
        allowed = 2 * np.abs(np.asarray(theirs, np.float32) - true).max()
        assert np.abs(np.asarray(mine, np.float32) - true).max() <= allowed


def _widen(x):
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_is_zero_where_the_clamp_bites(implementation):
    x = jnp.full((1, 32), 5.0)
    w = jnp.ones((1, 32, 32))

    @jax.jit
    @jax.grad
    def gradient(x):
        return api.expert_ffn(
            x, jnp.ones(1), jnp.array([1]), w, w, w, limit=1.0, implementation=implementation
        ).sum()

    assert np.all(np.asarray(gradient(x)) == 0)


# All for plain XLA; for the Pallas kernels one set of groups, scales in float32 on a TPU alone.
STORED_SWEEP = list(itertools.product(["empty_groups", "skewed"], STORED, IMPLEMENTATIONS))
STORED_QUICK = [
    row
    for row in STORED_SWEEP
    if row[2] == "xla" or (row[0] == "empty_groups" and row[1:] != ("fp8_float_scales", KERNELS[1]))
]


@pytest.mark.parametrize("groups, kind, implementation", first(STORED_QUICK, STORED_SWEEP))
def test_stored_weights_equal_their_expansion(groups, kind, implementation):
    x, gate, weights, sizes = inputs(GROUPS[groups], 512, 256)
    stored = store(weights, kind)
    ours = run((x, gate, stored, sizes), implementation, frozen=True)
    assert_close(ours, run((x, gate, expanded(stored), sizes), "reference", frozen=True))


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("kind", first(["fp4"], ["fp4", "fp8"]))
def test_native_rounding_equals_plain_xla(kind, implementation):
    x, gate, weights, sizes = inputs(GROUPS["skewed"], 512, 256)
    args = (x.astype("bfloat16"), gate, store(weights, kind), sizes)
    rounding = api.Rounding("bfloat16", native=True)
    ours = run(args, implementation, rounding=rounding, frozen=True)
    # Sums in another order end up on the neighbouring bfloat16 now and then.
    assert_close(ours, run(args, "xla", rounding=rounding, frozen=True), 2**-7)


@pytest.mark.parametrize("implementation", KERNELS)
def test_every_fp4_code_and_the_extreme_scales(implementation):
    """One row of ones, a matrix whose 16 x 2 columns hold every code at scales 2^-127 and 2^113."""
    codes = jnp.tile(jnp.arange(16, dtype=jnp.uint8)[:, None], (2, 16)) * 17
    scales = jnp.repeat(jnp.array([0, 240], jnp.uint8), 16)[:, None]
    w = quant.QTensor(codes[None], scales[None])
    expanded = w.dequantize(jnp.float32)
    x = jnp.zeros((1, 32)).at[0, 3].set(1.0)
    module, plan = {"pallas_tpu": (pallas_tpu, plan_tpu), "pallas_gpu": (pallas_gpu, plan_gpu)}[
        implementation
    ]
    sizes = plan(x, (w, w, w), FLOAT32)
    one = jnp.array([1], jnp.int32)
    product = module._Kernels(one, 1.0, "float32", sizes, interpret=True).down(x, w)
    np.testing.assert_array_equal(product, x @ expanded[0].T)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("tile", [16, 64])
def test_items_cover_every_row_once(groups, tile):
    sizes = np.asarray(GROUPS[groups])
    owner = np.repeat(np.arange(len(sizes)), sizes)
    work = work_items.tiles(jnp.asarray(sizes), ROWS, tile)
    seen = np.full(len(owner), -1)
    for item in range(int(work.count_1[0])):
        rows = np.arange(int(work.tile_I[item]) * tile, int(work.tile_I[item] + 1) * tile)
        rows = rows[(rows >= int(work.begin_I[item])) & (rows < int(work.end_I[item]))]
        assert np.all(seen[rows] == -1)
        seen[rows] = int(work.group_I[item])
    np.testing.assert_array_equal(seen, owner)
    assert np.all(np.diff(work.tile_I) >= 0)

    runs = work_items.runs(jnp.asarray(sizes), ROWS, tile)
    seen = np.full(len(owner), -1)
    for group, begin, end in zip(*(np.asarray(t) for t in runs), strict=True):
        rows = np.arange(begin, max(begin, min(begin + tile, end)))
        assert np.all(seen[rows] == -1)
        seen[rows] = group
    np.testing.assert_array_equal(seen, owner)


def test_refusals():
    x, gate, weights, sizes = inputs((3, 2), 32, 32)
    mixed = (weights[0], *store(tuple(weights[1:]), "fp4"))
    with pytest.raises(NotImplementedError, match="expected one form"):
        run((x, gate, mixed, sizes), "pallas_tpu", frozen=True)
    half = tuple(w.astype(jnp.float16) for w in weights)
    with pytest.raises(NotImplementedError, match="w1 is float16"):
        run((x, gate, half, sizes), "pallas_gpu", frozen=True)
    with pytest.raises(NotImplementedError, match="no implementation 'cuda'"):
        run((x, gate, weights, sizes), "cuda")
    wide = tuple(jax.ShapeDtypeStruct(s, "float32") for s in [(1, 8, 10**6), (1, 10**6, 8)] * 2)
    with pytest.raises(NotImplementedError, match="bytes of VMEM"):
        jax.eval_shape(
            lambda x, *w: api.expert_ffn(
                x, gate[:1], sizes[:1], *w, limit=1.0, implementation="pallas_tpu"
            ),
            jax.ShapeDtypeStruct((1, 10**6), "float32"),
            *wide[:3],
        )


def test_what_a_gpus_offsets_reach():
    """Pro's FP4 experts as words; half of its FP8 experts are just what 32 bits do not reach."""
    half = dataclasses.replace(REAL["pro"], experts=192)
    assert pallas_gpu.refuse(*specs(REAL["pro"], "fp4"), BFLOAT16) is None
    assert pallas_gpu.refuse(*specs(REAL["pro"], "fp8"), BFLOAT16) is None
    assert "offsets reach" in pallas_gpu.refuse(*specs(half, "fp8"), BFLOAT16)


def test_operands_are_bfloat16_where_that_is_exact():
    weights = inputs((1,), 32, 32)[2]
    native = api.Rounding("bfloat16", native=True)
    assert formats.operand_dtype(store(weights, "fp4"), native) == "bfloat16"
    assert formats.operand_dtype(store(weights, "fp8_float_scales"), native) == "float32"
    assert formats.operand_dtype(weights, native) == "float32"
    assert formats.operand_dtype(weights, api.Rounding("bfloat16")) == "bfloat16"


@pytest.mark.parametrize("shape", [(256, 128), (384, 256), (200, 96), (512, 64)])
def test_stored_matrix_in_blocks(shape, monkeypatch):
    monkeypatch.setattr(quantized_matmul, "BLOCK_ELEMENTS", 128 * 128)
    w = quant.quantize_fp8(jax.random.normal(jax.random.key(0), shape))
    x = jax.random.normal(jax.random.key(1), (2, 3, shape[1]))
    ours = quantized_matmul.einsum("btd,fd->btf", x, w)
    np.testing.assert_allclose(ours, x @ w.dequantize(jnp.float32).T, atol=1e-4, rtol=1e-5)


def test_stored_groups():
    w = quant.quantize_fp8(jax.random.normal(jax.random.key(0), (256, 64)))
    grouped = jax.tree.map(lambda leaf: leaf.reshape(2, -1, leaf.shape[-1]), w)
    x = jax.random.normal(jax.random.key(1), (2, 3, 2, 64))
    ours = quantized_matmul.einsum("btgx,gox->btgo", x, grouped)
    wanted = jnp.einsum("btgx,gox->btgo", x, w.dequantize(jnp.float32).reshape(2, 128, 64))
    np.testing.assert_allclose(ours, wanted, atol=1e-4, rtol=1e-5)
