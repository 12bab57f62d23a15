"""Small configs on the same code paths as the released models, for tests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import weights
from v4jax.config import CSA, FULL, HCA, WINDOW, LayerSpec, ModelConfig, Yarn, with_hash_routing
from v4jax.model.transformer import Transformer


def tiny_config(**changes) -> ModelConfig:
    """Every layer kind once or twice, sizes that divide nothing evenly."""
    sizes = {
        "vocab_size": 331,
        "hidden_size": 48,
        "layers": with_hash_routing((WINDOW, CSA, HCA), 1),
        "mtp_layers": (WINDOW,),
        "num_attention_heads": 4,
        "head_dim": 24,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 20,
        "o_groups": 2,
        "o_lora_rank": 12,
        "sliding_window": 24,
        "rope_scaling": Yarn(original_max_position_embeddings=64),
        "max_position_embeddings": 4096,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 12,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 28,
        "initializer_range": 0.1,
        "dtype": "float32",
    }
    return ModelConfig(**(sizes | changes))


VARIANTS = {
    "released": {},
    "scanned": {"layers": with_hash_routing((WINDOW,) + (CSA, HCA) * 2, 1)},
    "ablated": {
        "layers": (
            LayerSpec("csa", ratio=8, overlap=False),
            LayerSpec("hca", ratio=16, overlap=True),
            LayerSpec("csa", ratio=6, overlap=True),
        ),
        "head_dim": 256,  # a cache keeps such rows in lanes
        "hc_mult": 1,
        "n_shared_experts": 0,
        "scoring_func": "softmax",
        "sliding_window": 7,
    },
    "all_visible": {
        "layers": (FULL, CSA),
        "index_topk": None,
        "hc_mult": 2,
        "scoring_func": "sigmoid",
    },
}


def tiny_model(variant="released", seed=0, **options):
    """A model of a variant and random variables with a biased router."""
    model = Transformer(tiny_config(**VARIANTS[variant]), **({"min_repeats": 2} | options))
    return model, drawn(model, seed)


def drawn(model, seed=0, moved=0.1):
    """Random variables of a model, by numpy: to compile `model.init` takes 14 s of processor.

    Distributed as those of `init`, but what starts at a constant (sinks, norms, mHC, biases) is
    moved by `moved` times a normal number, so that nothing hides behind it.
    """
    rng = np.random.default_rng(seed)
    declared = weights.variables(model.config, model.min_repeats)

    def draw(path, leaf):
        init, shape = declared[tuple(step.key for step in path)].init, leaf.shape
        if init.kind == "even_table":
            experts = rng.random((*shape[:-1], model.config.n_routed_experts)).argsort(-1)
            return jnp.asarray(experts[..., : shape[-1]], leaf.dtype)
        constant, spread = (0, init.value) if init.kind == "normal" else (init.value, moved)
        return jnp.asarray(constant + spread * rng.standard_normal(shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.abstract_variables())


def drawn_wide(model):
    """Variables by numpy with normal numbers in all that is no table.

    Small weights, as `drawn` has them, give the same token again and again.
    """
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.dtype == jnp.int32:
            return jnp.asarray(rng.integers(0, model.config.n_routed_experts, leaf.shape, np.int32))
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32))

    return jax.tree.map(draw, model.abstract_variables())


def replaced(config, **changes):
    return dataclasses.replace(config, **changes)
