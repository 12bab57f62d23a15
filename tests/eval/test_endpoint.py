"""Endpoints that answer, and those that do not: each mistake is a sentence."""

import contextlib
import http.server
import json
import socket
import threading

import pytest

from tests.eval.targets import needle_reader
from v4jax.cli import main
from v4jax.errors import InputError
from v4jax.eval import endpoint as endpoint_lib
from v4jax.eval.endpoint import EndpointTarget
from v4jax.eval.records import read_records
from v4jax.eval.sample import Prompt, asked


class Server(http.server.ThreadingHTTPServer):
    """A stand-in for an OpenAI-compatible server; `answers` decides what a POST gets."""

    daemon_threads = True

    def __init__(self, answers, models=({"id": "m", "max_model_len": 5000},), key=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.models, self.key = answers, models, key
        self.bodies = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if self._allowed():
            self._json(200, {"data": list(self.server.models)})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        if self.path == "/tokenize":
            self._json(200, {"tokens": list(body["prompt"].encode())})
            return
        self.server.bodies.append((self.path, body))
        self.server.answers(self, body)

    def _allowed(self):
        key = self.server.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self._json(401, {"error": {"message": "unknown key"}})
        return False

    def _json(self, status, body, **headers):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def events(self, *events, done=True):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in events:
            self.wfile.write(b": keep-alive\n\ndata: " + json.dumps(event).encode() + b"\n\n")
        if done:
            self.wfile.write(b"data: [DONE]\n\n")


USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 3,
    "prompt_tokens_details": {"cached_tokens": 8},
}


def says(text, model="m"):
    """A server that streams a text in two pieces."""

    def answers(handler, body):
        found = text(body) if callable(text) else text
        pieces = [found[:1], found[1:]]
        key = "text" if "prompt" in body else "delta"
        events = [
            {"model": model, "choices": [{key: p if key == "text" else {"content": p}}]}
            for p in pieces
        ]
        events[-1]["choices"][0]["finish_reason"] = "stop"
        handler.events(*events, {"model": model, "choices": [], "usage": USAGE})

    return answers


@contextlib.contextmanager
def serving(answers, **options):
    server = Server(answers, **options)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def test_both_ways_of_asking():
    with serving(says("hello")) as server:
        chat = EndpointTarget(server.url, "m")
        answer = chat.ask(asked("q", "prefix"), 7, stop=("x",), seed=3)
        assert (answer.text, answer.finish) == ("hello", "stop")
        assert (answer.prompt_tokens, answer.cached_tokens, answer.output_tokens) == (12, 8, 3)
        assert 0 < answer.first_token_seconds <= answer.seconds and len(answer.times) == 2
        path, body = server.bodies[-1]
        assert path == "/v1/chat/completions" and body["messages"][0]["content"] == "q"
        assert body["max_tokens"] == 7 and body["stop"] == ["x"] and body["temperature"] == 0
        plain = EndpointTarget(server.url, "m", style="plain")
        assert plain.ask(asked("q", "p:"), 7).text == "hello"
        assert server.bodies[-1][1]["prompt"] == "q\np:"
        assert plain.measure(asked("q", "p:")) == 4  # the server counts bytes
        assert chat.ask(asked("def f(", continues=True), 7).text == "hello"
        assert server.bodies[-1][1]["prompt"] == "def f("  # continued, though it can chat
        assert chat.max_length == 5000
        assert plain.ask_tokens([1, 2], 3).text == "hello"


def test_tool_calls_come_in_pieces():
    pieces = [
        {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
        {"tool_calls": [{"index": 1, "id": "b", "function": {"name": "g", "arguments": "{}"}}]},
    ]
    with serving(
        lambda handler, body: handler.events(*({"choices": [{"delta": p}]} for p in pieces))
    ) as server:
        tools = ({"type": "function", "function": {"name": "f"}},)
        prompt = Prompt(({"role": "user", "content": "q"},), tools=tools)
        answer = EndpointTarget(server.url, "m").ask(prompt, 5)
        assert answer.calls == [
            {"id": "a", "name": "f", "arguments": '{"x": 1}'},
            {"id": "b", "name": "g", "arguments": "{}"},
        ]
        assert server.bodies[0][1]["tools"] == list(tools)


def test_an_answer_in_one_piece():
    body = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}], "usage": USAGE}
    with serving(lambda handler, _: handler._json(200, body)) as server:
        answer = EndpointTarget(server.url, "m").ask(asked("q"), 5)
        assert answer.text == "hi" and answer.prompt_tokens == 12


