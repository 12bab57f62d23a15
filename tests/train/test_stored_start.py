"""Runs that start from stored weights: what they do not change leaves them byte for byte."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.checkpoints import small_config, synthetic, tensors
from tests.train.test_loop import arrays
from v4jax import quant
from v4jax.checkpoints.load import load_variables
from v4jax.config import CSA, HCA, with_hash_routing
from v4jax.datasets.config import DataConfig
from v4jax.model.transformer import Transformer
from v4jax.train import export, loop, quantized, start
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.lora import LoraConfig
from v4jax.train.optimizer import OptimizerConfig
from v4jax.train.schedule import Schedule
from v4jax.train.step import TrainState

FP4, FP8 = "flash_tiny", "flash_base_tiny"  # the latter with FP8 experts and float32 scales
ADAPTED = LoraConfig(rank=2)
WEIGHTS = ("I8", "F8_E4M3")


def config(name, base, **changes):
    """Two layers; the base's own stored form."""
    layers = with_hash_routing((CSA, dataclasses.replace(HCA, ratio=16)), 1)
    sizes = dict(layers=layers, mtp_layers=(), hc_mult=2, hc_sinkhorn_iters=2)
    options = dict(
        model=small_config(name, **sizes),
        stages=(Stage(steps=2, length=32, batch=4, quantized=True),),
        data=DataConfig(kind="copy"),
        schedule=Schedule(2.7e-4, 2.7e-5, warm_up=1, decay=1),
        start=base,
    )
    return TrainConfig(**options | changes)


def base_of(name, directory):
    return synthetic(directory, config(name, None).model)


def begun(config):
    """The state before the first step, without its optimiser."""
    model = Transformer(config.model, min_repeats=config.min_repeats)
    variables = start.variables(config, model, None)
    params = start.adapted(config, variables["params"])
    return TrainState(params, variables["buffers"], {}, 0, start.scales(config, model))


def assert_same_bytes(found, wanted):
    found, wanted = tensors(found), tensors(wanted)
    assert found.keys() == wanted.keys() and len(found) > 50
    for key, (dtype, shape, raw) in wanted.items():
        assert found[key][:2] == (dtype, shape), key
        assert found[key][2] == raw, key


@pytest.mark.parametrize("name", [FP4, FP8])
@pytest.mark.parametrize("adapters", [LoraConfig(), ADAPTED])
def test_no_step_exports_the_bytes_of_the_base(name, adapters, tmp_path):
    base = base_of(name, tmp_path / "base")
    run = config(name, base, lora=adapters)
    state = begun(run)
    experts = state.params["layers_0"]["block_0"]["ffn"]["experts"]["w1"]
    if name == FP4:  # of whose zeros half are -0, and -0 + 0 would be 0
        assert 0.3 < np.mean(np.signbit(experts[experts == 0])) < 0.7
    export.export(tmp_path, run, state)
    assert_same_bytes(tmp_path / "model", base)


def test_a_base_in_another_form_has_no_scales_to_keep(tmp_path):
    """FP8 with float32 scales under a config of FP4 and E8M0, and the other way round."""
    base = base_of(FP8, tmp_path / "base")
    assert start.scales(config(FP4, base), Transformer(config(FP4, base).model)) is None
    run = config(FP4, base)
    export.export(tmp_path, run, begun(run))
    assert tensors(tmp_path / "model")["layers.0.ffn.experts.0.w1.scale"][0] == "F8_E8M0"
    run = config(FP8, base_of(FP4, tmp_path / "other"))
    kept = start.scales(run, Transformer(run.model))["layers_0"]["block_0"]
    assert kept["ffn"]["experts"]["w1"] is None
    assert kept["attn"]["wkv"]["weight"].dtype == jnp.uint8


def test_only_quantised_runs_from_a_checkpoint_keep_scales(tmp_path):
    base = base_of(FP4, tmp_path / "base")
    model = Transformer(config(FP4, base).model)
    floats = (Stage(steps=1), Stage(steps=1))
    assert start.scales(config(FP4, None), model) is None
    assert start.scales(config(FP4, base, stages=floats), model) is None
    mixed = (Stage(steps=1), Stage(steps=1, quantized=True))
    assert start.scales(config(FP4, base, stages=mixed), model) is not None


def changed(found, base):
    """The shares of stored values and of scales that differ."""
    found, base = tensors(found), tensors(base)
    counts = np.zeros((2, 2))
    for key, (dtype, _, raw) in base.items():
        kind = 0 if dtype in WEIGHTS else 1 if key.endswith(".scale") else None
        if kind is None or ".experts." not in key:
            continue
        pair = [np.frombuffer(x, np.uint8) for x in (raw, found[key][2])]
        if kind == 0 and dtype == "I8":
            pair = [np.concatenate([x & 15, x >> 4]) for x in pair]
            pair = [np.where(x == 8, 0, x) for x in pair]  # -0 is no other value than 0
        counts[kind] += (pair[0] != pair[1]).sum(), pair[0].size
    return counts[:, 0] / counts[:, 1]


def expert_leaves(tree):
    """The experts' matrices of both layers, or what stands for them."""
    each = itertools.product(("layers_0", "layers_1"), ("w1", "w2", "w3"))
    return [tree[layer]["block_0"]["ffn"]["experts"][matrix] for layer, matrix in each]


