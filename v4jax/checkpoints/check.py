"""Looks through stored tensors for values that no model should hold: NaN, infinity, a bad index."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from v4jax.errors import ChecksumError
from v4jax.files.threads import run_all
from v4jax.hf.tensors import TensorSpec

CHUNK = 1 << 22  # values looked at in one go, to bound memory

# Bits of the stored codes: all of the first mask set means not finite; then a bit of the second
# means NaN, and none infinity. E4M3 and E8M0 have no infinity. FP4 and integers are always finite.
_MASKS = {
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),
    "F8_E8M0": (np.uint8, 0xFF, 0xFF),
    "BF16": (np.uint16, 0x7F80, 0x007F),
    "F32": (np.uint32, 0x7F800000, 0x007FFFFF),
}


def find_bad_values(
    source,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> list[str]:
    """Reads every tensor of a checkpoint and names those with a bad value, one sentence each.

    Args:
      source: an opened checkpoint (see `source`).
      progress: called with the number of bytes that were read.
    """
    findings = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, specs in source.items.items():
            with source.open_item(name) as read:

                def look_at(spec, read=read):
                    tensor = np.empty(spec.shape, spec.dtype)
                    try:
                        read(spec.key, tensor)
                    except ChecksumError as error:
                        return str(error).removeprefix(f"{source.path}: ")
                    finally:
                        progress(spec.nbytes)
                    return bad_values(spec, tensor, source.config.n_routed_experts)

                found = run_all(pool, look_at, specs)
            pairs = zip(specs, found, strict=True)
            findings += [f"{source.key_in_file(spec.key)}: {text}" for spec, text in pairs if text]
    return findings


def bad_values(spec: TensorSpec, tensor: np.ndarray, num_experts: int) -> str | None:
    """What is wrong with a tensor's values; None if nothing is."""
    if spec.role == "table":
        return _bad_expert_ids(tensor, num_experts)
    if spec.dtypes[0] not in _MASKS:
        return None
    integer, special, payload = _MASKS[spec.dtypes[0]]
    codes = tensor.reshape(-1).view(integer)
    nans, infinities, first = 0, 0, None
    for start in range(0, codes.size, CHUNK):
        chunk = codes[start : start + CHUNK]
        bad = (chunk & integer(special)) == special
        if not bad.any():
            continue
        first = start + int(bad.argmax()) if first is None else first
        nan = np.count_nonzero(bad & ((chunk & integer(payload)) != 0))
        nans, infinities = nans + nan, infinities + np.count_nonzero(bad) - nan
    if first is None:
        return None
    counts = ((nans, "NaN"), (infinities, "infinite"))
    found = " and ".join(f"{count:,} {name}" for count, name in counts if count)
    return f"{found} of {codes.size:,} {spec.dtypes[0]} values, first at {_place(first, tensor)}"


def _bad_expert_ids(table, num_experts):
    bad = (table < 0) | (table >= num_experts)
    if not bad.any():
        return None
    first = int(bad.argmax())
    return (
        f"{np.count_nonzero(bad):,} of {table.size:,} expert ids are outside 0 to "
        f"{num_experts - 1}, first {table.reshape(-1)[first]} at {_place(first, table)}"
    )


def _place(flat, array):
    return [int(i) for i in np.unravel_index(flat, array.shape)]
