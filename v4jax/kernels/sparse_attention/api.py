"""The core attention of every layer kind: a window, compressed entries, a sink, one softmax."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int, UInt32

from v4jax.kernels import dispatch, ranges
from v4jax.kernels.sparse_attention import reference, xla
from v4jax.kernels.sparse_attention.compact import CompactRows
from v4jax.kernels.sparse_attention.entries import as_rows, check, for_kernels
from v4jax.kernels.sparse_attention.gpu import tiles as pallas_gpu
from v4jax.kernels.sparse_attention.plan import Plan, Visible
from v4jax.kernels.sparse_attention.stored import StoredRows
from v4jax.kernels.sparse_attention.tpu import tiles as pallas_tpu
from v4jax.ops import products


def _on_kernel_form(forward):
    """A kernel's forward pass of entries in any form."""

    @functools.wraps(forward)
    def run(plan, q_BTNH, sink_N, window_BSH, entries_BCH, visible, **options):
        entries_BCH = for_kernels(entries_BCH)
        return forward(plan, q_BTNH, sink_N, window_BSH, entries_BCH, visible, **options)

    return run


FORWARD = {
    "xla": xla.forward,
    "pallas_tpu": _on_kernel_form(pallas_tpu.forward),
    "pallas_gpu": _on_kernel_form(pallas_gpu.forward),
}
BACKWARD = {
    "xla": xla.backward,
    "pallas_tpu": pallas_tpu.backward,
    "pallas_gpu": pallas_gpu.backward,
}
OP = "sparse_attention"
REFUSE = {"pallas_tpu": pallas_tpu.refuse, "pallas_gpu": pallas_gpu.refuse}


@jax.named_scope("sparse_attention")
def sparse_attention(
    q_BTNH: Inexact[Array, "b t n h"],
    sink_N: Float[Array, " n"],
    *,
    scale: float,
    window_BSH: Inexact[Array, "b s h"] | None = None,
    first_BT: Int[Array, "b t"] | None = None,
    window: int = 0,
    entries_BCH: (
        Inexact[Array, "b c h"] | Inexact[Array, "b c _ _"] | StoredRows | CompactRows | None
    ) = None,
    low_BT: Int[Array, "b t"] | None = None,
    high_BT: Int[Array, "b t"] | None = None,
    chosen_BTK: Int[Array, "b t k"] | None = None,
    member_BTW: UInt32[Array, "b t w"] | None = None,
    topk: int = 0,
    with_lse: bool = False,
    implementation: str | None = None,
) -> Inexact[Array, "b t n h"] | tuple[Inexact[Array, "b t n h"], Float[Array, "b t n"]]:
    """Attention with one key-value head whose keys are its values (architecture section 4).

    Args:
      q_BTNH: rotated queries.
      sink_N: the logit that only enlarges each head's denominator.
      scale: factor on q.k, H^-1/2.
      window_BSH: S = P + T rows; row P + t belongs to query t, the P before are older.
      first_BT: the first row that a query may see; it sees first <= row <= P + t, and of those
        only the last `window`.
      entries_BCH: compressed entries (or, for full attention, every token's own row): rows, rows
        in lanes, `StoredRows` or `CompactRows` (`entries`, `stored`, `compact`). A cache from which
        a TPU decodes is kept in one of the latter three; of rows it would copy the list at every
        step.
      low_BT, high_BT: a query may see entries low <= e < high, of those that there are. The ranges
        of a row may stand in any order, overlap and be empty.
      chosen_BTK: the entries that a query attends to, in any order, -1 where there is none; one
        outside [low, high) is as good as none, and each must stand once.
      member_BTW: such a choice as a packed mask (`kernels.membership`) without a bit outside [low,
        high); then `topk` is the most that a query chooses. Neither: all of [low, high).
      with_lse: also return the log-sum-exp of scores and sink, [B,T,N], which passes no gradient;
        `mass.attention_mass` reads it.
      implementation: None chooses; "xla", "pallas_tpu", "pallas_gpu" or "reference" by name.

    Returns:
      [B,T,N,H] of q's dtype; differentiable in q, sink, window and entries, except where these
      are `StoredRows` or `CompactRows`, which are a cache's.

    Raises:
      NotImplementedError: the named implementation does not exist or cannot take the arguments.
    """
    check(entries_BCH, q_BTNH.shape[3])
    if entries_BCH is not None and entries_BCH.shape[1] == 0:
        entries_BCH = low_BT = high_BT = chosen_BTK = member_BTW = None
    if entries_BCH is not None:
        low_BT, high_BT = ranges.in_list(low_BT, high_BT, entries_BCH.shape[1])
    if chosen_BTK is not None:
        chosen_BTK, topk = ranges.visible(chosen_BTK, low_BT, high_BT), chosen_BTK.shape[2]
    plan = Plan(scale, window, topk)
    visible = Visible(first_BT, low_BT, high_BT, chosen_BTK, member_BTW)
    arrays = (q_BTNH, sink_N.astype(jnp.float32), window_BSH, entries_BCH, visible)
    if implementation == "reference":
        out, lse = reference.sparse_attention(plan, *arrays)
    else:
        out, lse = _attend(plan, implementation, *arrays)
    return (out, jax.lax.stop_gradient(lse)) if with_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan, implementation, *arrays):
    """Output and log-sum-exp."""
    return _attend_fwd(plan, implementation, *arrays)[0]


def _attend_fwd(plan, implementation, q_BTNH, sink_N, window_BSH, entries_BCH, visible):
    arrays = (q_BTNH, sink_N, window_BSH, entries_BCH, visible)
    refuse = _refusal(plan, q_BTNH, window_BSH, entries_BCH)
    out, lse = dispatch.run(OP, implementation, _bind(FORWARD, plan), refuse, *arrays)
    return (out, lse), (*arrays, out, lse)


def _attend_bwd(plan, implementation, saved, gradients):
    """ds = p (dp - delta), delta = sum over H of do * o; the sink's value is 0, so its dp is 0."""
    dout, _ = gradients
    q_BTNH, sink_N, window_BSH, entries_BCH, visible, out, lse = saved
    if isinstance(entries_BCH, StoredRows | CompactRows):
        raise NotImplementedError(
            f"sparse_attention has no gradient where the entries are {type(entries_BCH).__name__}; "
            "hand it rows [B,C,H] (entries.expanded)"
        )
    delta = products.over_channels(dout, out)
    dsink = -jnp.sum(jnp.exp(sink_N[None, None] - lse) * delta, axis=(0, 1))
    arrays = (q_BTNH, window_BSH, as_rows(entries_BCH), visible, lse, delta, dout)
    refuse = _refusal(plan, q_BTNH, window_BSH, entries_BCH)
    grads = dispatch.run(OP, implementation, _bind(BACKWARD, plan), refuse, *arrays)
    dq, dwindow, dentries = grads
    if entries_BCH is not None:
        dentries = dentries.reshape(entries_BCH.shape)
    return dq, dsink, dwindow, dentries, jax.tree.map(lambda _: None, visible)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _bind(functions, plan):
    return {name: functools.partial(function, plan) for name, function in functions.items()}


def _refusal(plan, q_BTNH, window_BSH, entries_BCH):
    form = jax.eval_shape(for_kernels, entries_BCH)
    return lambda name, *_: REFUSE[name](plan, q_BTNH, window_BSH, form)
