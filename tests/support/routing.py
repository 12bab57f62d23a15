"""Small experts, their routings, and `route` on a mesh: what the tests of exchanges share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from v4jax.kernels.grouped_matmul import api as grouped_matmul
from v4jax.sharding.expert import route
from v4jax.sharding.mesh import make_mesh
from v4jax.sharding.rules import STRATEGIES, Layout

TOKENS, WIDTH, HIDDEN, EXPERTS, CHOICES = 48, 16, 8, 16, 3


def layout_on(strategy: str, devices=None, waves=1, capacity=None, **sizes) -> Layout:
    return Layout(make_mesh(devices, **sizes), STRATEGIES[strategy], waves, capacity)


def arrays(tokens=TOKENS, width=WIDTH, hidden=HIDDEN, experts=EXPERTS, choices=CHOICES):
    """x, weights and the experts' w1, w2, w3."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((tokens, width), (tokens, choices), (experts, hidden, width))
    shapes += ((experts, width, hidden), (experts, hidden, width))
    drawn = zip(keys, shapes, strict=True)
    x, weights, *stacks = (jax.random.normal(key, shape) for key, shape in drawn)
    return x, jax.nn.sigmoid(weights), *stacks


def routings() -> dict[str, np.ndarray]:
    """Chosen experts [X, K], a token's own ones different from one another."""
    random = np.random.default_rng(0)
    token = np.arange(TOKENS)[:, None]
    choice = np.arange(CHOICES)[None]
    return {
        "random": random.permuted(np.tile(np.arange(EXPERTS), (TOKENS, 1)), axis=1)[:, :CHOICES],
        "all to the last expert's shard": (EXPERTS - 1 - choice) + 0 * token,
        "even experts only": 2 * ((token + 3 * choice) % (EXPERTS // 2)),
        "a shard's tokens to one expert": np.where(
            choice == 0, token % 5, 5 + (token * 7 + 4 * choice) % (EXPERTS - 5)
        ),
    }


@jax.custom_vjp
def _poisoned(x_R, total):
    """x with NaN in rows past `total`; its gradient too."""
    own = jnp.arange(x_R.shape[0]) < total
    return jnp.where(own.reshape(-1, *[1] * (x_R.ndim - 1)), x_R, jnp.nan)


_poisoned.defvjp(
    lambda x_R, total: (_poisoned(x_R, total), total),
    lambda total, dy_R: (_poisoned(dy_R, total), None),
)


@jax.custom_vjp
def _poisons_gradient(x_R, total):
    return x_R


_poisons_gradient.defvjp(
    lambda x_R, total: (x_R, total), lambda total, dy_R: (_poisoned(dy_R, total), None)
)


def ffn(stacks, x_RD, weight_R, sizes_E):
    """The experts, with NaN wherever kernels may leave memory as they found it."""
    total = sizes_E.sum()
    x_RD, weight_R = (_poisons_gradient(x, total) for x in (x_RD, weight_R))
    rounding = grouped_matmul.Rounding(x_RD.dtype.name)
    y_RD = grouped_matmul.expert_ffn(
        x_RD, weight_R, sizes_E, *stacks, limit=10.0, rounding=rounding
    )
    return _poisoned(y_RD, total)


def route_local(layout, experts, x_XD, weights_XK, chosen_XK, *stacks):
    return route(layout, x_XD, chosen_XK, weights_XK, experts, functools.partial(ffn, stacks))


def routed(layout: Layout, experts=EXPERTS):
    """(x, weights, chosen, *stacks) -> y, of whole arrays."""
    body = functools.partial(route_local, layout, experts)
    if layout.mesh is None:
        return body
    tokens = PartitionSpec(layout.axes("batch") + layout.axes("sequence"))
    stack = layout.spec("expert")
    return jax.shard_map(
        body,
        mesh=layout.mesh,
        in_specs=(tokens,) * 3 + (stack,) * 3,
        out_specs=tokens,
        check_vma=False,
    )


def with_gradients(layout: Layout):
    """(x, weights, chosen, *stacks, cotangent) -> y and the gradients of all but `chosen`."""
    function = routed(layout)

    @jax.jit
    def run(x, weights, chosen, *rest):
        *stacks, dy = rest
        y, pull = jax.vjp(lambda x, w, *s: function(x, w, chosen, *s), x, weights, *stacks)
        return y, pull(dy)

    return run
