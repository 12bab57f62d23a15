"""Controls against a server that keeps its promises, and against ones that break each of them."""

import http.server
import json
import subprocess
import threading

import pytest

from v4jax.eval import controls
from v4jax.eval.http_client import Client

FIRST, OTHER, LIMITED = "key-first", "key-other", "key-limited"


class Server(http.server.ThreadingHTTPServer):
    """Completions with keys, an audit log and a prefix cache, and a set of `faults`."""

    daemon_threads = True

    def __init__(self, audit, faults=(), retention="metadata"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.log, self.faults, self.retention = audit / "audit-1.jsonl", set(faults), retention
        self.seen, self.count = set(), 0

    def controlled(self):
        client = Client(f"http://127.0.0.1:{self.server_port}/v1", FIRST)
        audit = self.log.parent
        return controls.Controlled(client, "m", FIRST, OTHER, LIMITED, audit, self.retention)


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if key not in (FIRST, OTHER, LIMITED) and "open" not in server.faults:
            self._say(401, {"error": {"message": "no such key"}})
        elif key == LIMITED and "scope" not in server.faults:
            self._say(403, {"error": {"message": "not in its scope"}})
        elif not isinstance(body["max_tokens"], int):
            told = body["prompt"] if "echo" in server.faults else "max_tokens"
            self._say(400, {"error": {"message": f"bad: {told}"}})
        else:
            self._answer(body, key)

    def _answer(self, body, key):
        server = self.server
        server.count += 1
        request = f"r{server.count}"
        line = {"time": 1.0, "request": request, "key": "id", "endpoint": "x", "status": 200}
        if server.retention == "full" or "text" in server.faults:
            line["prompt"] = body["prompt"]
        if "secret" in server.faults:
            line["secret"] = key
        if "silent" not in server.faults:
            with open(server.log, "a") as file:
                file.write(json.dumps(line) + "\n")
        place = (body["prompt"], "" if "shared" in server.faults else key)
        cached = 128 * (place in server.seen)
        server.seen.add(place)
        usage = {"prompt_tokens": 200, "prompt_tokens_details": {"cached_tokens": cached}}
        self._say(200, {"choices": [{"text": "x"}], "usage": usage}, request)

    def _say(self, status, body, request=""):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Request-Id", request)
        self.end_headers()
        self.wfile.write(content)


def forget(log, broken=False):
    """`v4jax forget --audit DIR --request ID`."""

    def run(command, **options):
        request = command[command.index("--request") + 1]
        lines = [line for line in log.read_text().splitlines() if broken or request not in line]
        log.write_text("".join(f"{line}\n" for line in lines))
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def outcomes(tmp_path, monkeypatch, *faults, retention="metadata"):
    """What each check says: 1, 0 or None."""
    server = Server(tmp_path, faults, retention)
    monkeypatch.setattr(controls.subprocess, "run", forget(server.log, "kept" in faults))
    monkeypatch.setattr(controls, "WAIT", 0.2)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        jobs = controls.jobs(server.controlled())
        return {job.task: job.run(None) for job in jobs}
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("retention", ["metadata", "full"])
def test_a_good_server_passes_every_check(tmp_path, monkeypatch, retention):
    found = outcomes(tmp_path, monkeypatch, retention=retention)
    assert {name: each["score"] for name, each in found.items()} == dict.fromkeys(found, 1.0)
    assert len(found) == 10
    assert found["tenants_apart"]["answer"].startswith("128 cached tokens for the same tenant, 0")


@pytest.mark.parametrize(
    ("fault", "failed"),
    [
        ("open", {"access_without_key", "access_wrong_key"}),
        ("scope", {"access_scope"}),
        ("silent", {"logging_every_request", "deletion_by_request"}),
        ("secret", {"logging_no_secrets"}),
        ("text", {"retention_of_text"}),
        ("echo", {"errors_without_text"}),
        ("shared", {"tenants_apart"}),
        ("kept", {"deletion_by_request"}),
    ],
)
def test_each_broken_promise_is_seen(tmp_path, monkeypatch, fault, failed):
    found = outcomes(tmp_path, monkeypatch, fault)
    assert {name for name, each in found.items() if each["score"] == 0.0} == failed
    for name in failed:
        assert found[name]["answer"] and found[name]["expected"]
