"""`model.apply` inside somebody else's mesh: a checking `jax.shard_map`, Explicit axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.support.tiny import drawn, tiny_config, tiny_model
from v4jax.config import CSA, FULL, HCA, LayerSpec
from v4jax.model.transformer import Transformer

TOKENS = np.arange(4 * 20, dtype=np.int32).reshape(4, 20) * 7 % 331
AUX = ("indexer_loss", "index_scores", "router_load", "streams")


def mesh_of(kind):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    return jax.make_mesh((2,), ("d",), axis_types=(kind,), devices=jax.devices()[:2])


@functools.cache
def small():
    """One CSA layer whose indexer has to choose, and an MTP block."""
    model = Transformer(tiny_config(layers=(CSA,), hc_mult=2, index_topk=2))
    return model, drawn(model)


def forward(model, variables, tokens, aux=()):
    out = model.apply(variables, tokens, mtp=True, aux=aux)
    return out.logits, out.mtp_logits


def gradient(model, variables, tokens):
    """Of a sum over rows: over shards it is a sum too, which the marked weights' gradient is."""

    def loss(params):
        out = model.apply(variables | {"params": params}, tokens, aux=("indexer_loss",))
        paid = sum(x[0] for x in out.aux["indexer_loss"].values())
        return jax.nn.log_softmax(out.logits)[..., 3].sum() + paid

    return jax.grad(loss)(variables["params"])


def decode(model, variables, tokens, lengths=None):
    """Prefill and a step: the logits and the cache."""
    cache = model.init_cache(len(tokens), 32, rollback=1)
    cache = model.apply(variables, tokens, cache=cache, lengths=lengths, logits="last").cache
    return model.apply(variables, tokens[:, :1], cache=cache, logits="last")


def close(found, wanted):
    def one(a, b):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-4)

    jax.tree.map(one, found, wanted)


def in_shard_map(f, *out_specs):
    specs = out_specs[0] if len(out_specs) == 1 else out_specs
    return jax.shard_map(f, mesh=mesh_of(AxisType.Auto), in_specs=(P(), P("d")), out_specs=specs)


def explicitly(variables, tokens):
    mesh = jax.sharding.get_mesh()
    where = NamedSharding(mesh, P()), NamedSharding(mesh, P("d"))
    return jax.device_put(variables, where[0]), jax.device_put(tokens, where[1])


def test_a_checking_shard_map_traces():
    """The default: every loop's carry and every operation says over which axes it varies."""
    model, variables = small()
    jax.eval_shape(in_shard_map(functools.partial(forward, model), P("d")), variables, TOKENS)
    # A shard's own aux is a shard's: what it sums, it sums over its rows.
    every = in_shard_map(lambda v, t: model.apply(v, t, aux=AUX).aux["router_load"], P("d"))
    jax.eval_shape(every, variables, TOKENS)


def test_explicit_axes_trace():
    """Weights and tokens as they lie, rows of the output where the tokens' rows lie."""
    model, variables = small()
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        out = jax.eval_shape(functools.partial(decode, model), *explicitly(variables, TOKENS))
        assert out.logits.sharding.spec == P("d", None, None)
        assert out.cache.lengths.sharding.spec == P("d")
        window = out.cache.layers["layers_0"][0].window
        assert window.sharding.spec == P(None, "d", None, None)


@pytest.mark.slow
def test_a_checking_shard_map_computes_what_one_device_does():
    model, variables = small()
    for f, spec in ((forward, P("d")), (gradient, P())):
        here = jax.jit(functools.partial(f, model))(variables, TOKENS)
        there = jax.jit(in_shard_map(functools.partial(f, model), spec))(variables, TOKENS)
        close(there, here)
    run = lambda v, t: decode(model, v, t).logits  # noqa: E731
    close(jax.jit(in_shard_map(run, P("d")))(variables, TOKENS), jax.jit(run)(variables, TOKENS))


@pytest.mark.slow
def test_explicit_axes_compute_what_one_device_does():
    model, variables = small()
    for f in (forward, gradient, decode):
        here = jax.jit(functools.partial(f, model))(variables, TOKENS)
        with jax.set_mesh(mesh_of(AxisType.Explicit)):
            there = jax.jit(functools.partial(f, model))(*explicitly(variables, TOKENS))
            close(jax.device_get(there), jax.device_get(here))


@pytest.mark.slow
def test_every_layer_kind_under_a_checking_shard_map():
    """Scanned segments, packed rows, full attention, native numerics: traced with gradients."""
    layers = (LayerSpec("window", routing="hash"), CSA, HCA, FULL)
    models = [Transformer(tiny_config(layers=layers)), tiny_model("scanned", numerics="native")[0]]
    for model in models:
        variables = model.abstract_variables()
        for f, spec in ((gradient, P()), (lambda m, v, t: decode(m, v, t).logits, P("d"))):
            run = in_shard_map(functools.partial(f, model), spec)
            jax.eval_shape(run, variables, TOKENS)

        def packed(variables, tokens, model=model):
            documents = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None] // 6, tokens.shape)
            return model.apply(variables, tokens, segment_ids=documents).logits

        jax.eval_shape(in_shard_map(packed, P("d")), variables, TOKENS)


def test_a_pallas_kernel_asked_for_by_name_is_refused_where_it_cannot_say_how_it_varies():
    model, variables = small()
    run = functools.partial(forward, model.clone(kernels="pallas_tpu"))
    with pytest.raises(NotImplementedError, match="pass check_vma=False to shard_map"):
        jax.eval_shape(in_shard_map(run, P("d")), variables, TOKENS)
