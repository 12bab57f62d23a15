"""Benchmarks of the kernels: real shapes, with the FLOPs and bytes that each needs at least.

`tools/bench_kernels.py` times them next to their rivals, `v4jax tune` under candidate block sizes.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from v4jax import block_sizes, quant
from v4jax.kernels.grouped_matmul import api as grouped_matmul
from v4jax.kernels.grouped_matmul import cases as grouped_cases
from v4jax.kernels.hyper_connections import api as hyper_connections
from v4jax.kernels.hyper_connections import cases as mixing_cases
from v4jax.kernels.indexer_topk import api as indexer_topk
from v4jax.kernels.indexer_topk import cases as indexer_cases
from v4jax.kernels.indexer_topk import stored_keys
from v4jax.kernels.sparse_attention import api as sparse_attention
from v4jax.kernels.sparse_attention import cases as attention_cases
from v4jax.kernels.sparse_attention import entries, stored

BF16 = 2
# Bytes of an entry and of an index key as they are stored.
ENTRY_BYTES = block_sizes.kv_row_bytes(stored.WIDTH, stored.ROPE)
KEY_BYTES = block_sizes.index_key_bytes(stored_keys.WIDTH)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One operation at one shape.

    Attributes:
      op: the kernel's folder.
      run: (implementation) -> a function of `arguments()`.
      flops, bytes: what the operation needs at least.
      target: the wanted fraction of the floor, which is the longer of the bytes' and the FLOPs'.
    """

    name: str
    op: str
    run: Callable
    arguments: Callable
    flops: int | float
    bytes: int | float
    target: float


def measurements(tiny: bool = False) -> list[Measurement]:
    """All measurements; `tiny` shrinks them to what a CPU does in seconds."""
    return [*_attention(tiny), *_experts(tiny), *_indexer(tiny), *_mixing(tiny)]


def _attention(tiny):
    prefill = attention_cases.REAL["flash_csa_prefill_4k_of_64k"]
    decode = dataclasses.replace(attention_cases.REAL["flash_csa_decode_1m"], batch=64)
    if tiny:
        prefill = attention_cases.SMALL["chosen_masked"]
        decode = dataclasses.replace(attention_cases.SMALL["one_query"], width=stored.WIDTH)
    work = {}
    for case in (prefill, decode):
        pairs = case.batch * case.length * (case.window + case.choices) * case.heads
        rows = case.batch * case.length * (2 * case.heads + case.window + case.choices)
        work[case] = 4 * pairs * case.width, rows * case.width * BF16
    # A prefill's rows are shared by its queries: q and out once, keys once.
    shared = 2 * prefill.length * prefill.heads + prefill.length + prefill.entries
    prefill_bytes = prefill.batch * shared * prefill.width * BF16

    def forward(case):
        def run(implementation):
            return lambda diff, other: sparse_attention.sparse_attention(
                **diff, **other, **_static(case), implementation=implementation
            )

        return run

    def backward(implementation):
        def run(diff, other):
            out, pull = jax.vjp(lambda d: forward(prefill)(implementation)(d, other), diff)
            return pull(out)

        return run

    def arguments(case, form=None):
        return jax.jit(functools.partial(_attention_arguments, case, form))

    flops = work[prefill][0]
    decode_flops, decode_bytes = work[decode]
    saved = decode.batch * decode.choices * (decode.width * BF16 - ENTRY_BYTES)
    return [
        Measurement(
            "sparse prefill forward",
            "sparse_attention",
            forward(prefill),
            arguments(prefill),
            flops,
            prefill_bytes,
            0.45,
        ),
        Measurement(
            "sparse prefill forward + backward",
            "sparse_attention",
            backward,
            arguments(prefill),
            3.5 * flops,
            3 * prefill_bytes,
            1 / (1 / 3.5 / 0.45 + 2.5 / 3.5 / 0.30),
        ),
        Measurement(
            "sparse decode, batch 64, 1M",
            "sparse_attention",
            forward(decode),
            arguments(decode, entries.in_lanes),
            decode_flops,
            decode_bytes,
            0.60,
        ),
        Measurement(
            "sparse decode, batch 64, 1M, stored rows",
            "sparse_attention",
            forward(decode),
            arguments(decode, stored.pack),
            decode_flops,
            decode_bytes - saved,
            0.60,
        ),
    ]


def _static(case):
    return {"scale": case.width**-0.5, "window": case.window}


def _attention_arguments(case, form=None):
    """form: what a cache keeps the entries as, where not as rows."""
    diff, other = attention_cases.make(case, jnp.bfloat16)
    diff["entries_BCH"] = _in_form(form, diff["entries_BCH"])
    return diff, {name: x for name, x in other.items() if name not in ("scale", "window")}


def _in_form(form, rows):
    """Made a sequence at a time, for it passes through float32."""
    if form is None:
        return rows
    return jax.lax.map(lambda one: jax.tree.map(lambda x: x[0], form(one[None])), rows)


