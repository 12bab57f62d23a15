"""The checkpoint that comes with the package: it loads, fits, has learned Python and writes it."""

import functools
import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import v4jax
from v4jax.checkpoints import load as checkpoint
from v4jax.datasets.config import DataConfig
from v4jax.datasets.rows import TextRows, take
from v4jax.datasets.source import open_source
from v4jax.infer.tokenizer import Tokenizer
from v4jax.train import evaluate
from v4jax.train.batch import make_batch

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = ROOT / "experiments" / "000_nano"
LARGEST = 24_000_000
SAMPLED_ROWS, LENGTH = 8, 512  # of held_out.json's "first_rows_nats_per_token"


@pytest.fixture(scope="module")
def nano():
    return v4jax.load("nano")


@pytest.fixture(scope="module")
def source(nano):
    """The standard library, with the files held out that nano was not trained on."""
    tokenizer = checkpoint.locate("nano")
    return open_source(DataConfig("python", tokenizer=tokenizer, held_out=0.05), nano[0].config)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(checkpoint.locate("nano"))


def test_is_small_and_has_official_files_only():
    files = {path.name: path.stat().st_size for path in Path(checkpoint.locate("nano")).iterdir()}
    assert sum(files.values()) <= LARGEST
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} <= files.keys()
    rest = files.keys() - {"config.json", "model.safetensors.index.json", "tokenizer.json"}
    assert all(name.endswith(".safetensors") for name in rest)


def test_is_the_packaged_config(nano, tokenizer):
    model, _ = nano
    sizes = v4jax.get_config("nano")
    assert model.config.layers == sizes.layers
    assert model.config.hidden_size == sizes.hidden_size
    assert model.config.vocab_size == sizes.vocab_size == tokenizer.vocab_size


def test_stores_matrices_in_fp8_and_experts_in_fp4(nano):
    _, variables = nano
    block = variables["params"]["layers_0"]["block_0"]
    assert block["attn"]["wq_a"]["weight"].kind == "fp8"
    assert block["ffn"]["experts"]["w1"].kind == "fp4"


def test_hash_tables_name_distinct_experts(nano):
    model, variables = nano
    hashed = [i for i, layer in enumerate(model.config.layers) if layer.routing == "hash"]
    assert hashed
    for layer in hashed:
        table = np.asarray(
            variables["buffers"][f"layers_{layer}"]["block_0"]["ffn"]["gate"]["tid2eid"]
        )
        assert (np.diff(np.sort(table, axis=1), axis=1) > 0).all()
        assert table.min() == 0 and table.max() == model.config.n_routed_experts - 1


def test_reads_files_it_was_not_trained_on(nano, source):
    """The standard library of another Python has other text, hence the room."""
    model, variables = nano
    recorded = json.loads((EXPERIMENT / "held_out.json").read_text())["nano"]
    rows = take(TextRows(source.held_out, 0), range(SAMPLED_ROWS), 0, LENGTH, 1)
    batch = make_batch(*rows, 1)
    nats, _, count = jax.jit(functools.partial(evaluate.sums, model))(variables, batch)
    assert nats / count < recorded["first_rows_nats_per_token"] + 0.3
    assert nats / count < 0.6 * np.log(model.config.vocab_size)


def test_finds_a_fact_far_beyond_its_window(nano, source, tokenizer, monkeypatch):
    """As the experiment measures it, at a length where few of the facts are within the window."""
    monkeypatch.syspath_prepend(str(EXPERIMENT))
    measure = importlib.import_module("evaluate")
    monkeypatch.setattr(measure, "TRIALS", 10)
    model, variables = nano
    last = jax.jit(functools.partial(measure.last_logits, model))
    found = measure.needle(last, variables, source, tokenizer, 1024)
    recorded = json.loads((EXPERIMENT / "held_out.json").read_text())["nano"]["needle_found"]
    print("found", found, "recorded", recorded["1024"])
    assert found > recorded["1024"] - 0.2 and found > 0.5


def test_writes_something_like_python_and_the_same_again(nano, tokenizer):
    """Drawn, because the most likely token every time runs in circles in a model so small."""
    model, variables = nano
    prompts = 2 * ["def", "import", "class", "    def __init__(self"]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    first, again = (
        v4jax.generate(
            model, variables, ids, max_new_tokens=64, temperature=0.9, top_p=0.95, seed=1
        )
        for _ in range(2)
    )
    assert first.tokens == again.tokens
    text = "".join(tokenizer.decode(row) for row in first.tokens)
    for piece in ("(self", "):\n        ", " = ", "self."):
        assert piece in text


def test_text_survives_the_tokenizer(tokenizer):
    text = "def f(x: 'ä') -> None:\n\treturn  x[::2]  # 漢\r\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
