"""Who may ask, what is refused, what is kept of it; bodies and connections that mean harm."""

import concurrent.futures
import json
import logging
import random
import socket
import time

import httpx2
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.support import servers
from v4jax.errors import InputError
from v4jax.serve import server as server_lib
from v4jax.serve.audit import read
from v4jax.serve.forget import forget
from v4jax.serve.keys import create, revoke

SECRET_TEXT = "my own secret words"
BODY = {"prompt": SECRET_TEXT, "max_tokens": 3, "temperature": 0}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


def ask(client, key=None, body=BODY, path="/v1/completions", **headers):
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    return client.post(path, json=body, headers=headers)


def lines(directory, count):
    """The lines of the log, once there are so many."""
    servers.until(lambda: len(list(read(directory))) >= count, 20)
    return list(read(directory))


def test_keys_scopes_and_limits(echo, path, tmp_path):
    full, _ = create(path, "full")
    chat, _ = create(path, "chat", endpoints=("chat",))
    other, _ = create(path, "other", models=("another",))
    few, _ = create(path, "few", requests_per_minute=2)
    short, _ = create(path, "short", max_context=6)
    tokens, _ = create(path, "tokens", tokens_per_minute=20)
    old, _ = create(path, "old", expires=time.time() - 1)
    watcher, _ = create(path, "prometheus", endpoints=("metrics",))
    audit = tmp_path / "audit"
    parts = servers.serving(echo, keys=path, audit=audit, retention="metadata")
    with servers.in_process(parts) as client:
        assert ask(client, full).status_code == 200
        assert ask(client, **{"x-api-key": full}).status_code == 200
        assert client.get("/health").status_code == 200
        for key in (None, "", "nonsense", "v4jax-" + "A" * 43, old):
            found = ask(client, key)
            assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
        for key in (chat, other, watcher):
            assert ask(client, key).status_code == 403
        bearer = {"authorization": f"Bearer {watcher}"}
        assert client.get("/metrics", headers=bearer).status_code == 200
        assert client.get("/metrics").status_code == 401
        assert client.get("/v1/models").status_code == 401
        assert [ask(client, few).status_code for _ in range(3)] == [200, 200, 429]
        assert int(ask(client, few).headers["retry-after"]) > 0
        assert ask(client, short).json()["error"]["code"] == "context_length_exceeded"
        assert [ask(client, tokens).status_code for _ in range(3)].count(429) >= 1
        # A key that is revoked is refused at once, and so is everybody when others can write.
        revoke(path, "full")
        assert ask(client, full).status_code == 401
        path.chmod(0o666)
        assert ask(client, chat).status_code == 503
    found = lines(audit, 12)
    assert {"key", "endpoint", "status", "total_ms", "prompt_hash"} <= set(found[0])
    assert {each["status"] for each in found} >= {200, 401, 403, 429, 400}
    answered = [each for each in found if each["status"] == 200]
    assert answered[0]["output_tokens"] == 3 and answered[0]["finish"] == "length"
    assert answered[0]["first_token_ms"] <= answered[0]["total_ms"]
    text = "".join(each.read_text() for each in audit.glob("*.jsonl"))
    assert "secret" not in text and not any(key in text for key in (full, chat, few))


