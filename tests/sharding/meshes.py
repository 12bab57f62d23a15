"""A model on a mesh beside the same model on one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.config import CSA, WINDOW, LayerSpec, ModelConfig, Yarn, with_hash_routing
from v4jax.model import sharded
from v4jax.model.transformer import Transformer
from v4jax.sharding.mesh import make_mesh, parse_sizes
from v4jax.sharding.rules import Shards

ROWS, LENGTH = 8, 75  # 75 tokens: slices that no ratio and no window divides
CANCELLED = r"\['hc_\w+'\]\['(scale|base)'\]$"
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
        initializer_range=0.2,
        dtype="float32",
    )


@functools.cache
def alone() -> tuple[Transformer, dict]:
    """The model on one device, and its variables."""
    model = Transformer(config(), min_repeats=2)
    return model, jax.jit(model.init)(jax.random.key(0))


def on_mesh(sizes: str, strategy) -> tuple[Transformer, dict]:
    """The same on a mesh."""
    model, variables = alone()
    sizes = parse_sizes(sizes)
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(jax.devices()[:count], **sizes)
    model = model.clone(sharding=Shards(mesh, strategy))
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


def relative(found, wanted) -> dict[str, float]:
    """Each leaf's largest difference, in parts of its module's largest value, the worst leaf first.

    A module's own leaves are sums over the same terms: where those cancel in one of them, what is
    left is as exact as the terms are, not as it is small. mHC's scales and biases cancel together,
    so for them it is at least 1/100 of the largest gradient of all.
    """
    paths, wanted_leaves = zip(*jax.tree_util.tree_leaves_with_path(wanted), strict=True)
    top = max(float(np.abs(b).max()) for b in wanted_leaves)
    largest: dict[str, float] = {}
    for path, b in zip(paths, wanted_leaves, strict=True):
        module = jax.tree_util.keystr(path[:-1])
        largest[module] = max(largest.get(module, 0.0), float(np.abs(b).max()))
    off = {}
    for path, a, b in zip(paths, jax.tree.leaves(found), wanted_leaves, strict=True):
        name, size = jax.tree_util.keystr(path), largest[jax.tree_util.keystr(path[:-1])]
        if re.search(CANCELLED, name):
            size = max(size, 1e-2 * top)
        off[name] = float(np.abs(np.asarray(a) - np.asarray(b)).max()) / size
    return dict(sorted(off.items(), key=lambda item: -item[1]))


def assert_close(found, wanted, bound: float) -> None:
    """No leaf is off by more than `bound`, see `relative`; those that are, by name."""
    beyond = {name: off for name, off in relative(found, wanted).items() if not off <= bound}
    assert not beyond, f"beyond {bound}: {beyond}"
