"""Our checkpoints, written for transformers: its model loads them and gives our logits."""

import jax
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, DeepseekV4ForCausalLM

import v4jax
from tests.support.checkpoints import tensors
from tests.support.tiny import drawn, tiny_config
from v4jax.checkpoints.convert import convert
from v4jax.config import LayerSpec, Yarn
from v4jax.model.transformer import Transformer

CSA, HCA = LayerSpec("csa", 4, overlap=True), LayerSpec("hca", 16)
WINDOW = LayerSpec("window")
# Hash layers anywhere, other ratios, no YaRN, a rotated part that is no round fraction, sigmoid.
MIXED = {
    "layers": (CSA, LayerSpec("hca", 16, routing="hash"), WINDOW, CSA),
    "head_dim": 26,
    "qk_rope_head_dim": 6,
    "rope_scaling": None,
    "scoring_func": "sigmoid",
    "hc_mult": 3,
    "eos_token_id": (1, 7),
    "bos_token_id": None,
}


def loaded(directory, **options):
    """transformers' model in float32; every tensor has its place, and every place its tensor."""
    options = {"dtype": torch.float32, "output_loading_info": True} | options
    model, info = DeepseekV4ForCausalLM.from_pretrained(directory, **options)
    assert not any(info.values()), info
    return model.eval()


def assert_same_logits(directory, theirs, length=150):
    model, variables = v4jax.load(directory, weights="float32", dtype="float32")
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, length))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    ours = jax.jit(model.apply)(variables, tokens.astype(np.int32)).logits
    assert np.abs(np.asarray(ours) - wanted).max() / np.abs(wanted).max() < 1e-4


def written(tmp_path, config, seed=0):
    """A random model's official checkpoint, and the same for transformers."""
    variables = drawn(Transformer(config), seed, moved=0.3)
    v4jax.save_official(tmp_path / "official", config, variables)
    convert(tmp_path / "official", tmp_path / "theirs", "transformers", progress=False)
    return tmp_path / "official", tmp_path / "theirs"


def test_a_model_with_hash_layers_anywhere(tmp_path):
    # Many index heads: with few, entries tie at a score of 0, and ties are broken as one likes.
    official, target = written(tmp_path, tiny_config(index_n_heads=16, **MIXED))
    theirs = loaded(target)
    assert (theirs.config.eos_token_id, theirs.config.bos_token_id) == ([1, 7], None)
    assert_same_logits(official, theirs)
    theirs.save_pretrained(tmp_path / "saved")
    assert tensors(tmp_path / "saved") == tensors(target)


def test_nano_with_its_tokenizer(tmp_path):
    """transformers finds the type of the weights, and reads texts as we do."""
    convert("nano", tmp_path / "nano", "transformers", progress=False)
    assert loaded(tmp_path / "nano", dtype="auto").dtype == torch.bfloat16
    text = "def area(width, height):\n    return width * height\n"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "nano")
    ids = v4jax.Tokenizer("nano").encode(text)
    assert tokenizer(text)["input_ids"] == list(ids)


@pytest.mark.slow  # compiles nano
def test_logits_of_nano(tmp_path):
    """FP8 and FP4 weights stand for the numbers that transformers is given."""
    convert("nano", tmp_path / "nano", "transformers", progress=False)
    assert_same_logits("nano", loaded(tmp_path / "nano"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_random_models(tmp_path, seed):
    """Kinds, ratios, routing and sizes drawn at random."""
    rng = np.random.default_rng(seed)
    ratios = {"csa": int(rng.integers(2, 9)), "hca": int(rng.integers(2, 60)), "window": 0}
    kinds = rng.choice(list(ratios), int(rng.integers(1, 5)))
    layers = tuple(
        LayerSpec(str(kind), ratios[kind], kind == "csa", str(rng.choice(["hash", "score"])))
        for kind in kinds
    )
    rotated = 2 * int(rng.integers(1, 9))
    yarn = Yarn(
        float(rng.uniform(1, 40)), int(rng.integers(16, 4096)), 32.0, float(rng.uniform(0.5, 4))
    )
    config = tiny_config(
        layers=layers,
        qk_rope_head_dim=rotated,
        head_dim=rotated + int(rng.integers(0, 40)),
        rope_theta=float(rng.uniform(100, 1e5)),
        rope_scaling=None if rng.random() < 0.3 else yarn,
        index_n_heads=16,
        index_topk=int(rng.integers(1, 40)),
        sliding_window=int(rng.integers(2, 60)),
        num_experts_per_tok=int(rng.integers(1, 5)),
        scoring_func=str(rng.choice(["sigmoid", "sqrtsoftplus"])),
        swiglu_limit=float(rng.uniform(0.3, 10)),
        hc_mult=int(rng.integers(2, 6)),
        hc_sinkhorn_iters=int(rng.integers(1, 8)),
    )
    official, target = written(tmp_path, config, seed)
    assert_same_logits(official, loaded(target), int(rng.integers(20, 220)))