def _experts(tiny):
    prefill, decode = grouped_cases.REAL["flash"], grouped_cases.REAL["flash_decode"]
    if tiny:
        prefill = grouped_cases.Case(rows=96, experts=4, d=128, f=128)
        decode = grouped_cases.Case(rows=12, experts=4, d=128, f=128)

    def run(implementation):
        def ffn(x, gate, groups, weights):
            rounding = grouped_matmul.Rounding("bfloat16")
            return grouped_matmul.expert_ffn(
                x, gate, groups, *weights, limit=10.0, rounding=rounding,
                implementation=implementation,
            )  # fmt: skip

        return ffn

    def arguments(case, kind):
        return jax.jit(functools.partial(_expert_arguments, case, kind))

    weights = 3 * prefill.d * prefill.f
    return [
        Measurement(
            "experts prefill, bf16",
            "grouped_matmul",
            run,
            arguments(prefill, "bfloat16"),
            2 * prefill.rows * weights,
            prefill.experts * weights * BF16,
            0.60,
        ),
        Measurement(
            "experts decode, FP4",
            "grouped_matmul",
            run,
            arguments(decode, "fp4"),
            2 * decode.rows * weights,
            min(decode.rows, decode.experts) * weights * (0.5 + 1 / 32),
            0.60,
        ),
    ]


def _expert_arguments(case, kind):
    """Random rows, spread over the experts as evenly as they divide."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    x = jax.random.normal(next(keys), (case.rows, case.d), jnp.bfloat16)
    base, extra = divmod(case.rows, case.experts)
    groups = base + (jnp.arange(case.experts) < extra).astype(jnp.int32)

    def weight(out, features):
        shape = (case.experts, out, features)
        if kind == "bfloat16":
            return 0.02 * jax.random.normal(next(keys), shape, jnp.bfloat16)
        packed = jax.random.bits(next(keys), (*shape[:2], features // 2), jnp.uint8)
        return quant.QTensor(packed, jnp.full((*shape[:2], features // 32), 121, jnp.uint8))

    weights = (weight(case.f, case.d), weight(case.d, case.f), weight(case.f, case.d))
    return x, jnp.ones(case.rows, jnp.float32), groups, weights


def _indexer(tiny):
    prefill = indexer_cases.RELEASED["flash_prefill_1m"]
    decode = indexer_cases.RELEASED["flash_decode_1m"]
    if tiny:
        prefill = indexer_cases.NUMERICS["several_blocks"]
        decode = indexer_cases.NUMERICS["one_query"]
        decode = dataclasses.replace(decode, width=stored_keys.WIDTH)

    def run(case):
        def by_name(implementation):
            return lambda *arrays: indexer_topk.indexer_member(
                *arrays, case.topk, implementation=implementation
            )

        return by_name

    def measurement(name, case, form=None):
        queries = case.batch * case.length * case.heads
        key_bytes = KEY_BYTES if form else case.width * BF16
        read = case.batch * case.entries * key_bytes + queries * case.width * BF16
        arguments = jax.jit(functools.partial(_indexer_arguments, case, form))
        flops = 2 * queries * case.width * case.entries
        return Measurement(name, "indexer_topk", run(case), arguments, flops, read, 0.50)

    decoding = "indexer decode, batch 64, 1M"
    return [
        measurement("indexer prefill 4K of 1M", prefill),
        measurement(decoding, decode),
        measurement(f"{decoding}, stored keys", decode, stored_keys.pack),
    ]


def _indexer_arguments(case, form=None):
    """form: what a cache keeps the keys as, where not as rows."""
    keys = iter(jax.random.split(jax.random.key(0), 3))
    queries = (case.batch, case.length)
    position = case.hidden + jnp.broadcast_to(jnp.arange(case.length)[None], queries)
    q = jax.random.normal(next(keys), (*queries, case.heads, case.width), jnp.bfloat16)
    weight = jax.random.normal(next(keys), (*queries, case.heads), jnp.bfloat16)
    rows = jax.random.normal(next(keys), (case.batch, case.entries, case.width), jnp.bfloat16)
    return (
        q,
        weight,
        _in_form(form, rows),
        jnp.zeros(queries, jnp.int32),
        jnp.minimum((position + 1) // 4, case.entries),
    )


def _mixing(tiny):
    case = mixing_cases.NUMERICS[0] if tiny else mixing_cases.FLASH
    tokens, m, d = case.batch * case.length, case.streams, case.channels

    def run(implementation):
        def pre_and_post(h, y, fn, base, scale):
            options = case.options | {"dtype": "bfloat16", "implementation": implementation}
            u, *mixing = hyper_connections.pre(h, fn, base, scale, **options)
            post = {"dtype": "bfloat16", "implementation": implementation}
            return u, hyper_connections.post(y, h, *mixing, **post)

        return pre_and_post

    def arguments():
        keys = iter(jax.random.split(jax.random.key(0), 4))
        h = jax.random.normal(next(keys), case.shape, jnp.bfloat16)
        y = jax.random.normal(next(keys), (case.batch, case.length, d), jnp.bfloat16)
        fn = 0.02 * jax.random.normal(next(keys), (case.rows, m * d))
        return h, y, fn, jnp.zeros(case.rows), jnp.full(3, 0.1)

    # pre reads the streams and writes u; post reads the streams and y and writes the streams.
    moved = tokens * d * (m + 1 + m + 1 + m) * BF16
    flops = 2 * tokens * case.rows * m * d
    return [
        Measurement(
            "mHC pre + post", "hyper_connections", run, jax.jit(arguments), flops, moved, 0.70
        )
    ]