def values_in_reach(run, weight, scales, a):
    """Which values are stored as others when an adapter's b is at its largest, for all its signs.

    b begins at 0, and AdamW moves it per step by the learning rate at most: after one gradient its
    direction is a sign, after two at most 1.0005.
    """
    encode = quant.quantize_fp4 if scales.dtype == jnp.uint8 else quant.quantize_fp8
    b = 1.0005 * sum(run.schedule.rate(step, run.steps) for step in range(run.steps))
    taken = []
    for signs in itertools.product((1, -1), repeat=run.lora.rank):
        change = run.lora.scale * b * np.einsum("r,eri->ei", np.float32(signs), a)[:, None]
        taken.append(np.asarray(encode(weight + change, scales).dequantize()) != weight)
    return np.stack(taken)


@pytest.mark.slow
@pytest.mark.parametrize("name", [FP4, FP8])
def test_a_short_lora_run_leaves_scales_and_nearly_all_values(name, tmp_path):
    """A value changes once its weight has moved by half a step of its grid, and that is counted.

    Half a step is at least 1/4 of a scale in FP4, and 1/64 in FP8 of the magnitudes 0.5 to 1.875.
    """
    base = base_of(name, tmp_path / "base")
    run, exported = config(name, base, lora=ADAPTED), tmp_path / "run" / "model"
    loop.train(run, tmp_path / "run")
    values, scales = changed(exported, base)
    before, after = begun(run), load_variables(exported, "float32", run.min_repeats)[1]["params"]
    weights = expert_leaves(before.params)
    adapters = [leaf["a"] for leaf in expert_leaves(before.params["lora"])]
    stored = zip(weights, expert_leaves(before.scales), adapters, strict=True)
    reach = [values_in_reach(run, *each) for each in stored]
    for weight, new, taken in zip(weights, expert_leaves(after), reach, strict=True):
        assert not np.any((new != weight) & ~taken.any(0))
    # b's signs are as good as random, and its size is the largest where both steps agree: a mean
    # over the signs is just above what is to be expected.
    expected = sum(taken.mean(0).sum() for taken in reach) / sum(w.size for w in weights)
    print(f"{name}: {values:.3%} of values, expected {expected:.3%}; {scales:.3%} of scales")
    # Before scales were kept, 29 % of FP4 scales changed and all float32 ones.
    assert scales == 0 and values <= expected and expected < (0.001 if name == FP4 else 0.02)


@pytest.mark.slow
def test_resumed_the_scales_are_those_of_the_run(tmp_path):
    """A rate at which scales change; the base is gone and `start` is not given any more."""
    base = base_of(FP4, tmp_path / "base")
    adamw = OptimizerConfig(matrices="adamw", eps=1e-6)
    run = config(FP4, base, optimizer=adamw, schedule=Schedule(0.5, 0.5, warm_up=0, decay=0))
    loop.train(run, tmp_path / "whole")
    loop.train(run, tmp_path / "halves", 1)
    (tmp_path / "base").rename(tmp_path / "gone")
    loop.train(dataclasses.replace(run, start=None), tmp_path / "halves")
    whole, halves = (arrays(tmp_path / name, 2) for name in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    for name, leaf in whole.items():
        np.testing.assert_array_equal(leaf, halves[name], err_msg=name)
    first = arrays(tmp_path / "halves", 1)
    names = [name for name in whole if name.startswith("scales.")]
    assert any(np.any(np.asarray(whole[n]) != np.asarray(first[n])) for n in names)
    assert_same_bytes(tmp_path / "whole" / "model", tmp_path / "halves" / "model")
    # What is exported is what was trained with: the rule changes nothing any more.
    role_of = quantized.roles(Transformer(run.model, min_repeats=run.min_repeats))
    params, scales = (_tree(whole, field) for field in ("params", "scales"))
    again = quantized.follow(params, role_of, scales)
    jax.tree.map(np.testing.assert_array_equal, again, scales)


@pytest.mark.slow
def test_on_a_mesh_the_scales_are_those_of_one_device(tmp_path):
    base = base_of(FP4, tmp_path / "base")
    adamw = OptimizerConfig(matrices="adamw", eps=1e-6)
    run = config(FP4, base, optimizer=adamw)
    loop.train(run, tmp_path / "alone")
    loop.train(dataclasses.replace(run, mesh="fsdp=2,tensor=2,data=2"), tmp_path / "mesh")
    alone, mesh = (arrays(tmp_path / name, 2) for name in ("alone", "mesh"))
    for name in alone:
        if name.startswith("scales."):
            np.testing.assert_array_equal(alone[name], mesh[name], err_msg=name)
    shares = [changed(tmp_path / name / "model", base) for name in ("alone", "mesh")]
    print("values and scales changed, alone and on the mesh:", shares)
    for values, scales in shares:
        assert scales == 0 and values < 0.01
    assert abs(shares[0][0] - shares[1][0]) < 1e-3


def _tree(named, field):
    tree = {}
    for name, leaf in named.items():
        top, *path = name.split(".")
        if top != field:
            continue
        node = tree
        for each in path[:-1]:
            node = node.setdefault(each, {})
        node[path[-1]] = jnp.asarray(leaf)
    return tree
