"""Looks through stored tensors for values that no model should hold: NaN, infinity, a bad index."""

import itertools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from v4jax.parallel import run_all
from v4jax.safetensors_io import SafetensorsFolder

CHUNK = 1 << 22  # values looked at in one go, to bound memory

# Bits of the stored codes: all of `special` set means not finite; then a bit of `payload` set means
# NaN and none means infinity. E4M3 and E8M0 have no infinity.
_CODES = {
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),
    "F8_E5M2": (np.uint8, 0x7C, 0x03),
    "F8_E8M0": (np.uint8, 0xFF, 0xFF),
    "BF16": (np.uint16, 0x7F80, 0x007F),
    "F16": (np.uint16, 0x7C00, 0x03FF),
    "F32": (np.uint32, 0x7F800000, 0x007FFFFF),
    "F64": (np.uint64, 0x7FF0000000000000, 0x000FFFFFFFFFFFFF),
}


def find_bad_values(
    folder: SafetensorsFolder,
    keys: Iterable[str],
    num_experts: int,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> list[str]:
    """Reads every tensor of `keys` and names those with a bad value, one sentence each.

    Args:
      folder: an opened checkpoint; any of its stored dtypes.
      num_experts: hash tables (`...tid2eid`) must hold expert ids below it.
      progress: called with the number of bytes that were read.
    """

    def look_at(key):
        if key.endswith(".tid2eid"):
            finding = _bad_expert_ids(key, folder[key], num_experts)
        else:
            finding = _not_finite(key, folder[key], folder.entries[key].dtype)
        progress(folder.entries[key].nbytes)
        return finding

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [finding for finding in run_all(pool, look_at, keys) if finding]


def _not_finite(key, array, dtype):
    if dtype not in _CODES or not array.size:
        return None
    integer, special, payload = _CODES[dtype]
    codes = array.reshape(-1).view(integer)
    nans, infinities, first = 0, 0, None
    for start in range(0, codes.size, CHUNK):
        chunk = codes[start : start + CHUNK]
        bad = (chunk & integer(special)) == special
        if not bad.any():
            continue
        first = start + int(bad.argmax()) if first is None else first
        nan = int(np.count_nonzero(bad & ((chunk & integer(payload)) != 0)))
        nans, infinities = nans + nan, infinities + int(bad.sum()) - nan
    if first is None:
        return None
    counts = ((nans, "NaN"), (infinities, "infinite"))
    found = " and ".join(f"{count} {name}" for count, name in counts if count)
    return f"{key}: {found} of {codes.size} {dtype} values, first at {_place(first, array)}"


def _bad_expert_ids(key, table, num_experts):
    bad = (table < 0) | (table >= num_experts)
    if not bad.any():
        return None
    first = int(bad.argmax())
    return (
        f"{key}: {int(bad.sum())} expert ids outside 0..{num_experts - 1}, first "
        f"{int(table.reshape(-1)[first])} at {_place(first, table)}"
    )


def _place(flat, array):
    return list(itertools.chain(map(int, np.unravel_index(flat, array.shape))))