def test_texts_are_kept_in_mode_full_alone(echo, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    for mode in ("metadata", "full"):
        audit = tmp_path / mode
        parts = servers.serving(echo, audit=audit, retention=mode)
        with servers.in_process(parts) as client:
            first = ask(client)
            assert ask(client, body=BODY | {"stream": True}).status_code == 200
            assert ask(client, body=BODY | {"stop": [3]}).status_code == 400
            assert SECRET_TEXT not in client.get("/metrics").text
        found = lines(audit, 3)
        assert found[0]["request"] == first.headers["x-request-id"]
        assert found[0]["prompt_hash"] == found[1]["prompt_hash"]
        if mode == "full":
            assert found[0]["prompt"] == [SECRET_TEXT]
            assert found[0]["answer"] == found[1]["answer"] == [first.json()["choices"][0]["text"]]
        else:
            assert not {"prompt", "answer"} & set(found[0])
    assert SECRET_TEXT not in caplog.text


def test_nothing_is_answered_unrecorded(echo, tmp_path, monkeypatch):
    parts = servers.serving(echo, audit=tmp_path / "audit", retention="metadata")
    with servers.in_process(parts) as client:
        assert ask(client).status_code == 200
        monkeypatch.setattr(parts.audit, "append", lambda line: False)
        assert ask(client).json()["error"]["code"] == "audit_log"
        monkeypatch.setattr(parts.audit, "writable", lambda: False)
        found = ask(client)
        assert found.status_code == 503 and "retry-after" in found.headers
        assert ask(client, path="/tokenize", body={"prompt": "x"}).status_code == 503
        assert client.get("/v1/models").status_code == 200


def chunks_read(engine):
    """How many chunks of prompts the engine has read so far."""
    times = engine.stats()["step_seconds"]
    return sum(times[kind][0] for kind in ("read", "both") if kind in times)


def test_a_tenant_learns_nothing_of_anothers_prefixes(engine, path, tmp_path):
    """Nothing of another key's prompt is found or spared, so that no time can tell of it."""
    secrets = [create(path, name)[0] for name in "ab"]
    prompt = {"prompt": [11 + n % 77 for n in range(300)], "max_tokens": 1}
    audit = tmp_path / "audit"
    parts = servers.serving(engine, keys=path, audit=audit, retention="metadata")
    with servers.in_process(parts) as client:
        usage, read_of = [], []
        for who in (0, 0, 1, 1):
            before = chunks_read(engine)
            usage.append(ask(client, secrets[who], prompt).json()["usage"])
            read_of.append(chunks_read(engine) - before)
        assert read_of == [3, 1, 3, 1]
        cached = [each["prompt_tokens_details"]["cached_tokens"] for each in usage]
        assert cached == [0, 256, 0, 256]
        # What is forgotten is gone from memory too, of this key alone.
        ids = [each["key"] for each in lines(audit, 4)]
        forget(audit, None, key=ids[0])

        def cached_of(who):
            usage = ask(client, secrets[who], prompt).json()["usage"]
            return usage["prompt_tokens_details"]["cached_tokens"]

        tokens = np.array(prompt["prompt"], np.int32)
        servers.until(lambda: not engine.cache.lookup(tokens, ids[0]).length, 20)
        assert [cached_of(1), cached_of(0)] == [256, 0]


@pytest.mark.slow
def test_first_tokens_of_a_tenant_come_as_if_nobody_had_asked(engine, path, capsys):
    """Medians over prompts: cold, after another tenant asked the same, and after the tenant did."""
    secrets = [create(path, name)[0] for name in "ab"]
    times: dict[str, list[float]] = {"cold": [], "after another": [], "after itself": []}
    with servers.in_process(servers.serving(engine, keys=path)) as client:
        for number in range(16):
            cold, same = (
                {"prompt": [2 + (7 * i + 31 * number + kind) % 2000 for i in range(1100)]}
                for kind in (0, 1000)
            )
            ask(client, secrets[0], same | {"max_tokens": 1})
            asked = {"cold": cold, "after another": same, "after itself": same}
            for name, body in asked.items():
                began = time.perf_counter()
                ask(client, secrets[1], body | {"max_tokens": 1})
                times[name].append(time.perf_counter() - began)
    cold, other, own = (float(np.median(values[1:])) for values in times.values())
    with capsys.disabled():
        print(f"\ncold {cold:.4f}, after another {other:.4f}, after itself {own:.4f} s")
    assert abs(other - cold) < 0.25 * (cold - own)


def test_without_keys_a_foreign_page_cannot_ask(echo):
    with servers.in_process(servers.serving(echo)) as client:
        assert ask(client, origin="http://evil.example").status_code == 403
        assert ask(client, host="evil.example").status_code == 403
        assert ask(client, host="localhost:8000").status_code == 200
        assert ask(client, host="[::1]:8000").status_code == 200
        assert ask(client, origin="http://localhost").status_code == 200


def test_only_this_machine_is_served_without_keys():
    with server_lib.bound_socket("0.0.0.0", 0) as listening:
        server_lib.check_loopback(listening, True)
        with pytest.raises(InputError, match="there is no key file"):
            server_lib.check_loopback(listening, False)
        port = listening.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: cannot be listened on"):
            server_lib.bound_socket("0.0.0.0", port)
    for host, port in (("no.such.host.invalid", 0), ("127.0.0.1", 99999), ("", -1)):
        with pytest.raises(InputError, match="cannot be listened on"):
            server_lib.bound_socket(host, port)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(2**63), 2**64, 1e308, 5e-324, -0.0, "\ud800", "\0", "<|bos|>"]),
    st.floats(allow_nan=True),
    st.text(max_size=20),
)
VALUE = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3)
)
NAMES = st.sampled_from(
    [
        *("prompt", "max_tokens", "temperature", "top_p", "n", "stop", "echo", "logprobs", "seed"),
        *("stream", "stream_options", "messages", "model", "tools", "tokens", "role", "input"),
        *("add_special_tokens", "response_format", "max_output_tokens"),
    ]
)
BODIES = st.dictionaries(NAMES | st.text(max_size=8), VALUE, max_size=6) | VALUE
PATHS = st.sampled_from(
    ["/v1/completions", "/tokenize", "/detokenize", "/v1/chat/completions", "/v1/responses",
     "/v1/messages"]
)  # fmt: skip


