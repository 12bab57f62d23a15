"""An OpenAI-compatible endpoint as what is evaluated."""

import math
import time
from collections.abc import Sequence
from typing import Any

from v4jax.errors import InputError
from v4jax.eval.http_client import Client, Refused
from v4jax.eval.sample import Answer, Prompt
from v4jax.infer.tokenizer import Tokenizer

TURN_TOKENS = 8  # allowed for what a chat template adds to a turn
_TRIES = 4
_AGAIN = (408, 409, 429, 500, 502, 503, 504)
_NO_FORM = (400, 404, 422, 501)  # how endpoints refuse a response format that they do not have


class EndpointTarget:
    """A model behind HTTP.

    Args:
      url: such as http://127.0.0.1:8000/v1. model: its name there.
      key: sent as a bearer token. style: "chat" by chat completions, else completions.
      tokenizer: of the same model, to size prompts; None: the endpoint's /tokenize, or an estimate.
      timeout: seconds without a byte after which a request is given up.
      tell: called with a sentence that the user should know.

    Raises:
      InputError: nothing answers there, the key is refused, or the model is another.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        style: str = "chat",
        tokenizer: Tokenizer | None = None,
        timeout: float = 600.0,
        tell=lambda sentence: None,
    ):
        self.name, self.style = model, style
        self.client = Client(url, key, timeout)
        listed = self._models()
        if model not in listed:
            raise InputError(
                f"{url} serves {', '.join(sorted(listed)) or 'no model'}, not {model[:100]}; "
                "expected one of those as --model"
            )
        self.max_length = _length_of(listed[model])
        self._tokenizer, self._remote = tokenizer, tokenizer is None
        self._bytes_per_token = None
        self._enforces = True  # a schema of the answer, as far as is known
        self._tell = tell
        self.identity = {"model": model, "where": url.rstrip("/"), "style": style}

    def measure(self, prompt: Prompt) -> int:
        """Tokens of a prompt; of a chat with an allowance for its template."""
        if self.style != "chat" or prompt.continues:
            return self._count(prompt.text)
        turns = sum(self._count(str(each.get("content") or "")) for each in prompt.messages)
        tools = self._count(repr(prompt.tools)) if prompt.tools else 0
        return turns + tools + TURN_TOKENS * (len(prompt.messages) + 1)

    def ask(self, prompt, max_new_tokens, stop=(), temperature=0.0, seed=0, shared=0) -> Answer:
        """What the endpoint answers; tries again where it says that it is busy.

        Raises:
          InputError: it refuses, fails again and again, or is silent for too long.
        """
        body: dict[str, Any] = {
            "model": self.name,
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if stop:
            body["stop"] = list(stop)
        if self.style != "chat" or prompt.continues:
            return self._patiently("/completions", body | {"prompt": prompt.text})
        body |= {"messages": [dict(each) for each in prompt.messages]}
        body |= {"thinking": {"type": "disabled"}}
        if prompt.tools:
            body |= {"tools": [dict(each) for each in prompt.tools]}
        if prompt.schema is not None and self._enforces:
            return self._in_form(body, prompt.schema)
        return self._patiently("/chat/completions", body)

    def _in_form(self, body, schema):
        """An answer that obeys a schema; from then on without one where the endpoint refuses it."""
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        try:
            return self._patiently("/chat/completions", body | {"response_format": wanted})
        except InputError as error:
            cause = error.__cause__
            if not isinstance(cause, Refused) or cause.status not in _NO_FORM:
                raise
            answer = self._patiently("/chat/completions", body)
            self._enforces = False
            self._tell(
                f"{self.client.url} refuses a response format ({cause.message[:100]}); answers are "
                "asked for as JSON and not held to it"
            )
            return answer

    def ask_tokens(
        self,
        tokens: Sequence[int],
        max_new_tokens,
        stop=(),
        temperature=0.0,
        seed=0,
        keep=(),
        ends=True,
        salt="",
    ) -> Answer:
        """As `ask`, of ids, by completions."""
        body = {
            "model": self.name,
            "prompt": list(tokens),
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"stop": list(stop)} if stop else {}),
        }
        return self._patiently("/completions", body)

    def encode(self, text: str) -> list[int]:
        """Ids of a text.

        Raises:
          InputError: no tokenizer was given.
        """
        return self._known().encode(text)

    def decode(self, ids) -> str:
        return self._known().decode(ids)

    def _known(self):
        if self._tokenizer is None:
            raise InputError(
                "the suite places tokens exactly, and nothing is known of the endpoint's "
                "tokenizer: give --tokenizer with its checkpoint's directory"
            )
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Ids that every tokenizer has: printable bytes, where nothing else is known."""
        return 128 if self._tokenizer is None else self._tokenizer.vocab_size

    def resize(self, slots: int) -> None:
        """The endpoint has the slots that it has."""

    def warm_up(self) -> float:
        return 0.0

    def close(self) -> None:
        """Nothing is kept open."""

    def _models(self):
        try:
            body = self.client.get("/models")
        except Refused as error:
            raise InputError(_refusal(self.client.url, error)) from error
        data = body.get("data")
        listed = [each for each in data if isinstance(each, dict)] if isinstance(data, list) else []
        return {str(each.get("id")): each for each in listed}

    def _patiently(self, path, body) -> Answer:
        wait = 1.0
        for left in range(_TRIES - 1, -1, -1):
            try:
                return self._once(path, body)
            except Refused as error:
                if error.status not in _AGAIN or not left:
                    raise InputError(_refusal(self.client.url, error)) from error
                time.sleep(min(error.retry_after or wait, 60.0))
                wait *= 4
        raise AssertionError("the last try returns or raises")

    def _once(self, path, body):
        began, pieces = time.perf_counter(), _Pieces(self.name)
        for chunk in self.client.stream(path, body):
            pieces.add(chunk, time.perf_counter() - began)
        return pieces.answer(time.perf_counter() - began)

    def _count(self, text):
        if self._tokenizer is not None:
            return len(self._tokenizer.encode(text))
        if self._remote:
            try:
                tokens = self.client.post_root("/tokenize", {"prompt": text, "model": self.name})
                return len(tokens["tokens"])
            except (Refused, KeyError, TypeError):
                self._remote = False
                self._tell(
                    f"{self.client.url} does not count tokens; lengths are estimated at 4 bytes a "
                    "token (give --tokenizer DIR to have them exact)"
                )
        return math.ceil(len(text.encode()) / 4)


