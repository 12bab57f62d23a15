"""The streamed model has the numbers of the model in memory, and reads no more than it needs."""

import collections
import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest

import v4jax
from tests.support.checkpoints import small_config, synthetic
from tests.support.tiny import tiny_model
from v4jax.config import CSA, HCA, WINDOW, with_hash_routing
from v4jax.errors import InputError
from v4jax.hf.tensors import tensor_table

ROOM = 64
# Chunks of two rows: tokens of each in one call, more or fewer than a block of entries or a window.
CHUNKS = [(16, (16, 13)), (16, (9, 16)), (1, None), (1, None)]
# All layer kinds; two of the three sets with the sweeps alone, since each compiles for 15 s.
KINDS = [
    "released",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ablated", "all_visible")),
]
AUX = ("streams", "router_experts", "mhc")


@dataclasses.dataclass
class Pair:
    """The same checkpoint in memory and streamed."""

    path: str
    model: v4jax.Transformer
    params: dict
    streamed: object
    source: object

    def close(self, whole, parts, rtol=1e-5):
        whole, parts = np.asarray(whole, np.float32), np.asarray(parts, np.float32)
        np.testing.assert_allclose(parts, whole, rtol=0, atol=rtol * np.abs(whole).max())


@functools.partial(jax.jit, static_argnames=("model", "logits", "aux"))
def in_memory(model, params, tokens, cache, lengths, logits="last", aux=()):
    return model.apply(params, tokens, cache=cache, lengths=lengths, logits=logits, aux=aux)


