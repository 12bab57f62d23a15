"""The lightning indexer of CSA layers: which compressed entries a query attends to (section 6)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array

from v4jax import block_sizes, quant, weights
from v4jax.config import LayerSpec, ModelConfig
from v4jax.kernels import membership, ranges
from v4jax.kernels.indexer_topk import api, forms
from v4jax.model.compressor import Compressor
from v4jax.model.context import Context
from v4jax.model.indexer_loss import Student
from v4jax.model.keys import Entries, Keys, LayerState
from v4jax.model.layers import Execution, Projection
from v4jax.ops.rope import rotate
from v4jax.sharding import sequence


class Indexer(nn.Module):
    """Index queries, keys and head weights, and the choice made with them."""

    config: ModelConfig
    spec: LayerSpec
    execution: Execution

    def setup(self):
        config, spec, execution = self.config, self.spec, self.execution
        declared = weights.indexer(config, spec)
        self.wq_b = Projection(declared["wq_b/weight"], execution)
        self.weights_proj = Projection(
            declared["weights_proj/weight"], execution, quantize_input=False
        )
        self.compressor = Compressor(config, spec, config.index_head_dim, execution)

    def extend_keys(
        self, x_BTD: Array, context: Context, state: LayerState
    ) -> tuple[Entries, LayerState]:
        """The index keys of all compressed entries so far [B,C,Z], and the state with new ones."""
        with jax.named_scope("index"):
            new, raw = self.compressor(x_BTD, context, state.older_raw("index"))
            new = self._rotate_and_quantize(new)
            return state.extend_entries("index", new, raw, context, self.spec.ratio)

    def student(
        self,
        x_BTD: Array,
        q_latent_BTL: Array,
        keys_BCZ: Entries,
        cos_sin: tuple[Array, Array],
    ) -> Student:
        """Index queries [B,T,I,Z], their heads' weights [B,T,I] and the index keys."""
        config, execution = self.config, self.execution
        with jax.named_scope("index"):
            q = self.wq_b("btl,xl->btx", q_latent_BTL)
            q_BTIZ = rearrange(q, "b t (i z) -> b t i z", i=config.index_n_heads)
            cos, sin = (angle[:, :, None] for angle in cos_sin)
            kernels = execution.kernels
            q_BTIZ = rotate(q_BTIZ, cos, sin, execution.dtype, implementation=kernels)
            q_BTIZ = self._rotate_and_quantize(q_BTIZ)
            factor = config.index_head_dim**-0.5 * config.index_n_heads**-0.5
            weight = self.weights_proj("btd,id->bti", x_BTD).astype(jnp.float32) * factor
        topk = config.index_topk or keys_BCZ.shape[1]
        weight_BTI = execution.round(weight)
        return Student(q_BTIZ, weight_BTI, keys_BCZ, topk, execution.native, kernels)

    def choose(
        self,
        keys: Keys,
        student: Student,
        context: Context,
        state: LayerState,
        replayed_BTK: Array | None,
    ) -> tuple[Keys, dict[str, Array]]:
        """The keys with the choice in them, and auxiliary arrays by name.

        Without a choice in them where every visible entry would be in it.
        """
        if replayed_BTK is not None:
            # Of another run's choice a query gets what it may see, in its loss too.
            own = state.own_choice(replayed_BTK, keys.entries_BCH)
            return keys._replace(chosen_BTK=ranges.visible(own, keys.low_BT, keys.high_BT)), {}
        aux, count = {}, student.keys_BCZ.shape[1]
        if "index_scores" in context.aux:
            keys_BCZ = forms.expanded(student.keys_BCZ)
            aux = {"index_scores": _scores(student, keys_BCZ), "index_keys": keys_BCZ}
        entries = count * (state.layout.size("entries") if state.in_parts else 1)
        topk = self.config.index_topk or entries
        if context.dense or (entries <= topk and "chosen" not in context.aux):
            return keys, aux
        with jax.named_scope("index"):
            if state.in_parts:
                best = _best(student, keys, min(topk, count))
                chosen, own = sequence.best_of_all(state.layout, *best, count, topk)
                keys = keys._replace(chosen_BTK=own)
            else:
                keys = _choice(student, keys, topk)
                chosen = keys.choice() if "chosen" in context.aux else None
        return keys, aux | ({"chosen": chosen} if "chosen" in context.aux else {})

    def _rotate_and_quantize(self, x):
        """The Hadamard rotation and E2M1 rounding of native numerics.

        The rotation is orthonormal and the same for queries and keys, so without the rounding it
        changes no score and is left out.
        """
        if not self.execution.native:
            return x
        return quant.fake_quant_e2m1(self.execution.round(quant.hadamard(x)), block_sizes.FP4)


def _options(student):
    return {"native": student.native, "implementation": student.implementation}


def _arguments(student, keys, topk):
    queries = (student.q_BTIZ, student.weight_BTI, student.keys_BCZ)
    return (*queries, keys.low_BT, keys.high_BT, topk)


def _choice(student, keys, topk):
    """A packed mask, or indices where those are fewer bytes or the call is a decode step's."""
    arguments, count = _arguments(student, keys, topk), student.keys_BCZ.shape[1]
    if keys.low_BT.shape[1] == 1 or count > membership.BITS * topk:
        return keys._replace(chosen_BTK=api.indexer_topk(*arguments, **_options(student)))
    member_BTW = api.indexer_member(*arguments, **_options(student))
    return keys._replace(member_BTW=member_BTW, topk=min(topk, count))


def _best(student, keys, topk):
    """The choice as indices and the chosen entries' scores, for a merge with other shards'."""
    arguments = _arguments(student, keys, topk)
    chosen_BTK = api.indexer_topk(*arguments, **_options(student))
    return chosen_BTK, api.index_scores_at(*arguments[:3], chosen_BTK, native=student.native)


def _scores(student, keys_BCZ):
    """Every entry's score for every query, float32 [B,T,C]: for losses and pictures."""
    return api.index_scores(student.q_BTIZ, student.weight_BTI, keys_BCZ, **_options(student))
