"""What the Pallas kernels cannot take."""

import jax.numpy as jnp

from v4jax.kernels.hyper_connections.tpu import backward as pallas_tpu_backward
from v4jax.kernels.hyper_connections.tpu import forward as pallas_tpu
from v4jax.kernels.hyper_connections.tpu import tiles as tpu_tiles

FOOTPRINTS = {
    "pre": pallas_tpu.pre_footprint,
    "post": pallas_tpu.post_footprint,
    "post_pre": pallas_tpu.post_pre_footprint,
    "pre_backward": pallas_tpu_backward.pre_footprint,
    "post_backward": pallas_tpu_backward.post_footprint,
    "post_pre_backward": pallas_tpu_backward.post_pre_footprint,
}
TYPES = ("float32", "bfloat16")


def refusal(op: str, name: str, h_BTMD, dtype) -> str | None:
    """Why implementation `name` of `op` cannot take streams h and give `dtype`, or None."""
    m = h_BTMD.shape[2]
    for what, given in (("the streams are", h_BTMD.dtype), ("the result is", dtype)):
        if jnp.dtype(given).name not in TYPES:
            return f"{what} {jnp.dtype(given).name}; {' and '.join(TYPES)} are supported"
    if name == "pallas_gpu" and m not in (1, 2, 4, 8):
        return f"there are M = {m} streams; 1, 2, 4 and 8 are supported"
    if not 1 <= m <= 8:
        return f"there are M = {m} streams; 1 to 8 are supported"
    if name == "pallas_tpu":
        return tpu_tiles.too_large(h_BTMD, FOOTPRINTS[op](h_BTMD, dtype))
    return None
