"""The server that a suite starts for itself, with a stand-in for `v4jax serve`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_lifeline import runs, wait_until
from v4jax.errors import InputError
from v4jax.eval.own_server import OwnServer
from v4jax.eval.sample import asked

SCRIPT = """
import http.server, json, sys
what = sys.argv[1]
if what == "keys":
    if MODE == "no keys":
        sys.exit("v4jax keys: it is not here")
    print("key-" + next(a for a in sys.argv if a.startswith("--name=")).split("=")[1])
    sys.exit(0)
assert what == "serve" and "--port=0" in sys.argv and "--checkpoint=nano" in sys.argv
if MODE == "ends":
    sys.exit("v4jax serve: the checkpoint cannot chat")
asked = []

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def say(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        asked.append(self.path)
        if self.path == "/health":
            self.say(200 if len(asked) > 2 else 503, {})
        else:
            self.say(200, {"data": [{"id": "nano"}]})

    def do_POST(self):
        assert self.headers["Authorization"] == "Bearer key-first"
        self.rfile.read(int(self.headers["Content-Length"]))
        self.say(200, {"choices": [{"message": {"content": "hi"}}], "usage": {}})

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
said = f"v4jax serve: nano at http://127.0.0.1:{server.server_port}/v1, warming up"
print(said, file=sys.stderr, flush=True)
server.serve_forever()
"""


def command(tmp_path, mode=""):
    path = tmp_path / "stand_in.py"
    path.write_text(f"MODE = {mode!r}\n{SCRIPT}")
    return sys.executable, str(path)


def test_it_is_ready_when_it_is_handed_out_and_gone_afterwards(tmp_path):
    with OwnServer("nano", 2, 1024, command(tmp_path)) as server:
        assert server.target.ask(asked("q"), 4).text == "hi"
        assert server.target.identity["where"] == "a server of its own"  # at any port
        controlled = server.controlled
        assert (controlled.key, controlled.other_key) == ("key-first", "key-other")
        assert controlled.limited_key == "key-limited" and controlled.retention == "metadata"
        process, directory = server._process, server._directory
        assert directory.exists()
    assert process.wait(10) is not None and not directory.exists()


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("no keys", "v4jax keys does not work here: v4jax keys: it is not here"),
        ("ends", "v4jax serve ended: v4jax serve: the checkpoint cannot chat"),
    ],
)
def test_one_that_does_not_start_says_why(tmp_path, mode, sentence):
    with pytest.raises(InputError, match=sentence):
        OwnServer("nano", 2, 1024, command(tmp_path, mode))


PARENT = """
import sys, time
from v4jax.eval.own_server import OwnServer
server = OwnServer("nano", 2, 1024, (sys.executable, sys.argv[1]))
print(server._process.pid, flush=True)
time.sleep(60)
"""


def test_it_ends_with_a_process_that_is_killed(tmp_path):
    script = command(tmp_path)[1]
    text = Path(script).read_text()
    Path(script).write_text(text.replace("asked = []", "lifeline.watch()\nasked = []"))
    Path(script).write_text("from v4jax import lifeline\n" + Path(script).read_text())
    root = str(Path(__file__).resolve().parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, script],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    server = int(parent.stdout.readline())
    assert runs(server)
    parent.kill()
    parent.wait()
    wait_until(lambda: not runs(server))
