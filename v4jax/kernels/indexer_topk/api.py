"""The lightning indexer: scores of compressed entries, and the choice of the highest."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Inexact, Int, UInt32

from v4jax.kernels import dispatch, membership, ranges
from v4jax.kernels.indexer_topk import chosen_scores, forms, reference, xla
from v4jax.kernels.indexer_topk.compact_keys import CompactKeys
from v4jax.kernels.indexer_topk.gpu import choice as pallas_gpu
from v4jax.kernels.indexer_topk.gpu import scores as pallas_gpu_scores
from v4jax.kernels.indexer_topk.stored_keys import StoredKeys
from v4jax.kernels.indexer_topk.tpu import choice as pallas_tpu
from v4jax.kernels.indexer_topk.tpu import scores as pallas_tpu_scores
from v4jax.ops import derivatives


def _on_kernel_form(member):
    """A kernel's choice from keys in any form."""

    @functools.wraps(member)
    def run(q_BTIZ, weight_BTI, keys_BCZ, *args, **options):
        return member(q_BTIZ, weight_BTI, forms.for_kernels(keys_BCZ), *args, **options)

    return run


MEMBER = {
    "xla": xla.indexer_member,
    "reference": reference.indexer_member,
    "pallas_tpu": _on_kernel_form(pallas_tpu.indexer_member),
    "pallas_gpu": _on_kernel_form(pallas_gpu.indexer_member),
}
# A path of their own where that is faster than going through the packed mask.
INDICES = {"xla": xla.indexer_topk, "reference": reference.indexer_topk}
SCORES = {
    "xla": xla.index_scores,
    "reference": reference.index_scores,
    "pallas_tpu": pallas_tpu_scores.index_scores,
    "pallas_gpu": pallas_gpu_scores.index_scores,
}
GRADIENT = {
    "xla": xla.index_scores_gradient,
    "reference": reference.index_scores_gradient,
    "pallas_tpu": pallas_tpu_scores.index_scores_gradient,
    "pallas_gpu": pallas_gpu_scores.index_scores_gradient,
}
_REFUSE = {"pallas_tpu": pallas_tpu.refuse, "pallas_gpu": pallas_gpu.refuse}
_REFUSE_SCORES = {"pallas_tpu": pallas_tpu_scores.refuse, "pallas_gpu": pallas_gpu_scores.refuse}


@jax.named_scope("indexer_member")
def indexer_member(
    q_BTIZ: Inexact[Array, "b t i z"],
    weight_BTI: Inexact[Array, "b t i"],
    keys_BCZ: Inexact[Array, "b c z"] | StoredKeys | CompactKeys,
    low_BT: Int[Array, "b t"],
    high_BT: Int[Array, "b t"],
    topk: int,
    *,
    native: bool = False,
    implementation: str | None = None,
) -> UInt32[Array, "b t w"]:
    """Which visible entries are the `topk` of highest score of every query, one bit per entry.

    score[t, e] = sum over index heads of weight * relu(q . key)  (architecture section 6). Equal
    scores go to the lower index, -0 equals 0, NaN counts as -inf. Where at most topk entries are
    visible, all of them are chosen.

    Args:
      q_BTIZ: index queries, weight_BTI their heads' weights, keys_BCZ the entries' keys, which may
        be `StoredKeys` or `CompactKeys`: the choice is that of the keys they stand for.
      low_BT, high_BT: a query may see entries low <= e < high, of those that there are. The ranges
        of a row may stand in any order, overlap and be empty.
      topk: how many to choose.
      native: bf16 rounding after every step of the score (section 10, point 7).
      implementation: None chooses; "xla", "reference", "pallas_tpu" or "pallas_gpu" by name.

    Returns:
      uint32 [B,T,W], laid out as kernels/membership.py says.

    Raises:
      NotImplementedError: an implementation of that name does not exist or cannot take these.
    """
    _check(q_BTIZ, keys_BCZ)
    topk = min(topk, keys_BCZ.shape[1])
    if topk == 0:
        return jnp.zeros((*low_BT.shape, membership.words(keys_BCZ.shape[1])), jnp.uint32)
    functions = _with(MEMBER, topk=topk, native=native)
    seen = ranges.in_list(low_BT, high_BT, keys_BCZ.shape[1])
    args = _fixed(q_BTIZ, weight_BTI, keys_BCZ, *seen)
    return dispatch.run("indexer_member", implementation, functions, _refuse, *args)


@jax.named_scope("indexer_topk")
def indexer_topk(
    q_BTIZ: Inexact[Array, "b t i z"],
    weight_BTI: Inexact[Array, "b t i"],
    keys_BCZ: Inexact[Array, "b c z"] | StoredKeys | CompactKeys,
    low_BT: Int[Array, "b t"],
    high_BT: Int[Array, "b t"],
    topk: int,
    *,
    native: bool = False,
    implementation: str | None = None,
) -> Int[Array, "b t k"]:
    """The choice of `indexer_member` as indices.

    Args:
      As of `indexer_member`.

    Returns:
      int32 [B,T,min(topk, C)], ascending, -1 after the last where fewer are visible.

    Raises:
      NotImplementedError: an implementation of that name does not exist or cannot take these.
    """
    _check(q_BTIZ, keys_BCZ)
    topk = min(topk, keys_BCZ.shape[1])
    if topk == 0:
        return jnp.zeros((*low_BT.shape, 0), jnp.int32)
    from_member = {
        name: functools.partial(
            _indices, MEMBER[name], entries=keys_BCZ.shape[1], topk=topk, native=native
        )
        for name in set(MEMBER) - set(INDICES)
    }
    functions = _with(INDICES, topk=topk, native=native) | from_member
    seen = ranges.in_list(low_BT, high_BT, keys_BCZ.shape[1])
    args = _fixed(q_BTIZ, weight_BTI, keys_BCZ, *seen)
    return dispatch.run("indexer_topk", implementation, functions, _refuse, *args)


