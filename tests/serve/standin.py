"""A server that answers the page with made-up streams and figures: no model, no compilation."""

import asyncio
import contextlib
import json
import math
import random
import socket
import threading
import time

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from v4jax.errors import InputError
from v4jax.serve.look import Look, Unavailable
from v4jax.serve.page import page_routes
from v4jax.serve.seen import SeenRequests

WINDOW, HEADS, EXPERTS, STREAMS = 64, 4, 8, 4
KINDS = (("window", 0), ("window", 0), ("csa", 4), ("hca", 128), ("csa", 4))
PROMPT, CACHED, TOPK = 300, 256, 32
THOUGHT = "The reader asks for the sum of two numbers. I add them and say so."
ANSWER = "The sum is 42.\nThe tags <b>bold</b> & <script>alert(1)</script> are text."
METRICS = """# TYPE slots_busy gauge
slots_busy 3
queue_depth 1
output_tokens_total 0
time_to_first_token_seconds_count 10
inter_token_seconds_count {made}
time_to_first_token_seconds_bucket{{le="0.1"}} 3
time_to_first_token_seconds_bucket{{le="0.25"}} 9
time_to_first_token_seconds_bucket{{le="+Inf"}} 10
inter_token_seconds_bucket{{le="0.01"}} 2
inter_token_seconds_bucket{{le="0.02"}} 90
inter_token_seconds_bucket{{le="+Inf"}} 100
"""


def pieces(text: str) -> list[str]:
    """A text cut after each blank."""
    return [part for word in text.split(" ") for part in (word, " ")][:-1]


class FakeLens:
    """Figures of the shapes that `Lens.figures` gives, drawn from the position."""

    def figures(self, tokens, position):
        if position >= len(tokens):
            raise InputError(f"position is {position}; expected at most {len(tokens) - 1}")
        rng = random.Random(position)
        return {
            "position": position,
            "token": tokens[position],
            "layers": [self._layer(n, *kind, position, rng) for n, kind in enumerate(KINDS)],
            "before": self._likely(rng, tokens[position]) if position else None,
            "next": self._likely(rng),
        }

    def _likely(self, rng, token=None):
        chances = sorted((rng.random() ** 4 + 0.001 for _ in range(10)), reverse=True)
        top = [
            {"token": 600 + i, "logprob": round(math.log(c / sum(chances) * 0.98), 6)}
            for i, c in enumerate(chances)
        ]
        found = {"entropy": 1.37, "top": top}
        if token is not None:
            top[1]["token"] = token
            found |= {"logprob": top[1]["logprob"], "rank": 2}
        return found

    def _layer(self, number, kind, ratio, position, rng):
        first = max(0, position + 1 - WINDOW)
        window = [math.exp(rng.gauss(0, 1.2)) * (0.3 + i / 60) for i in range(position + 1 - first)]
        visible = (position + 1) // ratio if ratio else 0
        index = sorted(rng.sample(range(visible), min(TOPK, visible)))
        if kind == "hca":
            index = list(range(visible))
        entries = [math.exp(rng.gauss(-1, 1.5)) for _ in index]
        heads = [(rng.random(), rng.random() if index else 0.0, 0.3) for _ in range(HEADS)]
        heads = [[part / sum(head) for part in head] for head in heads]
        shares = [sum(head[i] for head in heads) / HEADS for i in range(3)]
        found = None
        if ratio:
            found = {
                "ratio": ratio,
                "overlap": kind == "csa",
                "visible": visible,
                "index": index,
                "weight": [x * shares[1] / sum(entries) for x in entries],
            }
            if kind == "csa":
                found |= {"score": [rng.random() for _ in index], "best_left_out": 0.01}
        scores = [rng.random() for _ in range(EXPERTS)]
        taken = sorted(range(EXPERTS), key=lambda e: -scores[e])[:2]
        mixing = [[[rng.random() for _ in range(STREAMS)] for _ in range(STREAMS)] for _ in "ab"]
        return {
            "layer": number,
            "kind": kind,
            "routing": "hash" if number < 2 else "score",
            "window": {"first": first, "weight": [x * shares[0] / sum(window) for x in window]},
            "entries": found,
            "heads": dict(
                zip(("window", "entries", "sink"), map(list, zip(*heads, strict=True)), strict=True)
            ),
            "experts": {"index": taken, "weight": [0.9, 0.6], "scores": scores},
            "mhc": {"attention": mixing[0], "experts": mixing[1]},
        }


