"""A model on a mesh beside the same model on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from v4jax.config import CSA, WINDOW, LayerSpec, ModelConfig, Yarn, with_hash_routing
from v4jax.model import sharded
from v4jax.model.transformer import Transformer
from v4jax.sharding.mesh import make_mesh, parse_sizes
from v4jax.sharding.rules import Layout

SEED = 1  # of the weights; of 0's routings one, in packed rows, lies within a rounding of another
NUDGES = 8
ROWS, LENGTH = 8, 75  # 75 tokens: slices that no ratio and no window divides
# Every mesh that tests run on; the sizes of the config divide by each.
MESHES = (
    "expert=8",
    "sequence=8",
    "expert=2,sequence=4",
    "data=2,fsdp=2,sequence=2",
    "fsdp=4,tensor=2",
)


def config() -> ModelConfig:
    """All layer kinds, two of them scanned; sizes that divide by 8 where a mesh cuts them."""
    return ModelConfig(
        vocab_size=64,
        hidden_size=32,
        layers=with_hash_routing((WINDOW,) + (CSA, LayerSpec("hca", ratio=16)) * 2, 1),
        mtp_layers=(WINDOW,),
        num_attention_heads=4,
        head_dim=16,
        qk_rope_head_dim=8,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        sliding_window=12,
        rope_scaling=Yarn(original_max_position_embeddings=64),
        max_position_embeddings=4096,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=6,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        hc_mult=2,
        hc_sinkhorn_iters=2,  # they are unrolled, and most of what there is to compile
        # At 0.2 one float32 rounding of the weights moves logits by all of the bound that they are
        # held to, 2e-5 of their deviation; at 0.1 by half of it.
        initializer_range=0.1,
        dtype="float32",
    )


@functools.cache
def alone(few: bool = False) -> tuple[Transformer, dict]:
    """The model on one device, and its variables; `few`: two of its layers."""
    sizes = config()
    if few:
        sizes = dataclasses.replace(sizes, layers=sizes.layers[1:3], mtp_layers=())
    model = Transformer(sizes, min_repeats=2)
    return model, jax.jit(model.init)(jax.random.key(SEED))


def on_mesh(sizes: str, strategy, few: bool = False) -> tuple[Transformer, dict]:
    """The same on a mesh."""
    model, variables = alone(few)
    sizes = parse_sizes(sizes)
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(jax.devices()[:count], **sizes)
    model = model.clone(sharding=Layout(mesh, strategy))
    return model, jax.device_put(variables, sharded.variable_shardings(model))


@functools.cache
def tokens() -> jax.Array:
    with jax.ensure_compile_time_eval():  # kept: the first call may be while something is traced
        return jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, 64)


@functools.cache
def documents() -> jax.Array:
    """Packed rows: documents of one token and of many, none ending where a slice ends."""
    starts = np.random.default_rng(0).random((ROWS, LENGTH)) < 0.06
    return jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)


def largest_difference(a, b) -> float:
    """Over all leaves."""
    parts = jax.tree.map(lambda x, y: float(np.max(np.abs(np.asarray(x) - np.asarray(y)))), a, b)
    return max(jax.tree.leaves(parts), default=0.0)


def equal(a, b) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def nudged(params, seed: int):
    """Every weight one float32 rounding up or down, by chance."""
    rng = np.random.default_rng(seed)

    def one(x):
        towards = np.where(rng.random(x.shape) < 0.5, -np.inf, np.inf).astype(np.float32)
        return jnp.asarray(np.nextafter(np.asarray(x), towards))

    return jax.tree.map(one, params)


def assert_close(found, wanted, moved, bound: float) -> None:
    """No leaf is off by more than `bound` of its largest value; those that are, by name.

    And the whole gradient, as one vector, by no more than `bound` of its length.

    Some of mHC's gradients are sums over all tokens of terms that cancel to a thousandth and less,
    and float32 does not hold them better than so: there the difference may be twice what a single
    rounding of all weights makes.

    Args:
      moved: the gradients at several `nudged` weights, as one device computes them.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(wanted), strict=True)
    beyond = {}
    for path, a, b, *others in zip(
        paths, jax.tree.leaves(found), leaves, *map(jax.tree.leaves, moved), strict=True
    ):
        size, off = float(np.abs(b).max()), largest_difference(a, b)
        own = max(largest_difference(other, b) for other in others)
        if not off <= bound * size:
            said = f"off by {off / size:.2g}, {own / size:.2g} by a rounding of the weights"
            print(jax.tree_util.keystr(path), said)
            if not off <= 2 * own:
                beyond[jax.tree_util.keystr(path)] = said
    assert not beyond, f"beyond {bound}: {beyond}"
    differences = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), found, wanted)
    off = float(optax.tree.norm(differences) / optax.tree.norm(wanted))
    print(f"the whole gradient is off by {off:.2g} of its length")
    assert off <= bound
