"""The compressor: blocks of m tokens pooled into one entry (architecture section 5)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from v4jax import weights
from v4jax.config import LayerSpec, ModelConfig
from v4jax.model import rope
from v4jax.model.cache import raw_rows
from v4jax.model.context import Context, closing_rows
from v4jax.model.layers import Execution, Projection, RMSNorm, weight
from v4jax.ops import derivatives
from v4jax.ops.rope import rotate
from v4jax.ops.softmax_sum import softmax_sum
from v4jax.sharding import sequence


class Compressor(nn.Module):
    """Pools x into entries of `width` channels, normed and rotated.

    Each entry is a softmax-weighted sum, channel by channel, over the m tokens of its block; with
    overlap over the block before as well, whose tokens bring their first `width` channels and the
    block's own tokens their last.
    """

    config: ModelConfig
    spec: LayerSpec
    width: int
    execution: Execution

    def setup(self):
        declared = weights.compressor(self.config, self.spec, self.width)
        self.ape = weight(self, "ape", declared["ape"])
        self.wkv = Projection(declared["wkv/weight"], self.execution, float32=True)
        self.wgate = Projection(declared["wgate/weight"], self.execution, float32=True)
        self.norm = RMSNorm(self.width, self.config.rms_norm_eps, self.execution)

    def __call__(
        self, x_BTD: Array, context: Context, older_BPX: Array | None
    ) -> tuple[Array, Array | None]:
        """The entries whose blocks close in this call, [B,E,width].

        Args:
          x_BTD: the layer's input. context: its tokens' places.
          older_BPX: raw rows of earlier calls; None without a cache.

        Returns:
          Entries in the activation dtype, and the raw rows for the next call (None uncached).
          Entry i is number start // m + i of its row, or in a packed row the i-th whose block
          closes; those past the last closed block are garbage and are not to be kept.
        """
        raw_BTX, layout = self._raw(x_BTD, context), self.execution.layout
        joined = sequence.joined_rows(layout, raw_BTX, older_BPX, raw_rows(self.spec))
        kept = None
        if older_BPX is not None:
            total = context.call.total
            kept = sequence.last_rows(layout, joined, total, older_BPX.shape[1])
        reach = joined.shape[1] - raw_BTX.shape[1]
        if context.start is not None and raw_BTX.shape[1] == 1 and not layout.axes("sequence"):
            return self._of_one_token(joined, context), kept
        if context.document is not None:
            blocks, position = _packed_blocks(joined, context, reach, self.spec)
        elif context.start is None:
            blocks, position = _whole_blocks(raw_BTX, self.spec)
        else:
            blocks, position = _open_blocks(joined, context, reach, self.spec)
        return self._finish(self._pool(blocks, position), position), kept

    def _of_one_token(self, joined_BPX, context):
        """A decode step's entries [B,1,width]: of rows whose block it does not close, garbage.

        A block that closes is the last rows. A CPU leaves all of it out where none closes, which is
        most steps; other backends would wait for the answer.
        """
        ratio = self.spec.ratio
        closes_B = (context.start % ratio == ratio - 1) & (context.call.total > 0)
        needed = jax.lax.platform_dependent(
            closes_B, cpu=jnp.any, default=lambda _: jnp.bool_(True)
        )
        position_BE = ratio * (context.start // ratio)[:, None]

        def made(self, rows_BPX):
            return self._finish(self._pool(rows_BPX[:, None], position_BE), position_BE)

        def left_out(self, rows_BPX):
            shape = (rows_BPX.shape[0], 1, self.width)
            return jnp.zeros(shape, self.execution.dtype)

        return nn.cond(needed, made, left_out, self, joined_BPX[:, -_span(self.spec) :])

    def _raw(self, x_BTD, context):
        """c and gate + ape side by side, float32 [B,T,2*channels]."""
        c = self.wkv.in_float32("btd,xd->btx", x_BTD)
        gate = self.wgate.in_float32("btd,xd->btx", x_BTD)
        ape = self.ape.astype(jnp.float32)[context.position % self.spec.ratio]
        return jnp.concatenate([c, gate + ape], axis=-1)

    def _pool(self, blocks_BEPX, position_BE):
        """Softmax over a span's tokens of the gates, times c: float32 [B,E,width]."""
        c, gate = jnp.split(blocks_BEPX, 2, axis=-1)
        if self.spec.overlap:
            c, gate = _first_then_last(c), _first_then_last(gate)
            span = gate.shape[2]
            # A document's first block has none before it (c = 0 and gate = -inf there).
            absent = (position_BE == 0)[..., None] & (jnp.arange(span) < span // 2)[None, None]
            gate = jnp.where(absent[..., None], -jnp.inf, gate)
        return derivatives.of(softmax_sum, self.execution.kernels)(c, gate)

    def _finish(self, entries_BEH, position_BE):
        entries = self.norm(self.execution.round(entries_BEH))
        frequency = rope.inverse_frequencies(self.config, compressing=True)
        cos, sin = rope.rotations(frequency, position_BE)
        return rotate(
            entries, cos, sin, self.execution.dtype, implementation=self.execution.kernels
        )


def _span(spec):
    """Tokens that an entry pools."""
    return spec.ratio * (2 if spec.overlap else 1)


def _windows(rows_BPX, spec):
    """Rows that begin at a block, cut into the spans of successive entries: [B,E,span,X]."""
    batch, rows, channels = rows_BPX.shape
    blocks = rows_BPX.reshape(batch, rows // spec.ratio, spec.ratio, channels)
    if not spec.overlap:
        return blocks
    return jnp.concatenate([blocks[:, :-1], blocks[:, 1:]], axis=2)


def _whole_blocks(raw_BTX, spec):
    """Spans of a row that begins at position 0; positions [1,E] of their blocks' first tokens."""
    entries = raw_BTX.shape[1] // spec.ratio
    rows = raw_BTX[:, : entries * spec.ratio]
    if spec.overlap:
        rows = jnp.pad(rows, ((0, 0), (spec.ratio, 0), (0, 0)))
    return _windows(rows, spec), spec.ratio * jnp.arange(entries, dtype=jnp.int32)[None]


def _open_blocks(joined_BPX, context, older, spec):
    """Spans of the blocks that close in this call, each row at its own offset."""
    m, overlap = spec.ratio, spec.ratio if spec.overlap else 0
    length = joined_BPX.shape[1] - older
    entries = (length + m - 1) // m
    number = context.start[:, None] // m + jnp.arange(entries, dtype=jnp.int32)[None]
    first = m * (context.start // m) - overlap - context.start + older
    joined_BPX = jnp.pad(joined_BPX, ((0, 0), (0, m), (0, 0)))
    take = jax.vmap(
        lambda rows, at: jax.lax.dynamic_slice_in_dim(rows, at, entries * m + overlap, axis=0)
    )
    return _windows(take(joined_BPX, first), spec), m * number


def _packed_blocks(joined_BPX, context, older, spec):
    """Spans of all documents' blocks in the order in which they close; garbage after the last."""
    batch, m = joined_BPX.shape[0], spec.ratio
    closes = context.position % m == m - 1
    entries = -(-closes.shape[1] // m) if older else closes.shape[1] // m
    last = closing_rows(jnp.cumsum(closes, axis=1, dtype=jnp.int32), entries)
    row = last[..., None] + jnp.arange(1 - _span(spec), 1, dtype=jnp.int32)[None, None] + older
    blocks = joined_BPX[jnp.arange(batch, dtype=jnp.int32)[:, None, None], jnp.maximum(row, 0)]
    position = jnp.take_along_axis(context.position, last, axis=1)
    return blocks, position - (spec.ratio - 1)


def _first_then_last(x):
    """The earlier block's first half of the channels, then the own block's last half."""
    earlier, own = jnp.split(x, 2, axis=2)
    half = x.shape[-1] // 2
    return jnp.concatenate([earlier[..., :half], own[..., half:]], axis=2)