def pair_of(path, **options):
    model, params = v4jax.load(path, **options)
    streamed, source = v4jax.load(path, stream=True, **options)
    # One expert a group, so that the experts of a layer are several groups.
    return Pair(path, model, params, streamed.clone(group_bytes=source.expert_bytes), source)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    model, params = tiny_model(request.param)
    path = str(tmp_path_factory.mktemp(request.param) / "checkpoint")
    v4jax.save_official(path, model.config, params)
    pair = pair_of(path)
    with pair.source:
        yield pair


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Every layer kind in FP8 and FP4, as the released models are stored."""
    config = small_config(layers=with_hash_routing((WINDOW, CSA, HCA), 1))
    return synthetic(tmp_path_factory.mktemp("stored") / "checkpoint", config)


def tokens_of(config, width, seed=0):
    return np.random.default_rng([seed, width]).integers(0, config.vocab_size, (2, width), np.int32)


def test_chunks_and_decode(pair):
    whole = pair.model.init_cache(2, ROOM)
    parts = pair.streamed.init_cache(2, ROOM)
    for seed, (width, lengths) in enumerate(CHUNKS):
        tokens = tokens_of(pair.model.config, width, seed)
        lengths = np.array((width,) * 2 if lengths is None else lengths, np.int32)
        one = in_memory(pair.model, pair.params, tokens, whole, lengths)
        other = pair.streamed.apply(
            pair.source, tokens, cache=parts, lengths=lengths, logits="last"
        )
        pair.close(one.logits, other.logits)
        whole, parts = one.cache, other.cache
    assert parts.lengths.tolist() == whole.lengths.tolist()
    assert parts.spare.tolist() == whole.spare.tolist()


def test_whole_rows_with_auxiliary_outputs(pair):
    tokens = tokens_of(pair.model.config, 16)
    one = in_memory(pair.model, pair.params, tokens, None, None, "all", AUX)
    other = pair.streamed.apply(pair.source, tokens, aux=AUX)
    pair.close(one.logits, other.logits)
    assert one.aux.keys() == other.aux.keys()
    for name, layers in one.aux.items():
        assert layers.keys() == other.aux[name].keys()
    for layer, chosen in one.aux["router_experts"].items():
        assert np.array_equal(chosen, other.aux["router_experts"][layer])
        pair.close(one.aux["streams"][layer], other.aux["streams"][layer])


@pytest.mark.parametrize(
    "options",
    [{"numerics": "native"}, pytest.param({"weights": "bf16"}, marks=pytest.mark.slow)],
)
def test_stored_fp8_and_fp4(stored, options):
    pair = pair_of(stored, **options)
    with pair.source:
        whole, parts = pair.model.init_cache(2, ROOM), pair.streamed.init_cache(2, ROOM)
        for width, lengths in ((16, (16, 11)), (1, (1, 1))):
            tokens, lengths = tokens_of(pair.model.config, width), np.array(lengths, np.int32)
            one = in_memory(pair.model, pair.params, tokens, whole, lengths)
            other = pair.streamed.apply(
                pair.source, tokens, cache=parts, lengths=lengths, logits="last"
            )
            # Activations are bfloat16, of 8 bits.
            pair.close(one.logits, other.logits, rtol=2**-6)
            whole, parts = one.cache, other.cache


def recorded(source, monkeypatch):
    """Counts the reads of each tensor."""
    reads = collections.Counter()
    opened = source._source.open_parts

    @contextlib.contextmanager
    def open_parts(item):
        with opened(item) as read:

            def counting(key, *rest):
                reads[key] += 1
                read(key, *rest)

            yield counting

    monkeypatch.setattr(source._source, "open_parts", open_parts)
    return reads


def test_reads_each_tensor_once_and_only_the_chosen_experts(stored, monkeypatch):
    model, source = v4jax.load(stored, stream=True, numerics="native")
    tables = {spec.key: spec for spec in tensor_table(model.config)}
    embed, head = (tables.pop(name) for name in ("embed.weight", "head.weight"))
    tokens, lengths = tokens_of(model.config, 16), np.array([3, 1])
    aux = ("router_experts",)
    with source:
        reads = recorded(source, monkeypatch)
        cache = model.init_cache(2, ROOM)
        out = model.apply(source, tokens, cache=cache, lengths=lengths, aux=aux)
        for number, spec in tables.items():
            # Only those that real tokens chose, three of one row and one of the other.
            chosen = np.asarray(out.aux["router_experts"].get(spec.layer, np.zeros((2, 16, 1))))
            real = {*chosen[0, :3].flat, *chosen[1, :1].flat}
            assert reads[number] == (spec.expert is None or spec.expert in real), number
        reads.clear()
        before = source.meter.bytes
        out = model.apply(source, tokens[:, :1], cache=out.cache, aux=aux)
        needed = head.nbytes + len({*tokens[:, 0]}) * embed.nbytes // model.config.vocab_size
        for number, spec in tables.items():
            chosen = out.aux["router_experts"].get(spec.layer, ())
            asked = spec.expert is None or spec.expert in np.asarray(chosen)
            assert reads[number] == asked, number
            needed += spec.nbytes * asked
        assert source.meter.bytes - before == needed


@pytest.mark.slow
def test_the_first_layers_alone(stored):
    whole, params = v4jax.load(stored, min_repeats=99, numerics="native")
    count = 2
    cut = dataclasses.replace(whole.config, layers=whole.config.layers[:count], mtp_layers=())
    names = {f"layers_{i}" for i in range(count)} | {"embed", "hc_head", "norm", "head"}
    params = {
        kind: {name: leaf for name, leaf in tree.items() if name in names}
        for kind, tree in params.items()
    }
    model = whole.clone(config=cut)
    streamed, source = v4jax.load(stored, stream=True, layers=count, numerics="native")
    tokens = tokens_of(cut, 16)
    with source:
        found = streamed.apply(source, tokens).logits
    wanted = in_memory(model, params, tokens, None, None, "all").logits
    np.testing.assert_allclose(found, wanted, atol=2**-6 * np.abs(wanted).max(), rtol=0)


def test_streams_can_be_watched_and_replaced(pair):
    tokens, seen = tokens_of(pair.model.config, 16), {}
    watched = pair.streamed.clone(on_layer=seen.__setitem__)
    out = watched.apply(pair.source, tokens, aux=("streams",))
    assert seen.keys() == out.aux["streams"].keys()
    assert all(np.array_equal(seen[i], out.aux["streams"][i]) for i in seen)
    last = max(seen)
    ablated = pair.streamed.clone(on_layer=lambda layer, h: seen[last] if layer == last else 0 * h)
    assert np.array_equal(ablated.apply(pair.source, tokens).logits, out.logits)
    wrong = pair.streamed.clone(on_layer=lambda layer, h: h[:1])
    with pytest.raises(InputError, match="on_layer returned an array of shape"):
        wrong.apply(pair.source, tokens)


@pytest.mark.slow
def test_generate(stored):
    prompts = [list(range(30)), [7, 3, 3, 9]]
    options = {"max_new_tokens": 6, "max_length": ROOM, "prefill_chunk": 16}
    model, params = v4jax.load(stored, numerics="native")
    streamed, source = v4jax.load(stored, stream=True, numerics="native")
    with source:
        for sampled in ({}, {"temperature": 1.0, "seed": 3}):
            whole = v4jax.generate(model, params, prompts, **options, **sampled)
            parts = v4jax.generate(streamed, source, prompts, **options, **sampled)
            assert parts.tokens == whole.tokens


def test_a_stopped_row_reads_no_further(pair):
    layers = []
    model = pair.streamed.clone(on_layer=lambda layer, h: layers.append(layer))
    options = {"max_length": ROOM, "prefill_chunk": 16}
    rows = [[5], [5]]  # two as elsewhere, so that programs are those of other tests
    first = v4jax.generate(model, pair.source, rows, max_new_tokens=1, **options).tokens[0][0]
    layers.clear()
    result = v4jax.generate(model, pair.source, rows, stop_ids=first, max_new_tokens=9, **options)
    assert result.finish_reason == ["stop", "stop"]
    assert len(layers) == len(model.config.layers)


@pytest.mark.slow
def test_orbax(tmp_path):
    model, params = tiny_model("released")
    v4jax.save_orbax(tmp_path / "orbax", model.config, params)
    streamed, source = v4jax.load(tmp_path / "orbax", stream=True)
    tokens = tokens_of(model.config, 16)
    with source:
        found = streamed.apply(source, tokens).logits
    wanted = in_memory(model, params, tokens, None, None, "all").logits
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


def test_a_file_cut_short_while_it_is_open(tmp_path):
    model, params = tiny_model("released")
    v4jax.save_official(tmp_path / "cut", model.config, params)
    streamed, source = v4jax.load(tmp_path / "cut", stream=True)
    for file in (tmp_path / "cut").glob("*.safetensors"):
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size // 2)
    with source, pytest.raises(InputError, match="it was cut short"):
        streamed.apply(source, np.array([[1, 2, 3]]))
    with pytest.raises(InputError, match="truncated"):
        v4jax.load(tmp_path / "cut", stream=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream": True, "layers": 0}, "layers is 0; expected 1 to 3"),
        ({"stream": True, "layers": 4}, "layers is 4; expected 1 to 3"),
        ({"stream": True, "layers": True}, "layers is True"),
        ({"layers": 2}, "layers is 2 without stream"),
        ({"stream": True, "min_repeats": 2}, "stream=True came with min_repeats"),
        ({"stream": True, "numerics": "native", "dtype": "float32"}, "numerics='native'"),
    ],
)
def test_bad_options(stored, options, message):
    with pytest.raises(InputError, match=message):
        v4jax.load(stored, **options)


def test_calls_that_a_streamed_model_refuses(stored):
    model, source = v4jax.load(stored, stream=True)
    tokens = np.array([[1, 2, 3]])
    with source, pytest.raises(InputError, match="mtp=True of a streamed model"):
        model.apply(source, tokens, mtp=True)
    with pytest.raises(InputError, match="was closed; load it again"):
        model.apply(source, tokens)
    with pytest.raises(InputError, match="of type dict; expected what v4jax.load"):
        model.apply({}, tokens)
