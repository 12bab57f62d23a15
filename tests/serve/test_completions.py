"""POST /v1/completions and what lies about it, held against the engine alone."""

import json

import numpy as np
import pytest

import v4jax
from tests.support import servers
from v4jax.engine.request import Request

PROMPT = "def area(self"


@pytest.fixture(scope="module")
def client(engine):
    with servers.in_process(servers.serving(engine)) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer():
    return v4jax.Tokenizer("nano")


def complete(client, prompt=PROMPT, status=200, **fields):
    fields = {"max_tokens": 8, "temperature": 0} | fields
    body = json.dumps({"prompt": prompt, "model": "nano"} | fields)  # halves of surrogates too
    found = client.post("/v1/completions", content=body)
    assert found.status_code == status, found.text
    return found.json()


def streamed(client, prompt=PROMPT, **fields):
    """The chunks of a streamed answer, which ends as it has to."""
    fields = {"max_tokens": 8, "temperature": 0, "stream": True} | fields
    found = client.post("/v1/completions", json={"prompt": prompt} | fields)
    assert found.headers["content-type"].startswith("text/event-stream")
    *messages, end = [each for each in found.text.split("\n\n") if each]
    assert end == "data: [DONE]"
    return [json.loads(each.removeprefix("data: ")) for each in messages if each[0] != ":"]


def alone(engine, ids, count=8, **options):
    return engine.submit(Request(ids, max_new_tokens=count, stop_ids=(1,), **options)).result()


def test_the_four_forms_of_a_prompt(client, engine, tokenizer):
    ids = tokenizer.encode(PROMPT)
    expected = alone(engine, [0, *ids]).text
    bare = alone(engine, ids).text
    assert complete(client)["choices"][0]["text"] == expected
    assert complete(client, add_special_tokens=False)["choices"][0]["text"] == bare
    assert complete(client, ids)["choices"][0]["text"] == bare
    found = complete(client, [PROMPT, "class A"])
    assert [each["index"] for each in found["choices"]] == [0, 1]
    assert found["choices"][0]["text"] == expected
    found = complete(client, [ids, [0, *ids], ids])
    assert [each["text"] for each in found["choices"]] == [bare, expected, bare]
    assert found["usage"]["prompt_tokens"] == 3 * len(ids) + 1
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + 24


def test_scoring_as_lm_eval_does_it(client, engine, tokenizer):
    """Sum of token_logprobs over the continuation; greedy where it is the largest of its places."""
    ids = [0, *tokenizer.encode("def f(x):\n    return x")]
    settings = {"max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    found = complete(client, [ids], **settings)["choices"][0]["logprobs"]
    assert len(found["tokens"]) == len(ids) + 1
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    np.testing.assert_allclose(found["token_logprobs"][1:-1], engine.score(ids), atol=1e-6)
    for own, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True):
        assert own in top.values() and max(top.values()) >= own and 1 <= len(top) <= 2
    greedy = alone(engine, ids[:5], 1, logprobs=1).tokens[0] == ids[5]
    assert greedy == (found["token_logprobs"][5] == max(found["top_logprobs"][5].values()))


def test_echo_and_offsets(client, tokenizer):
    found = complete(client, "héllo 東", echo=True, logprobs=3)["choices"][0]
    assert found["text"].startswith("héllo 東")
    told = found["logprobs"]
    assert told["tokens"][0] == "<|bos|>" and told["text_offset"][:2] == [0, 0]
    assert told["text_offset"] == sorted(told["text_offset"])
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert found["text"][offset : offset + len(token)] == token
    assert any(token.startswith("bytes:\\x") for token in told["tokens"])
    only = complete(client, "héllo", echo=True, max_tokens=0)
    assert only["choices"][0]["text"] == "héllo"
    assert only["choices"][0]["finish_reason"] == "length"
    scored = complete(client, "héllo", echo=True, max_tokens=0, logprobs=0)["choices"][0]
    assert len(scored["logprobs"]["tokens"]) == only["usage"]["prompt_tokens"]


def test_a_stream_joins_to_the_whole(client):
    for fields in ({}, {"echo": True}, {"echo": True, "logprobs": 2}, {"n": 2, "logprobs": 0}):
        whole = complete(client, **fields)
        chunks = streamed(client, stream_options={"include_usage": True}, **fields)
        assert chunks[-1]["choices"] == []
        counts = ("prompt_tokens", "completion_tokens", "total_tokens")
        for name in counts:
            assert chunks[-1]["usage"][name] == whole["usage"][name]
        for expected in whole["choices"]:
            mine = [
                each
                for chunk in chunks
                for each in chunk["choices"]
                if each["index"] == expected["index"]
            ]
            assert "".join(each["text"] for each in mine) == expected["text"]
            assert mine[-1]["finish_reason"] == expected["finish_reason"]
            if expected["logprobs"] is not None:
                for name, values in expected["logprobs"].items():
                    assert sum((each["logprobs"][name] for each in mine), []) == values
    assert streamed(client, echo=True, max_tokens=0)[0]["choices"][0]["text"] == PROMPT


def test_seeds_and_copies(client, engine, tokenizer):
    drawn = {"temperature": 1.3, "seed": 7, "n": 3, "top_p": 0.9, "top_k": 50, "min_p": 0.01}
    found = [each["text"] for each in complete(client, **drawn)["choices"]]
    assert found == [each["text"] for each in complete(client, **drawn)["choices"]]
    assert len(set(found)) > 1
    settings = {"temperature": 1.3, "seed": 7, "top_p": 0.9, "top_k": 50, "min_p": 0.01}
    ids = [0, *tokenizer.encode(PROMPT)]
    assert found == [alone(engine, ids, row=row, **settings).text for row in range(3)]
    assert complete(client, **drawn | {"seed": 2**32 + 7, "n": 1})["choices"][0]["text"] == found[0]


