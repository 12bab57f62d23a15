"""Bounds of a config's counts, held before anything is built from them.

Far beyond any model, and what they let through is still fast. The files of a checkpoint bound the
counts further (`checkpoints.foreign.refuse_counts`).
"""

from collections.abc import Mapping
from typing import Any

from v4jax.errors import InputError
from v4jax.hf.values import integer

MAX_LAYERS = 4096
MAX_BLOCKS = 64  # MTP and draft blocks after the layers
MAX_EXPERTS = 65536
MAX_ALL_EXPERTS = 1 << 18  # of all layers
MAX_ITERATIONS = 1000  # of the Sinkhorn normalisation, which are unrolled


def check_counts(keys: Mapping[str, Any]) -> None:
    """Refuses counts that nothing could hold, and negative ones, before they are used."""
    limits = {
        "num_hidden_layers": MAX_LAYERS,
        "num_hash_layers": MAX_LAYERS,
        "num_nextn_predict_layers": MAX_BLOCKS,
        "n_routed_experts": MAX_EXPERTS,
        "n_shared_experts": MAX_EXPERTS,
        "hc_sinkhorn_iters": MAX_ITERATIONS,
    }
    for name, most in limits.items():
        if keys.get(name) is not None and not 0 <= integer(keys, name) <= most:
            raise InputError(f"{name} is {keys[name]}; expected 0 to {most}")
    for name, most in (("compress_ratios", MAX_LAYERS + MAX_BLOCKS), ("v4jax_layers", MAX_LAYERS)):
        entries = keys.get(name)
        if isinstance(entries, list | tuple) and len(entries) > most:
            raise InputError(f"{name} has {len(entries)} entries; expected {most} or fewer")
    experts, layers = keys.get("n_routed_experts") or 0, keys.get("num_hidden_layers") or 0
    if experts * layers > MAX_ALL_EXPERTS:
        raise InputError(
            f"n_routed_experts is {experts} and num_hidden_layers {layers}; expected "
            f"{MAX_ALL_EXPERTS} experts or fewer in all layers together"
        )


def check_blocks(blocks: int, num_layers: int) -> None:
    """Refuses more entries of compress_ratios after the layers than there can be blocks."""
    if blocks > MAX_BLOCKS:
        raise InputError(
            f"compress_ratios has {blocks} entries after the {num_layers} layers; expected one for "
            f"each MTP or draft block, {MAX_BLOCKS} at most"
        )