def refused(server, match, **options):
    with pytest.raises(InputError, match=match) as caught:
        EndpointTarget(server if isinstance(server, str) else server.url, "m", **options).ask(
            asked("q"), 5
        )
    assert "\n" not in str(caught.value)


def test_what_endpoints_do_wrong_is_said(monkeypatch):
    monkeypatch.setattr(endpoint_lib.time, "sleep", lambda seconds: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    refused(url, "nothing answers there")
    refused("ftp://x", "expected a URL")
    refused("http://127.0.0.1:99999/v1", "expected a URL")
    with serving(says("x"), key="right") as server:
        refused(server, "refuses the key.*unknown key", key="wrong")
        refused(server, "refuses the key")
        assert EndpointTarget(server.url, "m", key="right").ask(asked("q"), 1).text == "x"
    with serving(says("x"), models=({"id": "other"},)) as server:
        refused(server, "serves other, not m")
    with serving(says("x", model="other")) as server:
        refused(server, "answers with the model 'other'")
    error = {"error": {"message": "too\nlong"}}
    with serving(lambda handler, _: handler._json(400, error)) as server:
        refused(server, r"status 400 \(too long\)")
        assert len(server.bodies) == 1
    with serving(lambda handler, _: handler._json(500, error)) as server:
        refused(server, r"status 500.*records are kept: run again later")
        assert len(server.bodies) == 4  # it was asked again before it was given up
    with serving(lambda handler, _: handler.events({"error": error["error"]})) as server:
        refused(server, "too long")
    with serving(lambda handler, _: handler.events({"choices": []}, done=False)) as server:
        refused(server, "broke off")
    with serving(lambda handler, _: handler._json(200, [])) as server:
        refused(server, "no JSON object")
    with serving(lambda handler, _: threading.Event().wait(1.5)) as server:
        refused(server, "not a byte came for 0.2 seconds", timeout=0.2)


def test_a_busy_server_is_asked_again_when_it_says(monkeypatch):
    waited = []
    monkeypatch.setattr(endpoint_lib.time, "sleep", waited.append)

    def answers(handler, body):
        if len(handler.server.bodies) < 3:
            handler._json(429, {"error": {"message": "busy"}}, Retry_After="7")
        else:
            says("at last")(handler, body)

    with serving(answers) as server:
        assert EndpointTarget(server.url, "m").ask(asked("q"), 5).text == "at last"
    assert waited == [7.0, 7.0]


def test_a_form_is_asked_for_until_it_is_refused():
    schema = {"type": "object"}
    prompt = Prompt(({"role": "user", "content": "q"},), schema=schema)
    with serving(says("{}")) as server:
        target = EndpointTarget(server.url, "m")
        assert target.ask(prompt, 5).text == "{}"
        assert server.bodies[-1][1]["response_format"]["json_schema"]["schema"] == schema
        target.ask(asked("q"), 5)
        assert "response_format" not in server.bodies[-1][1]

    def without(handler, body):
        if "response_format" in body:
            handler._json(400, {"error": {"message": "unknown field response_format"}})
        else:
            says("yes")(handler, body)

    said = []
    with serving(without) as server:
        target = EndpointTarget(server.url, "m", tell=said.append)
        assert [target.ask(prompt, 5).text for _ in range(2)] == ["yes", "yes"]
        assert ["response_format" in body for _, body in server.bodies] == [True, False, False]
        assert len(said) == 1 and "refuses a response format (unknown field" in said[0]
    # What is refused without the form too is no matter of the form.
    with serving(lambda handler, _: handler._json(400, {"error": {"message": "no"}})) as server:
        target = EndpointTarget(server.url, "m", tell=said.append)
        with pytest.raises(InputError, match=r"status 400 \(no\)"):
            target.ask(prompt, 5)
        assert len(said) == 1


def test_the_command_has_workers_ask_an_endpoint(tmp_path, capsys):
    with serving(says(lambda body: needle_reader(Text(body["prompt"])))) as server:
        found = {}
        for name, flags in (
            ("local", []),
            ("processes", ["--executor=processes", "--workers=2", "--concurrency=2"]),
        ):
            command = ["v4jax", "eval", "needle", f"--endpoint={server.url}", "--model=m"]
            command += ["--style=plain", "--lengths=2000", "--samples=6", "--api_key=secret"]
            command += [f"--out={tmp_path / name}", "--format=json", *flags]
            assert main.main(command) == 0
            found[name] = json.loads(capsys.readouterr().out)
            for record in (records := read_records(tmp_path / name)):
                del record["seconds"], record["first_token_seconds"]
            found[f"{name} records"] = sorted(records, key=lambda each: each["sample"])
        assert found["local records"] == found["processes records"]
        assert found["local"]["results"][0]["mean"] == 1.0
        # The same run: what one executor has begun the other goes on with.
        assert main.main([*command, "--executor=local", "--workers=2"]) == 2
        assert main.main([each for each in command if not each.startswith("--worker")]) == 0
    assert "secret" not in (tmp_path / "processes" / "run.json").read_text()


def test_the_command_runs_a_suite_at_an_endpoint(tmp_path, capsys):
    with serving(says(lambda body: needle_reader(Text(body["prompt"])))) as server:
        out = str(tmp_path / "run")
        command = [
            "v4jax",
            "eval",
            "needle",
            f"--endpoint={server.url}",
            "--model=m",
            "--samples=4",
        ]
        command += ["--style=plain", "--lengths=2000,3000", f"--out={out}", "--concurrency=2"]
        assert main.main([*command, "--format=json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert [(r["length"], r["n"], r["mean"]) for r in summary["results"]] == [
            (2000, 4, 1.0),
            (3000, 4, 1.0),
        ]
        assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
        asked_before = len(server.bodies)
        assert main.main([*command, "--samples=5"]) == 0  # what is there is not asked again
        assert len(server.bodies) == asked_before + 2
        assert "8 of 10 records are there" in capsys.readouterr().err
        assert len(read_records(out)) == 10
        assert main.main([*command, "--seed=1"]) == 2
        assert "another run: its seed is 0" in capsys.readouterr().err
        assert main.main([*command, "--lengths=9000"]) == 2
        assert "reads at most 5000" in capsys.readouterr().err


class Text:
    """A prompt as `needle_reader` takes it."""

    def __init__(self, text):
        self.text = text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["nedle"], "there is no suite 'nedle', maybe needle; expected one of"),
        (["needle", "x"], "there is an argument too many"),
        (["needle", "--samples=0"], "samples is 0; expected 1 or more"),
        (["needle", "--lengths=a"], "--lengths is 'a'; expected whole numbers"),
        (["needle", "--lengths="], "lengths is empty"),
        (["needle", "--lengths=0"], "a length is 0; expected 1 or more"),
        (["needle", "--lengths=10000000"], "reads at most 4096"),
        (["needle", "--seed=-1"], "seed is -1"),
        (["needle", "--checkpoint=/nowhere"], "/nowhere"),
        (["needle", "--model=x"], "--model is given without --endpoint"),
        (["needle", "--endpoint=http://x/v1"], "--model is missing"),
        (["needle", "--style=chat"], "lacks the special tokens of a V4 chat"),
        (["tools", "--style=chat"], "lacks the special tokens of a V4 chat"),
        (["needle", "--workers=2"], "--workers is 2, and --executor local has none"),
        (["needle", "--worker_resources=GPU=1"], "is given without --executor ray"),
        (
            ["ruler", "--tasks=singel_1"],
            "there is no task 'singel_1' in this suite, maybe single_1",
        ),
        (["tools", "--trials=0"], "trials is 0"),
        (["cost", "--price_hour=-1"], "price of hour is -1.0"),
        (["compare", "x"], "expected two or more"),
        (["compare", "x", "y"], "there is no run.json"),
        (["compare", "x", "y", "--out=z.txt"], "expected a file's name with .html"),
    ],
)
def test_bad_input_is_one_sentence(flags, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["v4jax", "eval", *flags]) == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert sentence in said
