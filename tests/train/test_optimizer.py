"""Groups, Muon's orthogonalisation, AdamW and decay against what is worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.tiny import VARIANTS, tiny_config
from v4jax import weights
from v4jax.errors import InputError
from v4jax.model.transformer import Transformer
from v4jax.train.optimizer import (
    COEFFICIENTS,
    OptimizerConfig,
    group_of,
    make_optimizer,
    orthogonalize,
    state_like,
    table,
)
from v4jax.train.schedule import Schedule


def abstract_params(variant):
    model = Transformer(tiny_config(**VARIANTS[variant]), min_repeats=2)
    return model.abstract_variables()["params"]


def declared(variant):
    return weights.parameters(tiny_config(**VARIANTS[variant]), 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_in_one_group(variant, capsys):
    params = abstract_params(variant)
    rows = table(params, OptimizerConfig(), declared(variant))
    with capsys.disabled():
        if variant == "scanned":
            print()
            for row in rows:
                print(f"{row.group:6} {row.matrices:3} {str(row.shape):20} {row.path}")
    assert len(rows) == len(jax.tree.leaves(params)) == len({row.path for row in rows})
    for row in rows:
        names = row.path.split("/")
        small = len(row.shape) - ("layers_1" in row.path and variant == "scanned") < 2
        if small or names[0] in ("embed", "head") or names[-1] == "ape":
            assert row.group == "adamw", row
        else:
            assert row.group == "muon" and row.matrices > 0, row


def test_matrices_are_counted_one_by_one():
    found = table(abstract_params("scanned"), OptimizerConfig(), declared("scanned"))
    rows = {row.path: row for row in found}
    # Two repeats of six experts; two groups of wo_a in each of two repeats.
    assert rows["layers_1/block_0/ffn/experts/w1"].matrices == 12
    assert rows["layers_1/block_0/attn/wo_a/weight"].matrices == 4
    assert rows["layers_0/block_0/hc_attn/fn"].matrices == 1


def test_an_unknown_parameter_is_refused():
    with pytest.raises(InputError, match="layers_0/new_thing is of no known kind"):
        group_of("layers_0/new_thing", declared("released"), OptimizerConfig())


def random_like(params, seed):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return jax.tree.unflatten(tree, [jax.random.normal(k, x.shape) * 1e-4 for k, x in pairs])


@pytest.mark.slow  # quick are single matrices against optax, below, and two steps by hand
def test_singular_values_and_rms_of_every_matrix():
    params = random_like(abstract_params("scanned"), 0)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.0), declared("scanned"))

    @jax.jit
    def first_direction(gradients):
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    directions = first_direction(random_like(params, 1))
    for row in table(params, OptimizerConfig(), declared("scanned")):
        if row.group != "muon":
            continue
        d = directions
        for name in row.path.split("/"):
            d = d[name]
        d = np.asarray(d).reshape(row.matrices, -1, row.shape[-1])
        rms = 0.18 * max(d.shape[1:]) ** 0.5
        values = np.linalg.svd(d, compute_uv=False) / rms
        assert values.min() > 0.9 and values.max() < 1.1, (row, values.min(), values.max())
        np.testing.assert_allclose(np.sqrt((d**2).mean((1, 2))), 0.18, rtol=0.05)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 16, 16), (1, 33)])
def test_orthogonalize_is_optax_with_the_reports_coefficients(shape):
    m = jax.random.normal(jax.random.key(0), shape)
    numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
    transform = optax.contrib.scale_by_muon(
        COEFFICIENTS, len(COEFFICIENTS), beta=0.0, nesterov=False, weight_dimension_numbers=numbers
    )
    with jax.numpy_dtype_promotion("standard"):
        wanted, _ = transform.update(m, transform.init(m))
    np.testing.assert_allclose(orthogonalize(m), wanted, atol=1e-4)  # thirty products in float32


def test_orthogonalize_survives_small_and_zero_gradients():
    m = jax.random.normal(jax.random.key(0), (8, 12))
    np.testing.assert_allclose(orthogonalize(1e-25 * m), orthogonalize(m), atol=1e-4)
    assert bool(jnp.all(orthogonalize(jnp.zeros((8, 12))) == 0))


def test_bfloat16_products_stay_near_one():
    m = jax.random.normal(jax.random.key(1), (48, 96))
    values = np.linalg.svd(np.asarray(orthogonalize(m, "bfloat16")), compute_uv=False)
    assert values.min() > 0.9 and values.max() < 1.1


SOME = {"embed": {"weight": jnp.ones((3, 4))}, "norm": {"weight": jnp.ones(4)}, "w": {}}
SOME["w"] = {"wq_a": {"weight": jax.random.normal(jax.random.key(0), (6, 4))}}
NORMAL = weights.Initializer("normal", 1.0)
OF_SOME = {
    "embed/weight": weights.Weight((3, 4), ("vocab", "embed"), "plain", NORMAL),
    "norm/weight": weights.Weight((4,), ("norm",), "norm", weights.ONES),
    "w/wq_a/weight": weights.Weight((6, 4), ("q_lora", "embed"), "matrix", NORMAL, matrices=1),
}


def test_two_steps_of_both_by_hand():
    config = OptimizerConfig()
    optimizer = make_optimizer(config, OF_SOME)
    gradients = [random_like(SOME, seed) for seed in (1, 2)]
    state = optimizer.init(SOME)
    for g in gradients:
        directions, state = optimizer.update(g, state, SOME)
    g1, g2 = (np.asarray(g["norm"]["weight"], np.float64) for g in gradients)
    m = 0.9 * 0.1 * g1 + 0.1 * g2
    v = 0.95 * 0.05 * g1**2 + 0.05 * g2**2
    adam = m / (1 - 0.9**2) / (np.sqrt(v / (1 - 0.95**2)) + 1e-20)
    np.testing.assert_allclose(directions["norm"]["weight"], adam + 0.1, rtol=1e-5)
    g1, g2 = (g["w"]["wq_a"]["weight"] for g in gradients)
    momentum = 0.95 * g1 + g2
    muon = orthogonalize(0.95 * momentum + g2) * 0.18 * 6**0.5
    wanted = muon + 0.1 * SOME["w"]["wq_a"]["weight"]
    np.testing.assert_allclose(directions["w"]["wq_a"]["weight"], wanted, rtol=1e-4, atol=1e-5)


def test_undecayed_and_frozen_parameters():
    config = OptimizerConfig(undecayed="norm", frozen="^embed")
    optimizer = make_optimizer(config, OF_SOME)
    zero = jax.tree.map(jnp.zeros_like, SOME)
    directions, state = optimizer.update(zero, optimizer.init(SOME), SOME)
    assert bool(jnp.all(directions["norm"]["weight"] == 0))
    assert bool(jnp.all(directions["embed"]["weight"] == 0))
    np.testing.assert_allclose(
        directions["w"]["wq_a"]["weight"], 0.1 * SOME["w"]["wq_a"]["weight"], rtol=1e-6
    )
    assert all(x.shape != (3, 4) for x in jax.tree.leaves(state))  # no moments of what is frozen


def test_adamw_for_everything():
    assert group_of("w/wq_a/weight", OF_SOME, OptimizerConfig(matrices="adamw")) == "adamw"


def test_the_state_takes_the_shardings_of_its_parameters():
    names = jax.tree_util.tree_map_with_path(lambda path, _: str(path), SOME)
    like = state_like(make_optimizer(OptimizerConfig(), OF_SOME), SOME, names, "everywhere")
    leaves = jax.tree.leaves(like)
    assert leaves.count("everywhere") == 1 and len(leaves) == 1 + 2 * 2 + 1


def test_schedule():
    schedule = Schedule(peak=1.0, final=0.1, warm_up=4, decay=6)
    rates = [schedule.rate(step, 20) for step in range(20)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0])
    assert rates[4:14] == [1.0] * 10
    assert all(a > b for a, b in zip(rates[13:], rates[14:], strict=False))
    np.testing.assert_allclose([rates[16], rates[19]], [0.55, 0.1])
    schedule.check(10)
    with pytest.raises(InputError, match="4 steps of warm-up and 6 of decay, and the run only 9"):
        schedule.check(9)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"matrices": "sgd"}, "optimizer.matrices is 'sgd'"),
        ({"frozen": "("}, "no regular expression"),
        ({"clip": 0.0}, "optimizer.clip is 0.0"),
    ],
)
def test_bad_configs(options, sentence):
    with pytest.raises(InputError, match=sentence):
        OptimizerConfig(**options)
