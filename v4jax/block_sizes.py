"""How many numbers one scale covers, and the bytes that a row of the cache takes with its scales.

Architecture sections 10 and 11. No JAX here.
"""

FP8 = 128  # rows and columns of a weight, channels of an activation
FP4 = 32  # input channels of a weight, channels of index queries and keys
KV = 64  # channels of a kv row
KV_ALIGNMENT = 8  # the scale bytes of a kv row are padded to a multiple of this


def kv_row_bytes(width: int, rope: int) -> int:
    """One entry, or one row of a window: FP8 channels with their scales, BF16 rotary channels.

    Args:
      width: all channels. rope: those of them that are rotated.
    """
    plain = width - rope
    scales = -(-plain // KV)
    return plain + scales + -scales % KV_ALIGNMENT + 2 * rope


def index_key_bytes(width: int) -> int:
    """One key of the indexer: FP4 channels with their scales."""
    return width // 2 + -(-width // FP4)
