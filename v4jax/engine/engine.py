"""Many requests at once: slots of one cache, prompts read in chunks, one decode round for all.

`Engine` is what callers see: requests in, streams of events out. `loop.Loop` does the work, a step
at a time; a thread may make the steps (`Engine.start`), or whoever waits for an event does. On a
mesh of many processes each makes the same engine: process 0 takes requests, the others `follow`.
"""

import collections
import dataclasses
import itertools
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from v4jax.engine.acceptance import COUPLED
from v4jax.engine.answer import Answer
from v4jax.engine.job import Job
from v4jax.engine.loop import Loop
from v4jax.engine.prefix_cache import PrefixCache
from v4jax.engine.prefixes import Prefixes
from v4jax.engine.processes import Leader, follow
from v4jax.engine.programs import Programs
from v4jax.engine.request import Request, check
from v4jax.engine.settings import chunk_of, draft_rule_of, draft_tokens_of
from v4jax.engine.stream import Stream
from v4jax.errors import InputError
from v4jax.infer.arguments import read_prompts, whole_number
from v4jax.infer.cache_file import fingerprint
from v4jax.infer.compiled import Progress
from v4jax.infer.executables import executables_of
from v4jax.infer.generate import Generation
from v4jax.infer.placement import Placement
from v4jax.sharding import processes
from v4jax.sharding.messages import Messages