def test_stop_texts_and_ids(client, engine, tokenizer):
    ids = [0, *tokenizer.encode(PROMPT)]
    whole = alone(engine, ids, 24)
    stop = whole.text[5:8]
    found = complete(client, max_tokens=24, stop=["\0never", stop], echo=True)["choices"][0]
    assert found["text"] == PROMPT + whole.text[: whole.text.index(stop)]
    assert found["finish_reason"] == "stop"
    at = whole.tokens[3]
    found = complete(client, max_tokens=24, stop_token_ids=[at])
    assert found["usage"]["completion_tokens"] == whole.tokens.index(at)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2048]}, "prompt"),
        ({"prompt": "", "add_special_tokens": False}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "8"}, "max_tokens"),
        ({"max_tokens": 1e300}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"echo": "yes"}, "echo"),
        ({"seed": -1}, "seed"),
        ({"stop": 3}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["\udfff"]}, "stop"),
        ({"stop_token_ids": [99999]}, "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"suffix": "x"}, "suffix"),
        ({"logit_bias": {"2048": 2}}, "logit_bias"),
        ({"logit_bias": {"-1": 2}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_wrong_fields_are_named(client, fields, param):
    error = complete(client, **{"status": 400} | fields)["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


def test_penalties_and_biases(client, engine, tokenizer):
    ids = [0, *tokenizer.encode(PROMPT)]
    asked = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.2}
    settings = {"frequency": 1.5, "presence": 0.5, "repetition": 1.2, "bias": {9: 100.0}}
    found = complete(client, **asked, logit_bias={"9": 100})["choices"][0]["text"]
    assert found == alone(engine, ids, **settings).text


def test_what_changes_nothing_is_taken(client):
    neutral = {"logit_bias": {}, "presence_penalty": 0, "suffix": None, "user": "u", "best_of": 1}
    assert complete(client, **neutral)["choices"][0]["finish_reason"] == "length"


def test_too_long_and_unknown(client):
    for count in (servers.LENGTH + 20, servers.LENGTH - 4):
        code = complete(client, [5] * count, 400)["error"]["code"]
        assert code == "context_length_exceeded"
    assert len(complete(client, [5] * (servers.LENGTH - 1), max_tokens=None)["choices"]) == 1
    assert complete(client, status=404, model="gpt")["error"]["code"] == "model_not_found"
    for path, status in (("/nothing", 404), ("/v1/models/x", 404), ("/v1/completions", 405)):
        found = client.get(path)
        assert found.status_code == status and found.json()["error"]["message"]


def test_models_and_tokens(client, tokenizer):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "nano" and client.get("/v1/models/nano").json() == model
    about = client.get("/tokenizer_info").json()
    assert about["bos_token"] == "<|bos|>" and about["eos_token"] == "<|eos|>"
    assert about["chat_template"] is None and "pad_token" in about
    text = "héllo <|eos|> 東京"
    ids = tokenizer.encode(text)
    assert 1 not in ids  # what a user writes is text
    assert client.post("/tokenize", json={"prompt": text}).json()["tokens"] == [0, *ids]
    plain = {"prompt": text, "add_special_tokens": False}
    assert client.post("/tokenize", json=plain).json()["tokens"] == ids
    assert client.post("/detokenize", json={"tokens": [0, *ids]}).json()["prompt"] == text
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 3}),
        ("/detokenize", {"tokens": "x"}),
        ("/detokenize", {"tokens": [2048]}),
        ("/detokenize", {"tokens": [1], "more": 1}),
    ):
        assert client.post(path, json=body).status_code == 400


def test_the_names_of_6_5(client):
    complete(client)
    found = client.get("/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    names = {
        line.split()[2]: line.split()[3] for line in found.text.splitlines() if "# TYPE" in line
    }
    assert {name: kind for name, kind in names.items() if not name.endswith("_created")} == {
        "requests_total": "counter",
        "queue_depth": "gauge",
        "slots_busy": "gauge",
        "prompt_tokens_total": "counter",
        "cached_tokens_total": "counter",
        "output_tokens_total": "counter",
        "draft_accepted_total": "counter",
        "draft_rounds_total": "counter",
        "time_to_first_token_seconds": "histogram",
        "inter_token_seconds": "histogram",
        "request_seconds": "histogram",
        "prefix_cache_bytes": "gauge",
        "prefix_cache_units": "gauge",
        "compilations_total": "counter",
        "step_seconds": "summary",
    }
    assert 'requests_total{endpoint="completions",status="200"}' in found.text
    assert 'prefix_cache_bytes{tier="memory"}' in found.text
    assert 'step_seconds_count{kind="decode"}' in found.text


def test_a_checkpoint_that_cannot_chat_says_so(client):
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages"):
        found = client.post(path, json={"model": "nano", "messages": []})
        assert found.status_code == 404 and "completions only" in found.text
    assert not client.get("/v1/models").json()["data"][0]["chat"]


def test_prefixes_are_found_again(client):
    prompt = [7 + n % 90 for n in range(300)]
    first = complete(client, prompt)
    again = complete(client, prompt)
    assert first["choices"][0]["text"] == again["choices"][0]["text"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 256
    assert again["usage"]["prompt_cache_hit_tokens"] == 256
    assert again["usage"]["prompt_cache_miss_tokens"] == 44
