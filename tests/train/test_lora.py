"""Adapters begin as nothing, learn alone, and are merged into what the export holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v4jax
from tests.support.tiny import VARIANTS, tiny_config
from tests.train.test_loop import arrays
from v4jax.config import CSA
from v4jax.datasets.config import DataConfig
from v4jax.errors import InputError
from v4jax.model.transformer import Transformer
from v4jax.train import loop, lora
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.lora import LoraConfig
from v4jax.train.schedule import Schedule

pytestmark = pytest.mark.slow  # compiles whole training programs, minutes of it

SIZES = {"layers": (CSA,), "mtp_layers": (), "hc_mult": 1, "hidden_size": 16}


def adapted(variant="scanned"):
    model = Transformer(tiny_config(**VARIANTS[variant]), min_repeats=2)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), model.abstract_variables()["params"])
    return params, lora.add(params, LoraConfig(rank=2), jax.random.key(0))


def test_adapters_begin_as_nothing_and_have_the_weights_leading_axes():
    params, both = adapted()
    jax.tree.map(np.testing.assert_array_equal, lora.merge(both, LoraConfig(rank=2)), params)
    experts = both["lora"]["layers_1"]["block_0"]["ffn"]["experts"]["w2"]
    assert experts["a"].shape == (2, 6, 2, 28) and experts["b"].shape == (2, 6, 48, 2)
    assert set(both["lora"]["layers_0"]["block_0"]["attn"]) == {
        "wq_a", "wq_b", "wkv", "wo_a", "wo_b",
    }  # fmt: skip


def test_merge_by_hand():
    w = jax.random.normal(jax.random.key(0), (3, 5, 7))
    a, b = jax.random.normal(jax.random.key(1), (3, 2, 7)), jnp.ones((3, 5, 2))
    params = {"experts": {"w1": w}, "lora": {"experts": {"w1": {"a": a, "b": b}}}}
    found = lora.merge(params, LoraConfig(rank=2, alpha=6.0))["experts"]["w1"]
    np.testing.assert_allclose(found, w + 3 * a.sum(1, keepdims=True), rtol=1e-5, atol=1e-5)


def test_a_run_trains_adapters_alone_and_exports_their_sum(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(200)))
    full = TrainConfig(
        model=tiny_config(**SIZES),
        stages=(Stage(steps=2, length=32, batch=2),),
        data=DataConfig(kind="text", path=str(text), tokenizer="bytes"),
        schedule=Schedule(1e-2, 1e-2, warm_up=0, decay=0),
    )
    loop.train(full, tmp_path / "full")
    start = str(tmp_path / "full" / "model")
    tuned = dataclasses.replace(full, start=start, lora=LoraConfig(rank=2))
    loop.train(tuned, tmp_path / "tuned")
    before, after = arrays(tmp_path / "full", 2), arrays(tmp_path / "tuned", 2)
    for name, leaf in after.items():
        if name.startswith("params.lora"):
            assert np.any(leaf), name
        elif name.startswith("params"):
            np.testing.assert_array_equal(leaf, before[name])
        else:
            assert not name.startswith("moments") or "lora" in name or "count" in name
    # What the export holds is the merged weight.
    _, variables = v4jax.load(tmp_path / "tuned" / "model")
    stem = "params.lora.layers_0.block_0.attn.wkv.weight"
    product = np.asarray(after[stem + ".b"]) @ np.asarray(after[stem + ".a"])
    wanted = before["params.layers_0.block_0.attn.wkv.weight"] + 8.0 * product
    found = variables["params"]["layers_0"]["block_0"]["attn"]["wkv"]["weight"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_mistakes():
    with pytest.raises(InputError, match="lora.rank is 0"):
        LoraConfig(rank=0)
    with pytest.raises(InputError, match="matches no parameter"):
        lora.add({"w": jnp.zeros((2, 2))}, LoraConfig(rank=1), jax.random.key(0))
