"""The checkpoint that comes with the package: it loads, fits, has learned Python and writes it."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import v4jax
from v4jax import checkpoint
from v4jax.infer.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = ROOT / "experiments" / "000_nano"
LARGEST = 8_000_000
SAMPLED_ROWS, LENGTH = 8, 512  # the rows of results.json's "stored_sample"


@pytest.fixture(scope="module")
def nano():
    return v4jax.load("nano")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(checkpoint.locate("nano"))


@pytest.fixture(scope="module")
def corpus():
    """experiments/000_nano/corpus.py, which is no package."""
    spec = importlib.util.spec_from_file_location("nano_corpus", EXPERIMENT / "corpus.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_reads_files_it_was_not_trained_on(nano, tokenizer, corpus):
    """The standard library of another Python has other text, hence the room."""
    model, variables = nano
    recorded = json.loads((EXPERIMENT / "results.json").read_text())["stored_sample"]
    texts = [text for name, text in corpus.source_files().items() if corpus.is_held_out(name)]
    stream = np.concatenate([[0, *tokenizer.encode(text), 1] for text in texts])
    rows = jnp.asarray(corpus.held_out_rows(stream, LENGTH + 1)[:SAMPLED_ROWS], jnp.int32)
    nats = _nats_per_token(model, variables, rows)
    assert nats < recorded + 0.3
    assert nats < 0.6 * np.log(model.config.vocab_size)


def _nats_per_token(model, variables, rows_BT):
    @jax.jit
    def loss(variables, rows_BT):
        logp = jax.nn.log_softmax(model.apply(variables, rows_BT[:, :-1]).logits, axis=-1)
        return -jnp.take_along_axis(logp, rows_BT[:, 1:, None], axis=-1).mean()

    return float(loss(variables, rows_BT))


def test_writes_something_like_python_and_the_same_again(nano, tokenizer):
    """Drawn, because the most likely token every time runs in circles in a model so small."""
    model, variables = nano
    prompts = ["def ", "import ", "class ", "    def __init__(self"]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    first, again = (
        v4jax.generate(model, variables, ids, max_new_tokens=64, temperature=0.7, seed=1)
        for _ in range(2)
    )
    assert first.tokens == again.tokens
    text = "".join(tokenizer.decode(row) for row in first.tokens)
    for piece in ("(self", "):\n        ", " = ", "self."):
        assert piece in text


def test_text_survives_the_tokenizer(tokenizer):
    text = "def f(x: 'ä') -> None:\n\treturn  x[::2]  # 漢\r\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_even_hash_table(corpus):
    counts = (1e6 / np.arange(1, 301)).astype(int)  # Zipf's law
    table = corpus.hash_table(counts, experts=6, k=2, seed=0)
    load = np.bincount(table.reshape(-1), np.repeat(counts, 2))
    assert (table[:, 0] != table[:, 1]).all()
    assert load.max() / load.mean() < 1.01


def test_detached_spaces_change_no_text(corpus):
    path = Path(checkpoint.locate("nano")) / "tokenizer.json"
    raw = tokenizers.Tokenizer.from_file(str(path))
    text = "import os\n\n\ndef path(self):\n    return os.path.join(self.name, None)\n" * 50
    ids = np.asarray(raw.encode(text).ids, np.int32)
    longer = corpus.detach_spaces(ids, raw, seed=0)
    assert longer.size > ids.size
    assert raw.decode(longer.tolist()) == text
