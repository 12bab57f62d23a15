"""Tokens per second through the server, versus the engine alone under the same load, in turns.

    python tools/bench_serve.py [--checkpoint nano] [--out FILE.jsonl]

The engine alone is what `v4jax bench` measures. The server is that of `v4jax serve` in this
process, its clients are a process of their own, which reads streams and parses nothing. By default
the model is bench_cpu's random one, with nano's tokenizer: a step of nano is very short.
"""

import concurrent.futures
import contextlib
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import bench_cpu
import bench_history
import numpy as np
from absl import app, flags

import v4jax
from v4jax.checkpoints.load import locate

# bench_cpu declares --repeats and --out.
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Checkpoint (default: a random model).")
REQUESTS = flags.DEFINE_integer("requests", 16, "Requests of one run.")
SLOTS = flags.DEFINE_integer("slots", 8, "Requests at once.")
PROMPT = flags.DEFINE_integer("prompt", 256, "Tokens of each prompt.")
NEW = flags.DEFINE_integer("new", 128, "Tokens of each answer.")


def ask(address, prompts, new):
    """One client: its requests one after the other, streamed; how many events came."""
    connection = http.client.HTTPConnection(address)
    events = 0
    for prompt in prompts:
        body = {"prompt": prompt, "max_tokens": new, "temperature": 1, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body))
        with connection.getresponse() as response:
            assert response.status == 200, response.read()
            events += sum(line.startswith(b"data: {") for line in response)
    connection.close()
    return events


def clients(address, new):
    """What the clients' process does: prompts on stdin, the seconds on stdout, again and again."""
    for line in sys.stdin:
        prompts = json.loads(line)  # a list for each client
        began = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda mine: ask(address, mine, new), prompts))
        print(time.perf_counter() - began, flush=True)


@contextlib.contextmanager
def served(engine, tokenizer, cache):
    """The address of a server of the engine."""
    from v4jax.serve.app import make_app
    from v4jax.serve.server import bound_socket, server_of
    from v4jax.serve.serving import Serving
    from v4jax.serve.settings import Settings

    parts = Serving(
        Settings(name="bench"), engine, tokenizer, bos=None, eos=None, stop_ids=frozenset(),
        prefix_cache=cache,
    )  # fmt: skip
    listening = bound_socket("127.0.0.1", 0)
    server = server_of(make_app(parts), parts)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while parts.state == "warming up":
            time.sleep(0.1)
        assert parts.state == "ready", parts.state
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def measured(alone, address):
    """Tokens per second of each way, run by run."""
    from v4jax.engine.load import Load, run

    sizes = {"requests": REQUESTS.value, "concurrency": SLOTS.value}
    sizes |= {"prompt_tokens": PROMPT.value, "new_tokens": NEW.value, "temperature": 1.0}
    command = [sys.executable, __file__, f"--clients={address}", str(NEW.value)]
    rates = {"engine": [], "server": []}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        for turn in range(bench_cpu.REPEATS.value + 1):
            load = Load(**sizes, seed=turn)
            rates["engine"].append(run(alone, load)["tokens_per_second"])
            prompts = load.prompts(alone.vocab_size)
            shares = [prompts[n :: SLOTS.value] for n in range(SLOTS.value)]
            process.stdin.write(json.dumps(shares) + "\n")
            process.stdin.flush()
            seconds = float(process.stdout.readline())
            rates["server"].append(REQUESTS.value * NEW.value / seconds)
            print(f"{turn}: {rates['engine'][-1]:.1f} and {rates['server'][-1]:.1f} tokens/s")
        process.stdin.close()
    return {name: values[1:] for name, values in rates.items()}  # the first run warms up


def made(folder):
    """The checkpoint's directory, or a random model's, whose tokenizer is nano's."""
    if CHECKPOINT.value:
        return CHECKPOINT.value
    described = Path(locate("nano")) / "tokenizer.json"
    bench_cpu.SIZES["vocab_size"] = v4jax.Tokenizer("nano").vocab_size  # each token has a text
    bench_cpu.write_checkpoint(folder)
    (Path(folder) / "tokenizer.json").write_bytes(described.read_bytes())
    return folder


def main(_):
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = made(folder)
        model, params = v4jax.load(checkpoint, dtype="float32")
        tokenizer = v4jax.Tokenizer(checkpoint)
    sizes = {"slots": SLOTS.value, "max_length": PROMPT.value + NEW.value, "draft": None}
    caches = [v4jax.PrefixCache() for _ in range(2)]
    alone, behind = (
        v4jax.Engine(model, params, tokenizer=tokenizer, prefix_cache=cache, **sizes)
        for cache in caches
    )
    alone.warm_up()
    with alone, served(behind, tokenizer, caches[1]) as address:
        rates = measured(alone, address)
    medians = {f"{name}_tokens_per_second": statistics.median(x) for name, x in rates.items()}
    shares = np.divide(rates["server"], rates["engine"])
    result = bench_history.origin() | medians | {"share": float(np.median(shares))}
    result |= {"shares": shares.round(4).tolist(), "what": "server", "slots": SLOTS.value}
    result |= {"prompt": PROMPT.value, "new": NEW.value, "checkpoint": CHECKPOINT.value}
    print(json.dumps(result))
    if bench_cpu.OUT.value:
        with open(bench_cpu.OUT.value, "a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].startswith("--clients="):
        clients(sys.argv[1].removeprefix("--clients="), int(sys.argv[2]))
    else:
        app.run(main)
