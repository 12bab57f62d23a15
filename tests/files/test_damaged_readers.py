"""Every reader of a small file, given damage: it reads the file or says in a sentence why not."""

import json
import os
import struct
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.infer.test_tokenizer import byte_level
from tests.support.checkpoints import small_config, synthetic
from v4jax.checkpoints.journal import Journal
from v4jax.checkpoints.load import load_variables, save_orbax
from v4jax.checkpoints.orbax import OrbaxSource
from v4jax.checkpoints.source import FolderSource
from v4jax.config import WINDOW
from v4jax.datasets import files
from v4jax.errors import InputError
from v4jax.files.safetensors import INDEX_NAME
from v4jax.files.zarr import ZarrArray
from v4jax.hf.config import read_config
from v4jax.infer.cache_file import load_cache, save_cache
from v4jax.infer.tokenizer import Tokenizer
from v4jax.kernels import blocks
from v4jax.model.cache import Cache
from v4jax.model.transformer import Transformer

DEEP = 100_000
WRONG = (None, True, False, 0, -1, 7, 1.5, "", "x", "..", "a\0b", "\ud83d", [], {}, [[]], [None])
WRONG += (["x"], {"x": 1}, 10**400, -(10**400), 2**63, 1e308, "x" * 10**4, [0] * 10**4)
RAW = ["NaN", "-Infinity", "1e999", "[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP, "9" * 5000]
RAW += ['{"a": 1, "a": 2}', "[1,]", "'x'", "\ufeff", ""]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder with one of each small file, as we write them."""
    root = tmp_path_factory.mktemp("originals")
    config = small_config(layers=(WINDOW,))
    synthetic(root / "official", config)
    save_orbax(root / "orbax", *load_variables(root / "official"))
    (root / "text").mkdir()
    (root / "text" / "a.jsonl").write_text('{"text": [["a", 1], ["b", 0]], "name": "n"}\n')
    (root / "text" / "b.json").write_text('[{"text": "c"}]')
    (root / "chat").mkdir()
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (root / "chat" / "a.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    (root / "tokens").mkdir()
    np.save(root / "tokens" / "a.npy", np.array([0, 1, 2], np.int32))
    (root / "tokenizer").mkdir()
    byte_level().save(str(root / "tokenizer" / "tokenizer.json"))
    described = {"add_bos_token": True, "bos_token": {"content": "<bos>"}}
    (root / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(described))
    (root / "blocks.json").write_text('{"h100": {"sparse_attention": {"keys": 16}}}')
    (root / "journal").mkdir()
    Journal(str(root / "journal"), PURPOSE).add("embed", {"embed.weight": 5})
    save_cache(root / "cache.safetensors", CACHE, MODEL, PARAMS)
    return root


PURPOSE = {"source": "a", "to": "orbax", "weights": "stored", "content": "b"}
MODEL = Transformer(small_config(layers=(WINDOW,)))
PARAMS = {"params": {"w": np.arange(4, dtype=np.float32)}}
CACHE = Cache(np.zeros(1, np.int32), np.zeros(1, np.int32), (), 8, 1)


def read_blocks(root):
    try:
        blocks.read.__wrapped__(root / "blocks.json")
    except ValueError as error:  # what the kernels' own files raise
        raise InputError(str(error)) from None


def read_zarr(root):
    folder = root / "orbax" / "items" / "embed" / "params.embed.weight"
    config = small_config()
    ZarrArray(str(folder), (config.vocab_size, config.hidden_size))


def opened(kind, name):
    return lambda root: kind(str(root / name)).close()


# The file, and what reads it.
READERS = {
    "official/config.json": lambda root: read_config(root / "official" / "config.json"),
    f"official/{INDEX_NAME}": opened(FolderSource, "official"),
    "official/model-00001-of-00004.safetensors": opened(FolderSource, "official"),
    "orbax/v4jax.json": opened(OrbaxSource, "orbax"),
    "orbax/items/embed/params.embed.weight/.zarray": read_zarr,
    "journal/.incomplete": lambda root: Journal(str(root / "journal"), PURPOSE),
    "tokenizer/tokenizer_config.json": lambda root: Tokenizer(root / "tokenizer"),
    "tokenizer/tokenizer.json": lambda root: Tokenizer(root / "tokenizer"),
    "text/a.jsonl": lambda root: files.text_documents(str(root / "text/a.jsonl")),
    "text/b.json": lambda root: files.text_documents(str(root / "text/b.json")),
    "chat/a.jsonl": lambda root: files.chat_documents(str(root / "chat/a.jsonl")),
    "tokens/a.npy": lambda root: files.token_arrays(str(root / "tokens")),
    "blocks.json": read_blocks,
    "cache.safetensors": lambda root: load_cache(root / "cache.safetensors", CACHE, MODEL, PARAMS),
}


def lines_of(name, content):
    """The JSON values of a file, and a function that makes the file of others."""
    if name.endswith(".safetensors"):
        size = struct.unpack("<Q", content[:8])[0]

        def safetensors(texts):
            return struct.pack("<Q", len(texts[0])) + texts[0] + content[8 + size :]

        return [content[8 : 8 + size]], safetensors
    if name.endswith((".jsonl", ".incomplete")):
        return content.split(b"\n")[:-1], lambda texts: b"".join(text + b"\n" for text in texts)
    return [content], lambda texts: texts[0]


def places(value, path=()):
    """The paths to all values of a JSON value; of long lists and objects to the first ones."""
    yield path
    if isinstance(value, dict | list):
        children = list(value.items() if isinstance(value, dict) else enumerate(value))
        for key, child in children[:30]:
            yield from places(child, (*path, key))


def changed(value, path, how):
    """The JSON value with another one, none or a repeated one at a place, as text."""
    if not path:
        return json.dumps(how) if not isinstance(how, str | bytes) else how
    mark = "<<here>>"
    *above, last = path
    node = value
    for key in above:
        node = node[key]
    node[last] = mark
    return json.dumps(value).replace(json.dumps(mark), how if isinstance(how, str) else "")


def spoilt(draw, name, content):
    """A file with one damage."""
    if draw(st.booleans()) and not name.endswith((".npy", "tokenizer.json")):
        texts, join = lines_of(name, content)
        at = draw(st.integers(0, len(texts) - 1))
        value = json.loads(texts[at])
        path = draw(st.sampled_from(list(places(value))))
        how = draw(st.sampled_from([json.dumps(wrong) for wrong in WRONG] + RAW))
        texts[at] = changed(value, path, how).encode()
        return join(texts)
    raw = bytearray(content)
    at = draw(st.integers(0, min(len(raw), 2000) - 1))
    match draw(st.sampled_from(["flip", "cut", "insert", "byte"])):
        case "flip":
            raw[at] ^= 1 << draw(st.integers(0, 7))
        case "byte":
            raw[at] = draw(st.sampled_from(b"[{\"'0-.\\\xff\x00"))
        case "cut":
            del raw[at:]
        case "insert":
            raw[at:at] = draw(st.binary(min_size=1, max_size=20))
    return bytes(raw)


def reads_or_says_why(root, name, content, must_refuse=False):
    path = root / name
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[name](root)
        assert not must_refuse
    except InputError as error:
        sentence = str(error)
        assert "\n" not in sentence and len(sentence.replace(str(root), "")) < 1000, sentence
        assert str(root) in sentence, sentence
    finally:
        path.write_bytes(whole)


def never_a_traceback(originals, name, examples):
    @settings(
        deadline=None, max_examples=examples, suppress_health_check=list(HealthCheck), database=None
    )
    @given(st.data())
    def check(data):
        whole = (originals / name).read_bytes()
        reads_or_says_why(originals, name, spoilt(data.draw, name, whole))

    READERS[name](originals)
    check()


@pytest.mark.parametrize("name", READERS)
def test_damage_is_named(originals, name):
    never_a_traceback(originals, name, 25)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_much_damage_is_named(originals, name):
    never_a_traceback(originals, name, 2000)


@pytest.mark.parametrize("name", [name for name in READERS if not name.endswith("npy")])
def test_deep_nesting_is_named(originals, name):
    texts, join = lines_of(name, (originals / name).read_bytes())
    deep_lists = b"[" * DEEP, b"[" * DEEP + b"]" * DEEP
    # A .json file of data that is an object is text.
    for deep in deep_lists + (b'{"a":' * DEEP,) * (name != "text/b.json"):
        reads_or_says_why(originals, name, join([deep, *texts[1:]]), must_refuse=True)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", READERS)
def test_a_pipe_in_place_of_a_file_is_named(originals, name, tmp_path):
    path = originals / name
    path.rename(tmp_path / "aside")
    os.mkfifo(path)
    try:
        with pytest.raises(InputError, match="is a pipe; expected a regular file|no data file"):
            READERS[name](originals)
    finally:
        path.unlink()
        (tmp_path / "aside").rename(path)
