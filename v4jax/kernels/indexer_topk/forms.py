"""The forms in which a list of index keys may come.

Keys [B,C,Z], `stored_keys.StoredKeys`, or `compact_keys.CompactKeys`, of which TPU and GPU kernels
get `StoredKeys`.
"""

from v4jax.kernels.indexer_topk import compact_keys, stored_keys
from v4jax.kernels.indexer_topk.compact_keys import CompactKeys
from v4jax.kernels.indexer_topk.stored_keys import StoredKeys


def expanded(keys):
    """Keys of any form as [B,C,Z]."""
    if isinstance(keys, CompactKeys):
        return compact_keys.unpack(keys)
    return stored_keys.unpack(keys) if isinstance(keys, StoredKeys) else keys


def for_kernels(keys):
    """Keys in a form that TPU and GPU kernels take."""
    return compact_keys.for_kernels(keys) if isinstance(keys, CompactKeys) else keys
