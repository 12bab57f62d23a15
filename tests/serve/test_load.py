"""Many clients at once: no answer lost or mixed up, memory flat, who leaves is let go."""

import asyncio
import json
import random
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest

import v4jax
from tests.support import servers
from tests.support.echo_engine import continuation
from tests.support.tiny import drawn, tiny_config
from v4jax.engine.request import Request
from v4jax.model.transformer import Transformer


def made(requests, seed=0, longest=600):
    """Prompts and numbers of new tokens, of mixed lengths; and which clients leave half way."""
    rng = random.Random(seed)
    for n in range(requests):
        length = rng.choice([3, 20, 90, 130, longest])
        prompt = [rng.randrange(2, 2000) for _ in range(length)]
        yield n, prompt, rng.choice([1, 8, 20, 40]), rng.random() < 0.05


async def ask(client, work, found):
    """Asks for what is left, streamed; notes each answer and its times."""
    for n, prompt, count, leaves in work:
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0.8, "seed": n}
        body |= {"stream": True, "add_special_tokens": False}
        began, text, times, finish = time.perf_counter(), "", [], None
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                times.append(time.perf_counter())
                choice = json.loads(line[6:])["choices"][0]
                text, finish = text + choice["text"], choice["finish_reason"]
                if leaves and len(times) > 1:
                    break
        if not leaves:
            assert finish in ("stop", "length")
            found[n] = text
        found.times.append((times[0] - began, np.diff(times)))
        if n % 50 == 0:
            found.memory.append(resident())


class Found(dict):
    """Answers by number, the times of all, and the process's memory now and then."""

    def __init__(self):
        super().__init__()
        self.times, self.memory = [], []


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def storm(address, work, clients):
    found, left = Found(), iter(work)
    limits = httpx2.Limits(max_connections=clients)
    async with httpx2.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        await asyncio.gather(*(ask(client, left, found) for _ in range(clients)))
    return found


def check(engine, requests, clients, expected, longest=600):
    """Runs the load and holds each answer against that of the engine alone; answers and rate."""
    work = list(made(requests, longest=longest))
    # Compiling, on a busy machine, takes longer than a request should wait.
    parts = servers.serving(engine, max_waiting_seconds=1200.0)
    with servers.on_loopback(parts) as address:
        before, began = engine.stats(), time.perf_counter()
        found = asyncio.run(storm(address, work, clients))
        seconds = time.perf_counter() - began
        servers.until(lambda: parts.running.open == parts.running.waiting == 0, 30)
        after = engine.stats()
    for n, prompt, count, leaves in work:
        assert leaves or found[n] == expected(n, prompt, count), n
    assert after["queue_depth"] == 0 and len(found.times) == requests
    return found, (after["output_tokens"] - before["output_tokens"]) / seconds


def alone(engine):
    """What the engine answers when it has nothing else to do."""

    def expected(n, prompt, count):
        request = Request(prompt, max_new_tokens=count, temperature=0.8, seed=n, stop_ids=(1,))
        return engine.submit(request).result().text

    return expected


def test_a_small_load(engine):
    check(engine, 16, 8, alone(engine), longest=200)


def test_http_alone_under_load(echo):
    tokenizer = v4jax.Tokenizer("nano")

    def expected(n, prompt, count):
        return tokenizer.decode(continuation(prompt, count, echo.vocab_size))

    found, _ = check(echo, 150, 64, expected)
    assert max(found.memory) < 1.1 * min(found.memory)


@pytest.fixture(scope="module")
def tiny():
    """A tiny model with nano's vocabulary, whose slots are decoded eight at a time."""
    config = tiny_config(vocab_size=2048, bos_token_id=0, eos_token_id=1)
    model = Transformer(config, min_repeats=2)
    tokenizer = v4jax.Tokenizer("nano")
    return servers.kept_engine(tokenizer, (model, drawn(model)), slots=8, max_length=768)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_requests_of_64_clients(tiny, capsys):
    check(tiny, 24, 8, alone(tiny))  # compiles
    cancelled = tiny.stats()["cancelled"]
    found, rate = check(tiny, 1000, 64, alone(tiny))
    left = sum(leaves for *_, leaves in made(1000))
    assert 30 < left < 80 and 0 < tiny.stats()["cancelled"] - cancelled <= left
    first = [each for each, _ in found.times]
    between = np.concatenate([gaps for _, gaps in found.times])
    half = np.array(found.memory[len(found.memory) // 2 :]) / 1e6
    with capsys.disabled():
        for name, values in (("first token", first), ("between tokens", between)):
            print(f"\n{name}: p50 {np.median(values):.3f} s, p99 {np.quantile(values, 0.99):.3f} s")
        print(f"{rate:.1f} tokens/s; memory of the second half {half.min()} to {half.max()} MB")
    assert half.max() < 1.1 * half.min()
