"""Programs that one process compiled and another one runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.infer.test_generate import MODEL, PARAMS, PROMPTS
from tests.support.tiny import drawn_wide
from tests.support.toy_model import toy_config
from v4jax.config import WINDOW, with_hash_routing
from v4jax.infer import executables, programs
from v4jax.infer.executables import Executables, Program, executables_of
from v4jax.infer.generate import generate
from v4jax.model.transformer import Transformer

OPTIONS = {"max_new_tokens": 6, "max_length": 60, "prefill_chunk": 16}
NAMES = ["_prefill", "_pick", "_decode"]


@pytest.fixture(scope="module")
def transformer():
    """The least that compiles: one layer, a window."""
    config = toy_config(layers=with_hash_routing((WINDOW,), 1), mtp_layers=(), sliding_window=8)
    model = Transformer(config, dtype="float32")
    return model, drawn_wide(model)


def another_process():
    """Forgets what this one has read and compiled."""
    executables_of.cache_clear()
    jax.clear_caches()


@pytest.fixture
def nothing_traced(monkeypatch):
    """Programs may be run, not made."""

    def forbid():
        for name in NAMES:
            monkeypatch.setattr(programs, name, None)

    return forbid


@pytest.fixture(scope="module")
def kept(transformer, tmp_path_factory):
    """A folder of programs, and what they gave."""
    another_process()
    folder = tmp_path_factory.mktemp("programs")
    model, params = transformer
    return folder, generate(model, params, PROMPTS, programs=folder, **OPTIONS)


def test_the_tokens_are_those_of_programs_compiled_here(kept, transformer, nothing_traced):
    folder, first = kept
    model, params = transformer
    plain = generate(model, params, PROMPTS, **OPTIONS)
    another_process()
    nothing_traced()
    again = generate(model, params, PROMPTS, programs=folder, **OPTIONS)
    assert plain.tokens == first.tokens == again.tokens
    # Other prompts and settings of the same shapes too.
    drawn = generate(model, params, PROMPTS[::-1], programs=folder, temperature=99.0, **OPTIONS)
    assert drawn.tokens != again.tokens[::-1]


def test_what_is_compiled_is_told_with_its_time(kept, transformer, tmp_path):
    folder, first = kept
    told, (model, params) = [], transformer
    options = OPTIONS | {"on_compile": lambda *what: told.append(what)}
    # Where nothing can be written nothing is kept, and all goes on.
    (tmp_path / "file").touch()
    made = generate(model, params, PROMPTS, programs=tmp_path / "file" / "x", **options)
    assert made.tokens == first.tokens
    names = "prefill of 16 tokens, choice of a token, decode step"
    assert told[0] == (names, None) and told[1][0] == names and told[1][1] > 0
    generate(model, params, PROMPTS, programs=folder, **options)
    assert len(told) == 2


def test_what_is_damaged_or_no_program_is_compiled_again(kept, transformer, nothing_traced):
    folder, first = kept
    model, params = transformer
    store = Executables(folder)._store
    one, two, three = sorted(folder.glob("*.entry"))
    untouched = store.read(three.stem)
    one.write_bytes(one.read_bytes()[:-1])
    # Whole, by its checksum, but not what JAX can load.
    store.write(two.stem, b"neither a pickle nor a program")
    another_process()
    assert generate(model, params, PROMPTS, programs=folder, **OPTIONS).tokens == first.tokens
    assert store.read(three.stem) == untouched
    another_process()
    nothing_traced()
    assert generate(model, params, PROMPTS, programs=folder, **OPTIONS).tokens == first.tokens


def test_the_key_is_all_that_a_program_follows_from(transformer, monkeypatch):
    model, _ = transformer
    device, floats = jax.devices()[0], np.zeros(3, np.float32)

    def key(model=model, array=floats, name="decode step"):
        return executables._key(Program(name, None, model, (array, 1.0), array), device)

    changed = dataclasses.replace(model.config, rms_norm_eps=2e-6)
    keys = [
        key(),
        key(name="prefill of 16 tokens"),
        key(model.clone(config=changed)),
        key(model.clone(dtype="bfloat16")),
        key(model.clone(numerics="native")),
        key(array=np.zeros(4, np.float32)),
        key(array=np.zeros(3, np.int32)),
        key(array=jnp.float32(0)),
    ]
    with jax.enable_x64(True):
        keys.append(key())
    with jax.default_matmul_precision("highest"):
        keys.append(key())
    for variable in ("XLA_FLAGS", "V4JAX_BLOCKS"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "another")
            keys.append(key())
    for fact in ("_software", "_instructions"):
        with monkeypatch.context() as patch:
            patch.setattr(executables, fact, lambda: "another")
            keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_other_models_are_left_alone(tmp_path):
    """Only of our own is everything known that a program follows from."""
    generate(MODEL, PARAMS, PROMPTS, max_length=64, max_new_tokens=2, programs=tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