class _Pieces:
    """A streamed answer as it comes."""

    def __init__(self, model):
        self._model, self._answer = model, Answer()
        self._calls: dict[int, dict[str, str]] = {}
        self._cached = None

    def add(self, chunk: dict, since: float) -> None:
        self._check_model(chunk)
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self._count(usage)
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or ""
            calls = delta.get("tool_calls") or []
            for call in calls:
                self._call(call)
            if text or calls or delta.get("reasoning_content"):
                self._answer.times.append((since, 1))
                if self._answer.first_token_seconds is None:
                    self._answer.first_token_seconds = since
            self._answer.text += text
            self._answer.finish = choice.get("finish_reason") or self._answer.finish

    def answer(self, seconds: float) -> Answer:
        self._answer.seconds = seconds
        self._answer.calls = [self._calls[i] for i in sorted(self._calls)]
        if not self._answer.output_tokens:
            self._answer.output_tokens = sum(count for _, count in self._answer.times)
        return self._answer

    def _count(self, usage):
        details = usage.get("prompt_tokens_details") or {}
        self._answer.prompt_tokens = usage.get("prompt_tokens") or 0
        self._answer.output_tokens = usage.get("completion_tokens") or 0
        self._answer.cached_tokens = (
            details.get("cached_tokens") or usage.get("prompt_cache_hit_tokens") or 0
        )

    def _call(self, delta):
        call = self._calls.setdefault(
            delta.get("index") or 0, {"id": "", "name": "", "arguments": ""}
        )
        function = delta.get("function") or {}
        call["id"] = delta.get("id") or call["id"]
        call["name"] += function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""

    def _check_model(self, chunk):
        found = chunk.get("model")
        if isinstance(found, str) and found and not found.startswith(self._model):
            raise InputError(
                f"the endpoint answers with the model {found[:100]!r}, and {self._model!r} was "
                "asked; the records are kept: give that name as --model, or another endpoint"
            )


def _length_of(listed):
    for name in ("max_model_len", "context_length", "max_length"):
        if isinstance(listed.get(name), int):
            return listed[name]
    return None


def _refusal(url, error):
    """A sentence for an error of the endpoint."""
    said = f" ({error.message})" if error.message else ""
    if error.status in (401, 403):
        return f"{url} refuses the key{said}; give the right one as --api_key, or in V4JAX_API_KEY"
    if error.status == 0:
        return f"{url}: {error.message}"
    again = "run again later" if error.status in _AGAIN else "change the request or the endpoint"
    return f"{url} answers with status {error.status}{said}; the records are kept: {again}"
