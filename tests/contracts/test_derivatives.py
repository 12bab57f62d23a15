"""Forward mode and second derivatives of `model.apply`: right, or refused in a sentence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.tiny import drawn, tiny_config
from v4jax.config import CSA, HCA, WINDOW, LayerSpec, with_hash_routing
from v4jax.errors import InputError
from v4jax.model.transformer import Transformer

TOKENS = np.arange(40, dtype=np.int32)[None] * 7 % 331
LAYERS = with_hash_routing((CSA, LayerSpec("hca", ratio=16)), 1)
SIZES = {"layers": LAYERS, "hc_mult": 2, "hc_sinkhorn_iters": 3, "mtp_layers": ()}


@functools.cache
def variables():
    return drawn(Transformer(tiny_config(**SIZES)))


def loss_of(kernels, aux=()):
    """A function of params: the mean log-likelihood and, if asked for, the indexer's loss."""
    model, buffers = Transformer(tiny_config(**SIZES), kernels=kernels), variables()["buffers"]

    def loss(params):
        out = model.apply({"params": params, "buffers": buffers}, TOKENS, aux=aux)
        paid = sum(x[0] for x in out.aux.get("indexer_loss", {}).values())
        return jax.nn.log_softmax(out.logits)[..., 3].mean() + paid

    return loss


def direction(seed):
    leaves, tree = jax.tree.flatten(variables()["params"])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, made)


def dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("aux", [(), ("indexer_loss",)])
def test_forward_mode_is_the_gradient_in_a_direction(aux):
    """The reference path's jvp and linearize against the gradients written by hand."""
    params, v = variables()["params"], direction(1)
    wanted = jax.jit(lambda: dot(jax.grad(loss_of(None, aux))(params), v))()
    loss = loss_of("reference", aux)
    np.testing.assert_allclose(jax.jit(lambda: jax.jvp(loss, (params,), (v,))[1])(), wanted, 1e-4)
    np.testing.assert_allclose(jax.jit(lambda: jax.linearize(loss, params)[1](v))(), wanted, 1e-4)


@pytest.mark.slow
def test_hessian_vector_products():
    """Forward over reverse is symmetric, reverse over reverse, and the gradient's difference."""
    params, v, w = variables()["params"], direction(1), direction(2)
    loss = loss_of("reference")

    def hvp(v):
        return jax.jvp(jax.grad(loss), (params,), (v,))[1]

    both = jax.jit(lambda: (hvp(v), dot(hvp(v), w), dot(hvp(w), v)))
    product, one, other = both()
    np.testing.assert_allclose(one, other, rtol=1e-4)
    again = jax.jit(jax.grad(lambda p: dot(jax.grad(loss)(p), v)))(params)
    for a, b in zip(*map(jax.tree.leaves, (product, again)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))
    # Central difference of the gradients written by hand. With longer steps choices of experts
    # flip, and a difference is no derivative: 11 % off at 1e-3, 0.005 % at 1e-4.
    step = 1e-4
    gradient = jax.jit(jax.grad(loss_of(None)))
    ahead, behind = (
        gradient(jax.tree.map(lambda x, d, s=s: x + s * d, params, v)) for s in (step, -step)
    )
    found = dot(jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind), w)
    np.testing.assert_allclose(found, one, rtol=1e-3)


def test_every_order_traces_in_the_reference_path():
    """Nothing compiled: no gradient by hand is left in any layer kind."""
    layers = (LayerSpec("window", routing="hash"), CSA, HCA, LayerSpec("full"))
    model = Transformer(tiny_config(layers=layers), kernels="reference")
    shapes = model.abstract_variables()

    def found(jaxpr):
        """Names of primitives, of all nested programs too."""
        names = {eqn.primitive.name for eqn in jaxpr.eqns}
        for sub in _nested(jaxpr):
            names |= found(sub)
        return names

    aux = ("indexer_loss", "index_scores")
    program = jax.make_jaxpr(lambda v, t: model.apply(v, t, mtp=True, aux=aux))(shapes, TOKENS)
    assert not {name for name in found(program.jaxpr) if "custom_vjp" in name}


def _nested(jaxpr):
    for eqn in jaxpr.eqns:
        for leaf in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(leaf):
                yield getattr(leaf, "jaxpr", leaf)


def _is_jaxpr(x):
    return hasattr(x, "eqns")


def test_refused_in_a_sentence():
    config = tiny_config(layers=(WINDOW,), mtp_layers=())
    model = Transformer(config)
    variables = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model.abstract_variables())

    def loss(params):
        return model.apply(variables | {"params": params}, TOKENS[:, :2]).logits.sum()

    params = variables["params"]
    with pytest.raises(InputError, match="no other derivatives .* with kernels='reference'"):
        jax.jvp(loss, (params,), (params,))
    for second in (jax.jvp, lambda f, p, v: jax.grad(lambda p: dot(f(p), v[0]))(*p)):
        with pytest.raises(NotImplementedError, match="build the model with kernels='reference'"):
            jax.eval_shape(lambda p, f=second: f(jax.grad(loss), (p,), (p,)), params)
