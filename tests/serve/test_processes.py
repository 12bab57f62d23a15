"""`v4jax serve` in two processes: the first one answers, both compute, and both end together."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest

import v4jax
from tests.support import servers, spawn
from v4jax.serve.audit import read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]


class Pair:
    """Two processes of one command on two devices, and what the first of them says."""

    def __init__(self, checkpoint, *words):
        flags = os.environ.get("XLA_FLAGS", "").split()
        kept = [each for each in flags if "device_count" not in each]
        names = {"XLA_FLAGS": " ".join([*kept, "--xla_force_host_platform_device_count=1"])}
        command = [sys.executable, "-m", "v4jax", "serve", f"--checkpoint={checkpoint}"]
        command += [
            "--mesh=data=2",
            "--dtype=float32",
            "--port=0",
            "--slots=2",
            "--max_length=256",
            "--draft=none",
            *words,
        ]
        command += [f"--coordinator=127.0.0.1:{spawn.free_port()}", "--num_processes=2"]
        self.processes = [
            subprocess.Popen(
                [*command, f"--process_id={n}"], stderr=subprocess.PIPE, text=True, cwd=ROOT,
                env=os.environ | names,
            )
            for n in range(2)
        ]  # fmt: skip
        self.said: list[list[str]] = [[], []]
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._listen, args=(n,)) for n in range(2)]
        for thread in self._threads:
            thread.start()

    def _listen(self, which):
        for line in self.processes[which].stderr:
            self.said[which].append(line)
            if which == 0:
                self._lines.put(line)

    def address(self):
        """Where it listens, once it is ready."""
        while " at http://" not in (line := self._lines.get(timeout=600)):
            pass
        address = line.split(" at ")[1].split("/v1")[0]

        def ready():
            assert all(each.poll() is None for each in self.processes), self.said
            with contextlib.suppress(httpx2.TransportError):
                return httpx2.get(f"{address}/health", timeout=5).is_success

        servers.until(ready, 1000)
        return address

    def ended(self, seconds=120):
        """The statuses with which both end."""
        found = [each.wait(seconds) for each in self.processes]
        for thread in self._threads:
            thread.join()
        return found

    def kill(self):
        for each in self.processes:
            if each.poll() is None:
                each.kill()
                each.wait()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return servers.tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def pair(checkpoint):
    """Makes a pair with further flags; no process outlives the test."""
    with contextlib.ExitStack() as stack:

        def make(*words):
            made = Pair(checkpoint, *words)
            stack.callback(made.kill)
            return made

        yield make


def ask(address, prompt, **fields):
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0} | fields
    found = httpx2.post(f"{address}/v1/completions", json=body, timeout=120)
    assert found.status_code == 200, found.text
    return found.json()


def test_two_processes_answer_as_one_and_end_together(pair, checkpoint, tmp_path):
    """Many at once, seeds, scores, a stored prefix, a client that leaves; SIGTERM to both."""
    made = v4jax.load(checkpoint, dtype="float32")
    engine = servers.kept_engine(v4jax.Tokenizer(checkpoint), made, max_length=256)
    prompts = [f"def f{n}(self, x{n}):\n" * (1 + n % 4) for n in range(6)]
    bodies = [{"seed": n, "temperature": 0.8 * (n % 2)} for n in range(6)]
    with servers.in_process(servers.serving(engine)) as client:
        expected = [
            client.post("/v1/completions", json={"prompt": p, "max_tokens": 12} | b).json()
            for p, b in zip(prompts, bodies, strict=True)
        ]
        scores = {"prompt": prompts[0], "max_tokens": 0, "echo": True, "logprobs": 1}
        scored = client.post("/v1/completions", json=scores).json()["choices"][0]["logprobs"]
    both = pair(f"--audit={tmp_path}/audit", f"--prefix_cache={tmp_path}/prefixes")
    address = both.address()
    found: list = [None] * len(prompts)

    def run(n):
        found[n] = ask(address, prompts[n], **bodies[n])

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [each["choices"][0]["text"] for each in found]
    assert texts == [each["choices"][0]["text"] for each in expected]
    told = ask(address, prompts[0], max_tokens=0, echo=True, logprobs=1)["choices"][0]["logprobs"]
    assert told["tokens"] == scored["tokens"]
    assert told["token_logprobs"][1:] == pytest.approx(scored["token_logprobs"][1:], abs=1e-4)
    long = list(range(5, 205))
    counts = [ask(address, long)["usage"]["prompt_tokens_details"] for _ in range(2)]
    assert [each["cached_tokens"] for each in counts] == [0, 128]
    body = {"prompt": "a", "max_tokens": 200, "stream": True}
    with httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
        next(response.iter_text())
    servers.until(lambda: 'status="499"' in httpx2.get(f"{address}/metrics").text, 60)
    # A scheduler tells all processes to stop: the first one finishes what runs, with the other.
    pieces = []
    with httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
        for text in response.iter_text():
            if not pieces:
                for each in reversed(both.processes):
                    each.send_signal(signal.SIGTERM)
            pieces.append(text)
    assert "".join(pieces).endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in "".join(pieces)
    assert both.ended() == [0, 0], both.said
    assert [line for line in both.said[1] if "JAX distributed service" not in line] == []
    statuses = [line["status"] for line in read(tmp_path / "audit")]
    assert statuses.count(200) == 10 and statuses.count(499) == 1


def test_a_port_in_use_ends_both(pair):
    with servers.server_lib.bound_socket("127.0.0.1", 0) as taken:
        both = pair(f"--port={taken.getsockname()[1]}")
        statuses = both.ended(300)
    assert statuses[0] == 2 and statuses[1] != 0
    assert "cannot be listened on" in "".join(both.said[0])


def test_a_process_that_dies_ends_the_other(pair):
    """Nobody is left waiting for an answer that cannot come."""
    both = pair()
    address = both.address()
    assert ask(address, "a")["usage"]["completion_tokens"] == 12
    both.processes[1].kill()
    assert both.ended(300)[0] != 0
