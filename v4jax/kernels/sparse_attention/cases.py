"""Shapes of sparse attention: small ones that try every edge, and those of the released models."""

import dataclasses

import jax
import jax.numpy as jnp

from v4jax.kernels import packed_rows


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `hidden` tokens and `older` window rows stand before the first query.

    choices: entries that a query chooses (0: it sees all visible ones). equal: all keys the same,
    so that every score ties. documents: lengths of the documents packed in each row of the batch,
    in order, the rest of a row one more; `hidden` and `older` do not go with it, and there are as
    many entries as the rows' blocks, at least `entries`. reverse: the ranges of entries stand in
    the order of the documents reversed, so that they decrease from one document to the next.
    """

    length: int
    window: int
    entries: int
    ratio: int = 4
    older: int = 0
    hidden: int = 0
    choices: int = 0
    heads: int = 3
    width: int = 16
    batch: int = 2
    equal: bool = False
    documents: tuple[tuple[int, ...], ...] = ()
    reverse: bool = False


SMALL = {
    "window_only": Case(37, 9, 0),
    "window_with_older_rows": Case(5, 9, 0, older=8),
    "few_older_rows": Case(150, 64, 0, older=3),
    "every_entry": Case(300, 24, 75),
    "several_tiles": Case(270, 8, 1100, ratio=1, hidden=830),
    "one_entry": Case(6, 3, 1),
    "chosen_masked": Case(140, 16, 35, choices=10),
    "chosen_gathered": Case(260, 16, 65, choices=6),
    "one_query": Case(1, 16, 90, choices=7, older=15),
    "no_window": Case(140, 0, 140, ratio=1),
    "no_visible_entry": Case(3, 5, 7, choices=2),
    "all_entries_chosen": Case(40, 8, 10, choices=10),
    "equal_scores": Case(33, 8, 8, choices=3, equal=True),
    "many_heads": Case(9, 8, 20, hidden=71, choices=5, heads=20),
    # Tiles of queries that see no entry lie between those that do.
    "packed": Case(600, 24, 1, ratio=128, documents=((200, 200), (1, 130, 40, 300))),
    "packed_short": Case(90, 8, 1, documents=((3,) * 29, (2, 5, 1, 1, 40))),
    "packed_chosen": Case(130, 8, 1, choices=3, documents=((50, 7), (2, 1, 90, 3))),
    "packed_reversed": Case(150, 8, 1, documents=((40, 60), (9, 30, 2)), reverse=True),
    # Entries of one document in several tiles, many documents' in one, tiles without any between.
    "packed_tiles": Case(700, 8, 1, ratio=2, documents=((290, *(1,) * 90, 40), (3, 690))),
    "packed_tiny": Case(2000, 8, 1, documents=((1, 2, 3, 4) * 200, (5, 4) * 222), heads=1),
    "packed_unseen": Case(90, 8, 3, ratio=128, documents=((30, 60), (1,) * 90)),
}

# Heads, head width, choices and window of the released models.
FLASH = {"window": 128, "heads": 64, "width": 512, "batch": 1}
PRO = {"window": 128, "heads": 128, "width": 512, "batch": 1}


def _real(model, topk):
    decode = model | {"batch": 4}
    return {
        "csa_prefill_4k": Case(4096, entries=1024, choices=topk, **model),
        "csa_prefill_4k_of_64k": Case(4096, entries=16384, choices=topk, hidden=61440, **model),
        "hca_prefill_4k_of_64k": Case(4096, entries=512, ratio=128, hidden=61440, **model),
        "hca_prefill_4k_of_1m": Case(4096, entries=8192, ratio=128, hidden=1044480, **model),
        "window_4k": Case(4096, entries=0, **model),
        "csa_decode_64k": Case(1, entries=16384, choices=topk, hidden=65535, **decode),
        "csa_decode_1m": Case(1, entries=262144, choices=topk, hidden=1048575, **decode),
    }


REAL = {
    f"{name}_{case}": value
    for name, model, topk in (("flash", FLASH, 512), ("pro", PRO, 1024))
    for case, value in _real(model, topk).items()
}


def make(case: Case, dtype=jnp.float32, seed: int = 0) -> tuple[dict, dict]:
    """Random arguments of api.sparse_attention: those that are differentiated, and the others."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def normal(*shape):
        return jax.random.normal(next(keys), shape).astype(dtype)

    batch, length = case.batch, case.length
    if case.documents:
        first, low, high, entries = _packed(case)
    else:
        first, low, high, entries = _plain(case)
    diff = {"q_BTNH": normal(batch, length, case.heads, case.width)}
    diff["sink_N"] = jax.random.normal(next(keys), (case.heads,))
    other = {"scale": case.width**-0.5, "window": case.window}
    if case.window:
        diff["window_BSH"] = normal(batch, case.older + length, case.width)
        other["first_BT"] = first
    if entries:
        diff["entries_BCH"] = normal(batch, entries, case.width)
        if case.equal:
            diff["entries_BCH"] = jnp.ones_like(diff["entries_BCH"])
        other |= {"low_BT": low, "high_BT": high}
        if case.choices:
            other["chosen_BTK"] = _choose(next(keys), low, high, entries, case.choices)
    return diff, other


def _plain(case):
    """first, low, high [B,T] and the number of entries, of a document a row."""
    shape = (case.batch, case.length)
    position = case.hidden + jnp.broadcast_to(jnp.arange(case.length)[None], shape)
    # The last row of the batch may see fewer of the older rows.
    first = jnp.where(jnp.arange(case.batch) == 0, 0, min(case.older, 2))
    high = jnp.minimum((position + 1) // case.ratio, case.entries)
    low = jnp.where(jnp.arange(case.batch)[:, None] == 1, jnp.minimum(high, 2), 0)
    return jnp.broadcast_to(first[:, None], shape), low, high, case.entries


def _packed(case):
    """The same of rows that hold several documents, whose entries stand in one list."""
    *places, entries = packed_rows.ranges(case.documents, case.length, case.ratio, case.reverse)
    return *map(jnp.asarray, places), max(entries, case.entries)


def specs(case: Case, dtype=jnp.bfloat16) -> tuple[dict, dict]:
    """The same arguments as shapes only; scale and window stay numbers."""
    diff, other = jax.eval_shape(lambda: _arrays_only(make(case, dtype)))
    return diff, other


def _arrays_only(arguments):
    diff, other = arguments
    return diff, {name: x for name, x in other.items() if name not in ("scale", "window")}


def _choose(key, low, high, entries, choices):
    """Random distinct visible entries in ascending order, -1 where there are fewer."""
    order = jax.random.uniform(key, (*low.shape, entries))
    entry = jnp.arange(entries)[None, None]
    visible = (entry >= low[..., None]) & (entry < high[..., None])
    picked = jnp.argsort(jnp.where(visible, order, 2.0), axis=-1)[..., :choices]
    count = (high - low)[..., None]
    picked = jnp.where(jnp.arange(picked.shape[-1])[None, None] < count, picked, entries)
    picked = jnp.sort(picked, axis=-1)
    return jnp.where(picked == entries, -1, picked).astype(jnp.int32)
