"""Shapes of the indexer: small odd ones for numerics, the released sizes for compilation."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from v4jax.kernels import packed_rows


@dataclasses.dataclass(frozen=True)
class Case:
    """B sequences of T queries whose first token is number `hidden`, C entries, topk of them.

    documents: lengths of the documents packed in each row, the rest of a row one more; `hidden`
    does not go with it, and there are as many entries as the fullest row has, at least C. reverse:
    their entries stand in the opposite order, so that ranges decrease along a row.
    """

    length: int
    entries: int
    topk: int
    hidden: int = 0
    batch: int = 2
    heads: int = 4
    width: int = 8
    documents: tuple[tuple[int, ...], ...] = ()
    reverse: bool = False


NUMERICS = {
    "few_entries": Case(length=9, entries=5, topk=3),
    "one_entry": Case(length=9, entries=1, topk=1),
    "one_choice": Case(length=33, entries=40, topk=1),
    "all_of_them": Case(length=20, entries=12, topk=99),
    "several_blocks": Case(length=300, entries=75, topk=12),
    "several_tiles": Case(length=3, entries=2300, topk=100, hidden=9000),
    "one_query": Case(length=1, entries=700, topk=64, hidden=2000),
    "two_queries": Case(length=2, entries=4200, topk=70, hidden=17000, heads=2),
    "odd_heads": Case(length=19, entries=130, topk=33, hidden=400, heads=3, width=24),
    "long_tile": Case(length=3, entries=9000, topk=70, hidden=36000, batch=1, heads=2),
    "long_decode": Case(length=1, entries=40000, topk=60, hidden=160000, batch=1, heads=2),
    "packed": Case(300, 1, 5, documents=((90, 7, 120), (1, 130, *(3,) * 20, 100))),
    "packed_short": Case(90, 1, 3, documents=((3,) * 29, (2, 5, 1, 1, 40))),
    "packed_reversed": Case(150, 1, 6, documents=((40, 60), (9, 30, 2)), reverse=True),
}

# What the released models ask for: 64 index heads of 128 channels; topk 512 (Flash), 1024 (Pro).
_RELEASED = {"heads": 64, "width": 128, "batch": 1}
RELEASED = {
    f"{name}_{shape}": dataclasses.replace(case, topk=topk)
    for name, topk in (("flash", 512), ("pro", 1024))
    for shape, case in {
        "prefill_4k": Case(4096, 1024, topk, **_RELEASED),
        "prefill_64k": Case(4096, 16384, topk, 61440, **_RELEASED),
        "prefill_1m": Case(4096, 262144, topk, 1044480, **_RELEASED),
        "decode_1m": Case(1, 262144, topk, 1048575, **_RELEASED | {"batch": 64}),
    }.items()
}
# The losses' blocks of queries.
TRAINING = {
    "block_4k": Case(512, 1024, 512, **_RELEASED),
    "block_64k": Case(256, 16384, 512, **_RELEASED),
    "block_1m": Case(256, 262144, 1024, **_RELEASED),
}


def arguments(case: Case, dtype=jnp.float32, rounded: bool = False):
    """q, weight, keys, low, high of a case; `rounded`: on a coarse grid, where ties are common."""
    random = np.random.default_rng(case.length)
    q = random.standard_normal((case.batch, case.length, case.heads, case.width))
    weight = random.standard_normal((case.batch, case.length, case.heads))
    low, high, entries = _packed(case) if case.documents else _plain(case)
    index_keys = random.standard_normal((case.batch, entries, case.width))
    if rounded:
        q, weight, index_keys = np.round(q), np.round(weight), np.round(index_keys)
    arrays = (jnp.asarray(x, dtype) for x in (q, weight, index_keys))
    return *arrays, jnp.asarray(low, jnp.int32), jnp.asarray(high, jnp.int32)


def _plain(case):
    """low, high [B,T] and the number of entries, of a document a row."""
    position = case.hidden + np.arange(case.length)[None]
    high = np.minimum((position + 1) // 4, case.entries)
    high = np.broadcast_to(high, (case.batch, case.length))
    # Every other sequence starts later, as packed documents do.
    low = np.where(np.arange(case.batch)[:, None] % 2 == 1, high // 3, 0)
    return low, high, case.entries


def _packed(case):
    """The same of rows that hold several documents."""
    _, low, high, entries = packed_rows.ranges(case.documents, case.length, 4, case.reverse)
    return low, high, max(entries, case.entries)


def specs(case: Case, dtype=jnp.bfloat16):
    """Shapes and types of `arguments`."""
    queries = (case.batch, case.length)
    return (
        ((*queries, case.heads, case.width), dtype),
        ((*queries, case.heads), dtype),
        ((case.batch, case.entries, case.width), dtype),
        (queries, jnp.int32),
        (queries, jnp.int32),
    )
