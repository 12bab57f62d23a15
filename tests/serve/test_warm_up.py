"""Before the server is ready it says what it waits for."""

import logging
import threading

from tests.support import servers
from tests.support.echo_engine import EchoEngine
from v4jax.infer.compiled import Progress


class Cold(EchoEngine):
    """Its programs are compiled until `go` is set."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()

    def warm_up(self):
        self.compiling = Progress(3)
        self.compiling.compile("first token", lambda: None)
        self.compiling.compile("prefill of 128 tokens", lambda: self.go.wait(60))
        self.compiling = None
        return 1.5


def test_it_says_what_it_waits_for(caplog):
    caplog.set_level(logging.INFO, "v4jax.serve")
    engine = Cold()
    parts = servers.serving(engine, progress_seconds=0.02)
    with servers.in_process(parts, wait=False) as client:
        servers.until(lambda: engine.compiling is not None and engine.compiling.done == 1, 20)
        found = client.get("/health")
        assert found.status_code == 503 and found.json()["status"] == "warming up"
        assert found.json()["waits_for"].startswith("1 of 3 programs compiled in 0 s, about 0 s")
        assert found.json()["waits_for"].endswith(": prefill of 128 tokens")
        refused = client.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        error = refused.json()["error"]
        assert error["code"] == "warming_up" and "1 of 3 programs compiled" in error["message"]
        servers.until(lambda: "warming up: 1 of 3 programs" in caplog.text, 20)
        engine.go.set()
        servers.until(lambda: parts.state == "ready", 20)
        assert client.get("/health").json() == {"status": "ready"}
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
    assert caplog.text.count("ready; the programs took 1.5 s") == 1
