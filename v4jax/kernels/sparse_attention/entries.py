"""The forms in which a list of entries may come.

Rows [B,C,H]; the same rows in lanes, [B,C,H/128,128], single rows of which a TPU's DMA can address,
so that a decode step fetches them from the cache as it lies; `stored.StoredRows`; or
`compact.CompactRows`, of which kernels get `StoredRows`.
"""

import jax.numpy as jnp

from v4jax.kernels.sparse_attention import compact, stored
from v4jax.kernels.sparse_attention.compact import CompactRows
from v4jax.kernels.sparse_attention.stored import LANES, StoredRows


def lanes_of(width: int) -> tuple[int, ...]:
    """How a cache keeps rows that are fetched alone: in lanes, or whole if lanes would be padded.

    Two rows of lanes are the least that DMA can address in bf16.
    """
    return (width // LANES, LANES) if width % (2 * LANES) == 0 else (width,)


def in_lanes(rows_BCH):
    """[B,C,H/128,128] of rows [B,C,H]; on a TPU a copy, so a cache is kept in this form."""
    return rows_BCH.reshape(*rows_BCH.shape[:2], -1, LANES)


def as_rows(entries):
    """Rows in lanes as [B,C,H], which on a TPU copies them; other forms as they are."""
    if entries is None or entries.ndim != 4:
        return entries
    return entries.reshape(*entries.shape[:2], -1)


def expanded(entries):
    """Entries of any form as rows [B,C,H]."""
    if isinstance(entries, CompactRows):
        return compact.unpack(entries)
    if isinstance(entries, StoredRows):
        return stored.unpack(entries)
    return as_rows(entries)


def for_kernels(entries):
    """Entries in a form that TPU and GPU kernels take."""
    return compact.for_kernels(entries) if isinstance(entries, CompactRows) else entries


def take(entries, index):
    """Rows [B, ..., H] of a list of rows at index [B, ...]."""
    if isinstance(entries, StoredRows):
        return stored.take(entries, index)
    if isinstance(entries, CompactRows):
        return compact.take(entries, index)
    batch = jnp.arange(index.shape[0], dtype=jnp.int32).reshape(-1, *(1 for _ in index.shape[1:]))
    return entries[batch, index]


def check(entries, width):
    """Refuses a list whose rows are no keys of queries `width` wide."""
    if isinstance(entries, StoredRows | CompactRows) and width != entries.shape[-1]:
        raise NotImplementedError(
            f"sparse_attention: q's head width (h) is {width}; {type(entries).__name__} have "
            f"{entries.shape[-1]}"
        )
    if entries is None or entries.ndim != 4:
        return
    parts, lanes = entries.shape[2:]
    if lanes != LANES or parts * lanes != width:
        raise NotImplementedError(
            f"sparse_attention: entries in lanes end in {parts} x {lanes} and q's head width (h) "
            f"is {width}; supported: h / {LANES} x {LANES}"
        )