def check_refused(found, body):
    assert found.status_code == 200 or 400 <= found.status_code < 500, (found.text, body)
    assert "Traceback" not in found.text
    if found.status_code != 200:
        assert found.json()["error"]["message"]


def fuzz(client, examples, paths=PATHS):
    @hypothesis.given(paths, BODIES, st.binary(max_size=40), st.integers(0, 3))
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    def check(path, body, raw, kind):
        content = json.dumps(body).encode()
        if kind == 1:
            content = raw
        elif kind == 2:
            content = content[: len(content) // 2] + raw
        found = client.post(path, content=content, headers={"content-type": "application/json"})
        check_refused(found, content)

    check()


def test_fuzzed_bodies(echo):
    with servers.in_process(servers.serving(echo)) as client:
        fuzz(client, 150)


def test_fuzzed_bodies_of_chats(chat_echo, chat_directory):
    with servers.in_process(servers.serving(chat_echo, chat_directory)) as client:
        fuzz(client, 150)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_fuzzed_bodies(chat_echo, chat_directory):
    with servers.in_process(servers.serving(chat_echo, chat_directory)) as client:
        fuzz(client, 10_000)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"a":' * 50_000,
        b'{"prompt": ' + b"9" * 100_000 + b"}",
        b'{"prompt": NaN}',
        b'{"prompt": "\xff"}',
        b"\xef\xbb\xbf{}",
        b"",
        b"null",
    ],
)
def test_bodies_that_are_no_json(echo, content):
    with servers.in_process(servers.serving(echo)) as client:
        found = client.post("/v1/completions", content=content)
        assert found.status_code == 400
        check_refused(found, content[:40])


def test_paths_lead_nowhere_else(echo):
    with servers.in_process(servers.serving(echo)) as client:
        for path in (
            *(
                "/../../etc/passwd",
                "/%2e%2e/%2e%2e/etc/passwd",
                "/v1/models/..%2f..%2fetc%2fpasswd",
            ),
            *("//etc/passwd", "/v1/models/\\..\\..", "/v1/models/%00", "/" + "a" * 5000),
        ):
            assert client.get(path).status_code in (400, 404), path


def test_a_body_that_is_too_long(echo):
    with servers.in_process(servers.serving(echo, max_body_bytes=1000)) as client:
        assert ask(client, body={"prompt": "a" * 2000}).status_code == 413
        whole = json.dumps({"prompt": "a" * 2000}).encode()
        found = client.post(
            "/v1/completions", content=(whole[i : i + 100] for i in range(0, 2000, 100))
        )
        assert found.status_code == 413 and found.headers["connection"] == "close"
        packed = client.post("/v1/completions", content=b"x", headers={"content-encoding": "gzip"})
        assert packed.status_code == 415


def raw(address, content, wait=20.0):
    """What the server says to these bytes until it closes the connection."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        found = b""
        try:
            connection.sendall(content)
            while part := connection.recv(65536):
                found += part
        except TimeoutError:
            return None
        except ConnectionError:
            pass
        return found


def test_connections_that_mean_harm(echo):
    """Silence, half a head, half a body, and floods of headers all end, and others are served."""
    parts = servers.serving(echo, header_seconds=1.0, body_seconds=1.0)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
    with servers.on_loopback(parts) as address:
        wrongs = {
            "silence": b"",
            "half a head": head,
            "half a body": head + b"content-length: 100\r\n\r\n{",
            "long header": head + b"x: " + b"a" * 200_000,
            "many headers": head + b"".join(b"h%d: x\r\n" % n for n in range(20_000)),
            "no http": b"\x16\x03\x01\x00\xff" * 30 + b"\r\n\r\n",
            "two lengths": head + b"content-length: 1\r\ncontent-length: 2\r\n\r\n",
        }
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = dict(
                zip(wrongs, pool.map(lambda x: raw(address, x), wrongs.values()), strict=True)
            )
        assert found["silence"] == found["half a head"] == b""
        assert b" 408 " in found["half a body"].partition(b"\r\n")[0]
        for name in ("long header", "many headers", "no http", "two lengths"):
            assert found[name] is not None and b" 200 " not in found[name]
        rng = random.Random(0)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda x: raw(address, x), [rng.randbytes(200) + b"\r\n\r\n"] * 8))
        assert ask(httpx2.Client(base_url=address)).status_code == 200
