"""The real `openai` client against a real server on loopback, and servers that stop or die."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import openai
import pytest

import v4jax
from tests.support import servers
from tests.support.echo_engine import EchoEngine
from tests.support.echo_server import COLD
from v4jax.cli.main import main
from v4jax.serve.audit import AuditLog, files, read
from v4jax.serve.keys import KeyFile, create, read_keys

USER = {"role": "user", "content": "What is the weather in Paris?"}
LOOKUP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NO_THINKING = {"thinking": {"type": "disabled"}}


@pytest.fixture(scope="module")
def address(chat_engine, chat_directory):
    parts = servers.serving(chat_engine, chat_directory)
    with servers.on_loopback(parts) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def talk(client, *messages, **fields):
    body = fields.pop("extra_body", NO_THINKING)
    settings = {"model": "nano", "max_tokens": 12, "temperature": 0} | fields
    return client.chat.completions.create(
        messages=list(messages) or [USER], extra_body=body, **settings
    )


def test_models(client):
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").owned_by == "v4jax"


def test_chat_streamed_and_not(client):
    whole = talk(client)
    assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    chunks = list(talk(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-2].choices[0].finish_reason == "length"


def test_reasoning(client):
    whole = talk(client, extra_body={}, seed=3)
    message = whole.choices[0].message
    assert message.reasoning_content and not message.content
    assert whole.usage.completion_tokens_details.reasoning_tokens > 0
    chunks = list(talk(client, extra_body={}, seed=3, stream=True))
    found = [getattr(each.choices[0].delta, "reasoning_content", None) or "" for each in chunks]
    assert "".join(found) == message.reasoning_content


def test_log_probabilities(client):
    found = talk(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(found) == 12 and all(len(each.top_logprobs) == 3 for each in found)
    assert all(each.logprob <= 0 for each in found)


def test_calls_over_three_rounds(client):
    """A call has to come and obeys its schema; its result goes back; three times."""
    messages = [USER]
    settings = {"tools": [LOOKUP], "tool_choice": "required", "parallel_tool_calls": False}
    for _ in range(3):
        found = talk(client, *messages, max_tokens=300, **settings).choices[0]
        assert found.finish_reason == "tool_calls"
        (call,) = found.message.tool_calls
        assert call.function.name == "look_up"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
        messages += [
            found.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        ]


def test_an_answer_that_obeys_a_schema(client, chat_directory):
    tokenizer = v4jax.Tokenizer(chat_directory)
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}},
        "required": ["sure"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    # The schema permits blanks, of which a model that knows no JSON would make nothing else.
    pieces = {token: tokenizer.piece(token) for token in range(2048)}
    blank = {str(token): -100 for token, piece in pieces.items() if not piece.strip()}
    found = talk(client, response_format=form, max_tokens=60, logit_bias=blank).choices[0]
    assert found.finish_reason == "stop"
    assert json.loads(found.message.content)["sure"] in (True, False)


def test_completions_with_echo(client):
    found = client.completions.create(
        model="nano", prompt="def f(", max_tokens=4, echo=True, logprobs=2, temperature=0
    )
    assert found.choices[0].text.startswith("def f(")
    assert found.choices[0].logprobs.token_logprobs[0] is None
    chunks = client.completions.create(
        model="nano", prompt="def f(", max_tokens=4, temperature=0, echo=True, stream=True
    )
    assert "".join(each.choices[0].text for each in chunks) == found.choices[0].text


def test_errors(client):
    with pytest.raises(openai.NotFoundError):
        talk(client, model="gpt-4")
    with pytest.raises(openai.BadRequestError) as error:
        talk(client, {"role": "nobody", "content": "x"})
    assert error.value.body["message"]
    for wrong in ({"n": 2}, {"presence_penalty": 500.0}, {"top_logprobs": 99, "logprobs": True}):
        with pytest.raises(openai.BadRequestError):
            talk(client, **wrong)
    with pytest.raises(openai.BadRequestError):
        talk(client, {"role": "user", "content": "x" * 5000})


def test_responses_and_messages(client, address):
    found = client.responses.create(model="nano", input="Hello", max_output_tokens=6)
    assert found.status == "incomplete" and found.usage.output_tokens == 6
    kinds = [
        each.type
        for each in client.responses.create(
            model="nano", input="Hello", max_output_tokens=6, stream=True
        )
    ]
    assert kinds[0] == "response.created" and kinds[-1] == "response.incomplete"
    body = {"model": "nano", "max_tokens": 6, "messages": [USER]}
    whole = httpx2.post(f"{address}/v1/messages", json=body, timeout=60).json()
    assert whole["type"] == "message" and whole["stop_reason"] == "max_tokens"
    text = httpx2.post(f"{address}/v1/messages", json=body | {"stream": True}, timeout=60).text
    assert text.startswith("event: message_start\n") and "event: message_stop" in text
    assert "[DONE]" not in text
    wrong = httpx2.post(f"{address}/v1/messages", json=body | {"max_tokens": "x"}, timeout=60)
    assert wrong.status_code == 400 and wrong.json()["type"] == "error"


def test_who_leaves_ends_the_request(chat_directory):
    """By closing a stream, and by a time-out before a whole answer."""
    slow = EchoEngine(chat_directory, pace=0.02)
    parts = servers.serving(slow, chat_directory)
    with (
        servers.on_loopback(parts) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = talk(client, stream=True, max_tokens=1000)
        next(iter(stream))
        stream.close()
        servers.until(lambda: slow.stats()["cancelled"] == 1, 20)
        with pytest.raises(openai.APITimeoutError):
            talk(client.with_options(timeout=0.5), max_tokens=1000)
        servers.until(lambda: slow.stats()["cancelled"] == 2, 20)
        assert slow.stats()["queue_depth"] == 0
        servers.until(lambda: parts.running.open == parts.running.waiting == 0, 20)
        assert 'status="499"' in httpx2.get(f"{address}/metrics").text


def test_comments_keep_a_quiet_stream_alive(echo):
    parts = servers.serving(echo, keep_alive_seconds=0.02)
    with echo.held(), servers.on_loopback(parts) as address:
        body = {"prompt": "a", "max_tokens": 2, "stream": True, "temperature": 0}
        with httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
            found = ""
            for text in response.iter_text():
                found += text
                if found.count(": waiting\n\n") > 2:
                    echo.release()
        assert found.endswith("data: [DONE]\n\n")


def test_a_long_queue_refuses_and_a_long_wait_ends(echo):
    parts = servers.serving(echo, max_waiting=2, max_waiting_seconds=0.2)
    with echo.held(), servers.on_loopback(parts) as address:
        body = {"prompt": "a", "max_tokens": 2}
        url = f"{address}/v1/completions"
        found = []

        def ask():
            found.append(httpx2.post(url, json=body, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        echo.release()
        codes = sorted(each.json()["error"]["code"] for each in found)
        assert codes == ["queue_full"] * 4 + ["waited_too_long"] * 2
        assert all(int(each.headers["retry-after"]) >= 1 for each in found)
        assert httpx2.post(url, json=body, timeout=60).status_code == 200


def test_a_server_that_stops_finishes_what_runs(chat_directory):
    slow = EchoEngine(chat_directory, pace=0.02)
    parts = servers.serving(slow, chat_directory)
    body = {"prompt": "a", "max_tokens": 60, "stream": True}
    begun, found = threading.Event(), []

    def ask(address):
        with httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
            for text in response.iter_text():
                begun.set()
                found.append(text)

    with servers.on_loopback(parts) as address:
        thread = threading.Thread(target=ask, args=(address,))
        thread.start()
        begun.wait(60)
    thread.join()
    assert "".join(found).endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in "".join(found)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{address}/health")


def started(tmp_path, *words, echo=False, wait=True):
    """A server as a process of its own: it, and its address; wait: once it is ready."""
    program = ["tests.support.echo_server"] if echo else ["v4jax", "serve"]
    command = [sys.executable, "-m", *program, "--checkpoint=nano", "--port=0", "--slots=2"]
    command += ["--max_length=256", "--draft=none", *words]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    for line in process.stderr:
        if " at http://" in line:
            break
    else:
        raise AssertionError(process.wait())
    address = line.split(" at ")[1].split("/v1")[0]
    threading.Thread(target=process.stderr.read, daemon=True).start()

    def ready():
        try:
            return httpx2.get(f"{address}/health", timeout=5).is_success
        except httpx2.TransportError:
            assert process.poll() is None
            return False

    if wait:
        servers.until(ready)
    return process, address


def under_load(address, key, count=8):
    """Threads that ask until the server is gone; what was answered, by request id."""
    answered = []

    def ask(n):
        with httpx2.Client(headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
            for turn in range(10_000):
                body = {"prompt": [3 + n, *range(20, 170), turn % 900], "max_tokens": 20}
                try:
                    found = client.post(f"{address}/v1/completions", json=body)
                except httpx2.TransportError:
                    return
                if found.status_code == 200:
                    answered.append(found.headers["x-request-id"])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    return threads, answered


def killed(tmp_path, count, echo):
    """Servers under load that are killed; the key, and the flags."""
    keys, audit = tmp_path / "keys.json", tmp_path / "audit"
    secret, key = create(keys, "load")
    where = [f"--keys={keys}", f"--audit={audit}"]
    if not echo:
        checkpoint = servers.tiny_checkpoint(tmp_path / "tiny")
        where += [f"--checkpoint={checkpoint}", f"--prefix_cache={tmp_path}/prefixes"]
    everything = []
    for _ in range(count):
        process, address = started(tmp_path, *where, echo=echo)
        threads, answered = under_load(address, secret)
        servers.until(lambda answered=answered: len(answered) > 20)
        created = [create(keys, f"n{n}")[0] for n in range(3)]
        process.send_signal(signal.SIGKILL)
        process.wait()
        for thread in threads:
            thread.join()
        assert all(KeyFile(keys).find(each) is not None for each in [secret, *created])
        everything += answered
    AuditLog(audit)  # as the next server opens it
    recorded = {line["request"] for line in read(audit) if line["status"] == 200}
    assert set(everything) <= recorded
    assert all(path.read_bytes().endswith(b"\n") for path in files(audit))
    assert read_keys(keys)[0] == key
    return secret, where


def test_killed_under_load(tmp_path):
    """The log has no broken line, no answer is missing in it, and no key is lost."""
    killed(tmp_path, 1, echo=True)


@pytest.mark.slow
def test_killed_under_load_and_started_again(tmp_path):
    """The same with the model, and its stored prefixes open."""
    secret, where = killed(tmp_path, 2, echo=False)
    process, address = started(tmp_path, *where)
    found = httpx2.post(
        f"{address}/v1/completions",
        json={"prompt": [3, *range(20, 170), 0], "max_tokens": 1},
        headers={"authorization": f"Bearer {secret}"},
        timeout=60,
    )
    assert found.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 128
    process.terminate()
    assert process.wait() == 0


def stopped(tmp_path, echo):
    words = [f"--audit={tmp_path}/audit"]
    if not echo:
        words.append(f"--checkpoint={servers.tiny_checkpoint(tmp_path / 'tiny')}")
    process, address = started(tmp_path, *words, echo=echo)
    body = {"prompt": "class A", "max_tokens": 200, "stream": True, "temperature": 0}
    with httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
        pieces = response.iter_text()
        found = next(pieces)
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.4)
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{address}/health", timeout=5)
        found += "".join(pieces)
    assert found.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in found
    assert process.wait(60) == 0
    (line,) = read(tmp_path / "audit")
    assert line["status"] == 200


def test_told_to_stop_it_finishes_what_runs(tmp_path):
    stopped(tmp_path, echo=True)


@pytest.mark.slow
def test_told_to_stop_the_model_finishes_what_runs(tmp_path):
    stopped(tmp_path, echo=False)


def test_told_to_stop_while_it_warms_up_it_ends(tmp_path, monkeypatch):
    """Nobody waits for a compiler that has minutes to go."""
    monkeypatch.setenv(COLD, "1")
    process, address = started(tmp_path, echo=True, wait=False)

    def listens():
        try:
            return httpx2.get(f"{address}/health", timeout=5).status_code == 503
        except httpx2.TransportError:
            assert process.poll() is None
            return False

    servers.until(listens)
    process.terminate()
    assert process.wait(30) == 0


def test_the_command_refuses_in_a_sentence(tmp_path, capsys):
    keys = tmp_path / "keys.json"
    create(keys, "a")
    keys.chmod(0o666)
    with servers.server_lib.bound_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        cases = {
            f"--port={port}": "cannot be listened on",
            "--host=0.0.0.0": "there is no key file",
            f"--keys={keys}": "every user can write it",
            f"--keys={tmp_path}/none": "cannot be read",
            "--profile=v5": "--profile is 'v5'",
            "--retention=full": "give --audit DIR",
            f"--audit={keys}/x": "--audit",
            "--checkpoint=/no/such": "there is no directory",
            "--slots=0": "slots is 0",
            "--prefix_memory=-1": "--prefix_memory is -1",
        }
        for flag, sentence in cases.items():
            more = [] if flag.startswith("--port") else ["--port=0"]
            assert main(["v4jax", "serve", flag, *more]) == 2, flag
            said = capsys.readouterr().err
            assert sentence in said and said.count("\n") == 1, said
    assert main(["v4jax", "serve", "--retention=none", "--prefix_cache=x"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