class StandIn:
    """The app and what it was asked.

    Args:
      chat, lens: what the model and the server have. key: that is needed, if any.
      pause: seconds between two tokens.
    """

    def __init__(self, chat=True, lens=True, key=None, pause=0.002):
        self.key, self.pause = key, pause
        self.bodies: list[dict] = []
        self.left = threading.Event()  # a client went away in the middle of its answer
        self.made = 0
        self._texts: dict[int, str] = {i: f"w{i % 97} " for i in range(700)}
        look = Look(FakeLens().figures, self._texts.__getitem__, SeenRequests())
        self.look = look if lens else None
        about = {"model": "nano", "chat": chat, "lens": lens, "keys": key is not None}
        self.app = Starlette(
            routes=[
                *page_routes(about | {"max_length": 4096}),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/metrics", self.metrics),
                Route("/lens", self.lens),
            ]
        )

    def _refusal(self, request):
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            error = {"message": "the API key is missing or unknown", "type": "authentication_error"}
            return JSONResponse({"error": error}, 401)
        return None

    async def metrics(self, request):
        if refusal := self._refusal(request):
            return refusal
        return PlainTextResponse(METRICS.format(made=self.made))

    async def lens(self, request):
        try:
            return JSONResponse(self.look(request.query_params, ""))
        except Unavailable as error:
            return JSONResponse({"error": {"message": error.message}}, error.status)

    async def completions(self, request):
        self.bodies.append(await request.json())
        parts = [{"text": piece} for piece in pieces(ANSWER)]
        return self._refusal(request) or self._stream(request, parts, "stop")

    async def chat(self, request):
        body = await request.json()
        self.bodies.append(body)
        parts = []
        if body["thinking"]["type"] == "enabled":
            parts += [{"delta": {"reasoning_content": piece}} for piece in pieces(THOUGHT)]
        if body.get("tools") and body["messages"][-1]["role"] != "tool":
            call = {"index": 0, "id": "call_1", "function": {"name": "add", "arguments": ""}}
            parts.append({"delta": {"tool_calls": [call]}})
            for piece in ('{"a": 40,', ' "b": 2}'):
                more = {"index": 0, "function": {"arguments": piece}}
                parts.append({"delta": {"tool_calls": [more]}})
            return self._refusal(request) or self._stream(request, parts, "tool_calls")
        parts += [{"delta": {"content": piece}} for piece in pieces(ANSWER)]
        return self._refusal(request) or self._stream(request, parts, "stop")

    def _stream(self, request, parts, finish):
        asked = request.headers.get("x-v4jax-detail") == "1"
        return StreamingResponse(
            self._events(f"r{len(self.bodies)}", parts, finish, asked),
            media_type="text/event-stream",
        )

    async def _events(self, name, parts, finish, asked):
        def data(value):
            return f"data: {json.dumps(value)}\n\n"

        drafted = [place for place in range(len(parts)) if place % 5 in (2, 3)]
        done = False
        try:
            yield ": keep-alive\n\n"
            for place, part in enumerate(parts):
                if asked:
                    detail = {"request": name, "prompt_tokens": PROMPT, "cached_tokens": CACHED}
                    detail |= {"first": place, "count": 1, "drafted": [0] * (place in drafted)}
                    yield f"event: v4jax\n{data(detail)}"
                self.made += 1
                yield data({"id": name, "choices": [{"index": 0, **part, "finish_reason": None}]})
                await asyncio.sleep(self.pause)
            self._keep(name, parts, drafted)
            yield data(
                {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": finish}]}
            )
            details = {"cached_tokens": CACHED}
            usage = {"prompt_tokens": PROMPT, "completion_tokens": len(parts)}
            yield data({"choices": [], "usage": usage | {"prompt_tokens_details": details}})
            yield "data: [DONE]\n\n"
            done = True
        finally:
            if not done:
                self.left.set()

    def _keep(self, name, parts, drafted):
        if self.look is None:
            return
        answer = range(1000, 1000 + len(parts))
        for token, part in zip(answer, parts, strict=True):
            told = part.get("delta", part)
            self._texts[token] = (
                told.get("content") or told.get("reasoning_content") or told.get("text") or "‹call›"
            )
        tokens = [*range(PROMPT), *answer]
        self.look.requests.add(name, "", tokens, PROMPT, CACHED, drafted)


@contextlib.contextmanager
def running(app):
    """The address of the app, served on a free port of loopback."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