def _indices(member, *args, entries, topk, native, interpret):
    word = member(*args, topk=topk, native=native, interpret=interpret)
    return membership.to_indices(word, topk, entries)


def _check(q_BTIZ, keys_BCZ):
    if isinstance(keys_BCZ, StoredKeys | CompactKeys) and q_BTIZ.shape[3] != keys_BCZ.shape[2]:
        raise NotImplementedError(
            f"the index queries are {q_BTIZ.shape[3]} channels wide (z); "
            f"{type(keys_BCZ).__name__} have {keys_BCZ.shape[2]}"
        )


def _fixed(*arrays):
    """A choice passes no gradient."""
    return jax.lax.stop_gradient(arrays)


def _with(functions, **options):
    return {name: functools.partial(function, **options) for name, function in functions.items()}


def _refuse(name, *args):
    return _REFUSE[name](*jax.eval_shape(_with_kernel_form, *args))


def _with_kernel_form(q_BTIZ, weight_BTI, keys_BCZ, *args):
    return q_BTIZ, weight_BTI, forms.for_kernels(keys_BCZ), *args


@jax.named_scope("index_scores")
def index_scores(
    q_BTIZ: Inexact[Array, "b t i z"],
    weight_BTI: Inexact[Array, "b t i"],
    keys_BCZ: Inexact[Array, "b c z"],
    *,
    native: bool = False,
    implementation: str | None = None,
) -> Float32[Array, "b t c"]:
    """Every entry's score for every query, differentiable in q, weight and keys.

    For losses, a block of queries at a time: the result is [B,T,C], and neither direction stores an
    array that has a head axis as well.

    Args:
      q_BTIZ, weight_BTI, keys_BCZ: as of `indexer_member`.
      native: bf16 rounding after every step of the score; gradients pass the rounding unchanged.
      implementation: None chooses; "xla", "reference", "pallas_tpu" or "pallas_gpu" by name.

    Raises:
      NotImplementedError: an implementation of that name does not exist or cannot take these.
    """
    if keys_BCZ.shape[1] == 0:
        return jnp.zeros((*q_BTIZ.shape[:2], 0), jnp.float32)
    if implementation == "reference":  # with derivatives of every order
        return SCORES["reference"](q_BTIZ, weight_BTI, keys_BCZ, native=native)
    return _index_scores(q_BTIZ, weight_BTI, keys_BCZ, native, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _index_scores(q_BTIZ, weight_BTI, keys_BCZ, native, implementation):
    return _scores_forward(q_BTIZ, weight_BTI, keys_BCZ, native, implementation)[0]


def _scores_forward(q_BTIZ, weight_BTI, keys_BCZ, native, implementation):
    args = (q_BTIZ, weight_BTI, keys_BCZ)
    functions = _with(SCORES, native=native)
    return dispatch.run("index_scores", implementation, functions, _refuse_scores, *args), args


def _scores_backward(native, implementation, args, g_BTC):
    functions = _with(GRADIENT, native=native)
    gradient = dispatch.run("index_scores", implementation, functions, _refuse_scores, *args, g_BTC)
    return tuple(g.astype(x.dtype) for g, x in zip(gradient, args, strict=True))


_index_scores.defvjp(_scores_forward, _scores_backward)


def _refuse_scores(name, *args):
    return _REFUSE_SCORES[name](*args)


@jax.named_scope("index_scores_at")
def index_scores_at(
    q_BTIZ: Inexact[Array, "b t i z"],
    weight_BTI: Inexact[Array, "b t i"],
    keys_BCZ: Inexact[Array, "b c z"] | CompactKeys,
    chosen_BTK: Int[Array, "b t k"],
    *,
    native: bool = False,
    implementation: str | None = None,
) -> Float32[Array, "b t k"]:
    """Scores of the given entries alone, differentiable in q, weight and keys; 0 at -1.

    Memory grows with T x K, in blocks of queries: plain XLA on every platform.

    Args:
      q_BTIZ, weight_BTI, keys_BCZ: as of `indexer_member`; `CompactKeys` pass no gradient.
      chosen_BTK: entries of each query, -1 for none.
      native: as of `index_scores`.
      implementation: "reference" for derivatives of every order; else one by hand.
    """
    if keys_BCZ.shape[1] == 0 or chosen_BTK.shape[2] == 0:
        return jnp.zeros(chosen_BTK.shape, jnp.float32)
    scores_at = derivatives.of(chosen_scores.index_scores_at, implementation)
    return scores_at(q_BTIZ, weight_BTI, keys_BCZ, chosen_BTK, native)