class Engine:
    """Runs requests; see the module.

    Args:
      model, params: as `v4jax.load` returns them; a model with a mesh runs on all of it.
      slots: requests that are decoded together.
      max_length: tokens of prompt and answer that a slot holds.
      prefill_chunk: tokens of a prompt that are read between two decode rounds, a multiple of 128.
      exact: read every chunk in the same width, so that restored prefixes are exact to the bit.
      draft: "mtp" or "dspark", which the model must have; None for none; "auto": see `draft_of`.
      draft_tokens: how many tokens it proposes a round; by default all of a DSpark block, or 2.
      draft_rule: "coupled", with which a draft changes no token; or "rejection", which accepts more
        of them and changes tokens, though not their distribution: see `acceptance`.
      prefix_cache: where prefixes of prompts and answers are kept; None: nowhere.
      seed: of requests without one.
      tokenizer: for texts in events and for `Request.stop`.
      programs: a directory in which compiled programs are kept for other processes.
      on_compile: as of `v4jax.generate`.

    Raises:
      InputError: a number out of range.
    """

    def __init__(
        self,
        model,
        params,
        *,
        slots: int = 8,
        max_length: int = 4096,
        prefill_chunk: int | None = None,
        exact: bool = False,
        draft: str | None = "auto",
        draft_tokens: int | None = None,
        draft_rule: str = COUPLED,
        prefix_cache: PrefixCache | None = None,
        seed: int = 0,
        tokenizer=None,
        programs=None,
        on_compile=None,
    ):
        slots = whole_number("slots", slots, 1)
        limit = model.config.max_position_embeddings
        self._max_length = whole_number("max_length", max_length, 1, limit)
        self._config, self._tokenizer = model.config, tokenizer
        self._seed = whole_number("seed", seed, 0, 2**32 - 1)
        chunk = chunk_of(model.config, prefill_chunk, max_length)
        kind, drafted = draft_tokens_of(model.config, draft, draft_tokens)
        placement = Placement.of(model, slots, one_at_a_time=True)
        self._programs: Programs | Leader = Programs(
            placement,
            placement.variables(params),
            slots=slots,
            max_length=self._max_length,
            chunk=chunk,
            exact=exact,
            kind=kind,
            drafted=drafted,
            rule=draft_rule_of(draft_rule),
            pages=prefix_cache is not None,
            executables=None if programs is None else executables_of(os.fspath(programs)),
            on_compile=on_compile,
        )
        self._arrivals = itertools.count()
        self._lock = threading.RLock()  # of the loop; held for as long as a step takes
        # Requests and cancellations wait here, so that nobody waits for a step to hand one in.
        self._inbox: collections.deque[tuple[Callable, Any]] = collections.deque()
        self._gate = threading.Lock()
        self._news = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False
        # All processes read the weights' fingerprint: each has a part of them.
        weights = None if prefix_cache is None else fingerprint(params)
        self._followed: Messages | None = None  # of process 0, in the others
        if _in_many_processes(model):
            settings = {"slots": slots, "max_length": self._max_length, "chunk": chunk}
            settings |= {"exact": bool(exact), "draft": kind, "draft_tokens": drafted}
            processes.agree("the engine", settings | {"prefixes": weights})
            messages = Messages()
            if processes.index():
                self._followed = messages
                return
            self._programs = Leader(self._programs, messages)
        prefixes = None
        if prefix_cache is not None:
            prefixes = Prefixes(prefix_cache, self._programs, model, weights, chunk, exact, kind)
        self._loop = Loop(
            self._programs, prefixes, slots=slots, chunk=chunk, exact=exact, drafted=drafted
        )

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self._config.vocab_size

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer that a slot holds."""
        return self._max_length

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests: `close` was called, or a step has failed."""
        return self._closed

    def submit(self, request: Request, notify: Callable[[], None] = lambda: None) -> Stream:
        """Takes a request in; its stream of events. It does not wait for a step to end.

        Args:
          notify: called once the request has a slot and after every event, by whichever thread
            makes the steps; it should do no more than wake who reads them.

        Raises:
          InputError: a value out of range, a prompt that no slot holds, or a closed engine.
        """
        self._check_leads()
        checked = check(request, self._config, self._max_length, self._tokenizer is not None)
        stream = Stream(len(checked.tokens), self._wait, self._cancel, notify)
        text = None if self._tokenizer is None else self._tokenizer.stream()
        matcher, stop_ids = None, checked.stop_ids
        if checked.constraint is not None:
            eos = self._config.eos_token_id
            matcher = checked.constraint.matcher(self._tokenizer, eos)
            stop_ids |= frozenset() if eos is None else {eos}
        answer = Answer(stop_ids, checked.stop, checked.max_new_tokens, text)
        with self._gate:
            if self._closed:
                raise InputError("the engine is closed; make another one for further requests")
            number = next(self._arrivals)
            own = checked.seed is not None
            seed, row = (checked.seed, checked.row) if own else (self._seed, number)
            job = Job(checked, stream, answer, seed, row, matcher)
            self._inbox.append((self._loop.submit, job))
        self._news.set()
        return stream

    def generate(self, prompts, max_new_tokens=64, seed=0, on_token=None, **options) -> Generation:
        """As `v4jax.generate`: the same tokens for the same prompts, settings and seed.

        Args:
          on_token: called with (row, token) as soon as a token is known.
          options: further fields of `Request`.
        """
        started, compiled = time.perf_counter(), self._programs.compile_seconds
        streams = [
            self.submit(
                Request(prompt, max_new_tokens=max_new_tokens, seed=seed, row=row, **options)
            )
            for row, prompt in enumerate(read_prompts(prompts, self.vocab_size))
        ]
        reading = None  # time that compiling took until the last first token
        while not all(stream.finished for stream in streams):
            self._wait()
            if reading is None and all(stream.begun_answer for stream in streams):
                reading = self._programs.compile_seconds - compiled
            for row, stream in enumerate(streams if on_token is not None else ()):
                for event in stream.ready():
                    for token in event.tokens:
                        on_token(row, token)
        results = [stream.result() for stream in streams]
        for row, result in enumerate(results):
            if result.error is not None:
                raise InputError(f"prompt {row}: {result.error}")
        compiled = self._programs.compile_seconds - compiled
        seconds = time.perf_counter() - started
        made = _generation(results, seconds, compiled, compiled if reading is None else reading)
        if self._tokenizer is not None:
            made = dataclasses.replace(made, text=[each.text for each in results])
        if options.get("logprobs") is not None:
            made = dataclasses.replace(made, logprobs=[each.logprobs for each in results])
        return made

    def score(self, tokens) -> list[float]:
        """The log-probability of each token but the first, given those before it."""
        stream = self.submit(Request(tokens, max_new_tokens=0, prompt_logprobs=0))
        result = stream.result()
        if result.error is not None:
            raise InputError(result.error)
        return [each.logprob for each in result.prompt_logprobs[1:]]

    def warm_up(self) -> float:
        """Compiles every program, so that no request waits for one; the seconds that it took."""
        self._check_leads()
        with self._lock:
            return self._programs.warm_up()

    @property
    def compiling(self) -> Progress | None:
        """How far the programs are that are being compiled now; None: there are none."""
        return self._programs.progress

    def stats(self) -> dict[str, Any]:
        """Counters since the engine was made, and how many requests wait and run now.

        They are read while a step may be under way, so that two of them may differ by its work.
        """
        self._check_leads()
        if self._lock.acquire(blocking=False):
            try:
                self._take_in()
            finally:
                self._lock.release()
        return self._loop.stats()

    def start(self) -> None:
        """Runs the loop in a thread, until `close`."""
        self._check_leads()
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, daemon=True, name="v4jax-engine")
                self._thread.start()

    def close(self) -> None:
        """Ends every request with `cancelled`, and the thread. A second call does nothing.

        In process 0 of many it lets the others go; in these it does nothing.
        """
        if self._followed is not None:
            return
        with self._gate:
            self._closed = True
        with self._lock:
            self._take_in()
            self._loop.end("cancelled")
            if isinstance(self._programs, Leader):
                self._programs.end()
        self._news.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def follow(self) -> None:
        """In all processes but the first: computes with it, until it closes its engine.

        Raises:
          InputError: in process 0, or on a mesh of one process.
        """
        if self._followed is None:
            raise InputError(
                "follow() was called where requests are taken; expected it in the processes other "
                "than 0 of a mesh of several: here use submit, generate or start"
            )
        follow(self._programs, self._followed)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def step(self) -> bool:
        """One chunk of a prompt and one decode round, at most; whether there was anything to do."""
        self._check_leads()
        with self._lock:
            self._take_in()
            try:
                return self._loop.step()
            except Exception as error:
                # The device or a program failed: no request can go on.
                with self._gate:
                    self._closed = True
                self._take_in()
                reason = f"{type(error).__name__}: {str(error)[:300]}"
                self._loop.end("error", f"the engine stopped: {reason}")
                raise

    def _check_leads(self):
        if self._followed is not None:
            raise InputError(
                f"this is process {processes.index()} of an engine on many, and process 0 alone "
                "takes requests and makes steps; call follow() here"
            )

    def _run(self):
        while not self._closed:
            self._news.clear()
            with self._lock:
                worked = not self._closed and self.step()
            if not (worked or self._inbox or self._closed) and self._loop.idle:
                self._news.wait()

    def _take_in(self):
        """Has the loop know of what has come since the last step."""
        while self._inbox:
            tell, what = self._inbox.popleft()
            tell(what)

    def _wait(self):
        """Called by whoever waits for an event."""
        if self._thread is None:
            self.step()
        else:
            time.sleep(0.0005)

    def _cancel(self, stream):
        self._inbox.append((self._loop.cancel, stream))
        self._news.set()


def _in_many_processes(model):
    mesh = model.sharding.mesh
    return mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1


def _generation(results, seconds, compiled, reading) -> Generation:
    """Results of one call; the time that compiling took, `reading` until then, is taken out."""
    first = max((each.first_token_seconds or 0.0) for each in results)
    first = max(first - reading, 0.0)
    later = sum(max(len(each.tokens) - 1, 0) for each in results)
    return Generation(
        tokens=[each.tokens for each in results],
        finish_reason=[str(each.finish) for each in results],
        prompt_tokens=[each.prompt_tokens for each in results],
        compile_seconds=compiled,
        time_to_first_token=first,
        tokens_per_second=later / max(seconds - compiled - first, 1e-9) if later else 0.0,
        cached_tokens=[each.cached_tokens for each in results],
        drafted=[each.drafted for each in results],
        accepted=[each.accepted for each in results],
    )
