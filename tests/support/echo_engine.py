"""An engine without a model: its answers follow from the prompts, so that HTTP is tested alone."""

import contextlib
import queue
import threading
import time

import numpy as np

from v4jax.checkpoints.load import locate
from v4jax.engine.answer import Answer
from v4jax.engine.prefix_cache import PrefixCache
from v4jax.engine.request import TokenLogprob, check
from v4jax.engine.stream import Stream
from v4jax.hf.config import read_config
from v4jax.infer.tokenizer import Tokenizer


def continuation(prompt, count, vocab):
    """The tokens that follow a prompt; never 0 or 1."""
    start = int(np.sum(prompt))
    return [2 + (start + 7 * n) % (vocab - 2) for n in range(count)]


class EchoEngine:
    """What the server asks of an `Engine`; one request at a time, in a thread.

    Args:
      directory: of the tokenizer and config. pace: seconds for a token.
    """

    def __init__(self, directory="nano", max_length=2048, pace=0.0):
        self._pace = pace
        self._config = read_config(f"{locate(directory)}/config.json")
        self._tokenizer = Tokenizer(directory)
        self.vocab_size, self.max_length = self._config.vocab_size, max_length
        self.closed, self.compiling = False, None
        self.cache = PrefixCache()
        self.counts = dict.fromkeys(("queue_depth", "cancelled", "output_tokens"), 0)
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._free = threading.Event()
        self._free.set()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request, notify=lambda: None):
        checked = check(request, self._config, self.max_length, True)
        stream = Stream(len(checked.tokens), self._free.wait, self._cancel, notify)
        self.counts["queue_depth"] += 1
        self._queue.put((checked, stream))
        return stream

    def stats(self):
        return self.counts | {
            "slots_busy": 0,
            "accepted_at": [3, 1],
            "rounds": 4,
            "compilations": 2,
            "step_seconds": {"decode": (5, 0.25)},
        }

    def warm_up(self):
        return 0.0

    def start(self):
        pass

    def close(self):
        pass

    @contextlib.contextmanager
    def held(self):
        """Within it the engine does nothing until `release`."""
        self._free.clear()
        try:
            yield
        finally:
            self.release()

    def release(self):
        self._free.set()

    def _cancel(self, stream):
        self._cancelled.add(id(stream))

    def _run(self):
        while True:
            self._answer(*self._queue.get())

    def _answer(self, request, stream):
        self._free.wait()
        self.counts["queue_depth"] -= 1
        stream.begun(0)
        answer = Answer(
            request.stop_ids, request.stop, request.max_new_tokens, self._tokenizer.stream()
        )
        if (top := request.prompt_logprobs) is not None:
            scores = [_score(int(token), top) for token in request.tokens[1:]]
            stream.scored([None, *scores])
        if not request.max_new_tokens:
            stream.push(answer.end("length"))
        tokens = continuation(request.tokens, request.max_new_tokens, self.vocab_size)
        for token in tokens:
            self._free.wait()
            time.sleep(self._pace)
            if id(stream) in self._cancelled:
                self._cancelled.discard(id(stream))
                self.counts["cancelled"] += 1
                stream.push(answer.end("cancelled"))
                return
            logprob = None if request.logprobs is None else _score(token, request.logprobs)
            event = answer.add(token, logprob)
            self.counts["output_tokens"] += 1
            if event is not None:
                stream.push(event)
            if answer.finish is not None:
                return


def _score(token, top):
    return TokenLogprob(token, -0.5, tuple((token + n, -0.5 - n) for n in range(top)))
