"""Many requests at once: slots of one cache, prompts read in chunks, one decode round for all.

`Engine.step` is the whole loop; a thread may call it (`Engine.start`), or whoever waits for a
stream does. What it decides, it decides from plain numbers of the host; a round is under way
before the tokens of the one before are looked at.
"""

import dataclasses
import itertools
import os
import threading
import time
from typing import Any

import jax
import numpy as np

from v4jax.engine.answer import Answer
from v4jax.engine.choice import ALL, Draws, words
from v4jax.engine.constraint import Matcher, fitted
from v4jax.engine.prefix_cache import PrefixCache
from v4jax.engine.prefixes import Prefixes, Taken
from v4jax.engine.programs import Programs, Row
from v4jax.engine.request import Checked, Event, Request, TokenLogprob, check
from v4jax.engine.scheduler import Scheduler
from v4jax.engine.slots import page_tokens
from v4jax.engine.speculate import Widths
from v4jax.engine.stream import Stream
from v4jax.errors import InputError
from v4jax.infer.arguments import whole_number
from v4jax.infer.executables import executables_of
from v4jax.infer.generate import PREFILL_CHUNK, Generation
from v4jax.infer.placement import Placement
from v4jax.model import draft as draft_lib

MTP_TOKENS = 2  # a chain of more seldom has its last ones accepted


@dataclasses.dataclass(eq=False)
class _Job:
    """A request that has not ended.

    Attributes:
      request, stream, answer: what was asked, the caller's end, the answer so far.
      seed, row: what its tokens are drawn with; see `Request.seed`.
      matcher: where the answer stands in its grammar, or None.
      read: tokens of the prompt that the model has seen.
      asked: new tokens that were asked of the device, known or not.
      scores: log-probabilities of the prompt's tokens, chunk by chunk.
      units: where the prompt's units are taken. on_grid: see `Hit`.
      made: the new tokens, also those that are held back.
      newest: the unit of the last whole page of prompt and answer.
    """

    request: Checked
    stream: Stream
    answer: Answer
    seed: int
    row: int
    matcher: Matcher | None = None
    read: int = 0
    asked: int = 0
    scores: list = dataclasses.field(default_factory=list)
    units: frozenset[int] = frozenset()
    on_grid: bool = True
    made: list[int] = dataclasses.field(default_factory=list)
    newest: Taken | None = None

    @property
    def held(self) -> int:
        """Tokens that the slot's cache holds while the request decodes."""
        return len(self.request.tokens) + self.asked - 1

    @property
    def wants_more(self) -> bool:
        return self.answer.finish is None and self.asked < self.request.max_new_tokens


@dataclasses.dataclass
class _Pending:
    """A choice that is under way, and whose token each of its rows is."""

    choice: Any
    jobs: dict[int, _Job]
    limit_S: Any = None  # of a round: drafts that each slot could accept
    width: int = 1
    began: float = 0.0


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
        prefix_cache: PrefixCache | None = None,
        seed: int = 0,
        tokenizer=None,
        programs=None,
        on_compile=None,
    ):
        slots = whole_number("slots", slots, 1)
        limit = model.config.max_position_embeddings
        self._max_length = whole_number("max_length", max_length, 1, limit)
        self._config, self._chunk = model.config, _chunk(model.config, prefill_chunk, max_length)
        self._seed = whole_number("seed", seed, 0, 2**32 - 1)
        self._tokenizer = tokenizer
        kind, self._drafted = _draft(model.config, draft, draft_tokens)
        placement = Placement.of(model, slots)
        self._programs = Programs(
            placement,
            placement.variables(params),
            slots=slots,
            max_length=self._max_length,
            chunk=self._chunk,
            exact=exact,
            kind=kind,
            drafted=self._drafted,
            pages=prefix_cache is not None,
            executables=None if programs is None else executables_of(os.fspath(programs)),
            on_compile=on_compile,
        )
        self._prefixes = None
        if prefix_cache is not None:
            self._prefixes = Prefixes(
                prefix_cache, self._programs, model, params, self._chunk, exact, kind
            )
        self._exact = exact
        self._scheduler: Scheduler[_Job] = Scheduler(slots)
        self._lane = self._programs.fresh_lane()
        self._row: Row | None = None  # of the prompt that is being read
        self._draws: Draws = self._programs.no_draws()
        self._pending: list[_Pending] = []
        self._cancelled: list[Stream] = []
        self._arrivals = itertools.count()
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._widths = Widths(self._programs.rounds)
        self._verified_at = np.zeros(self._drafted, int)
        self._accepted_at = np.zeros(self._drafted, int)
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self._config.vocab_size

    # What callers use.

    def submit(self, request: Request) -> Stream:
        """Takes a request in; its stream of events.

        Raises:
          InputError: a value out of range, a prompt that no slot holds, or a closed engine.
        """
        checked = check(request, self._config, self._max_length, self._tokenizer is not None)
        stream = Stream(len(checked.tokens), self._wait, self._cancel)
        text = None if self._tokenizer is None else self._tokenizer.stream()
        matcher, stop_ids = None, checked.stop_ids
        if checked.constraint is not None:
            eos = self._config.eos_token_id
            matcher = checked.constraint.matcher(self._tokenizer, eos)
            stop_ids |= frozenset() if eos is None else {eos}
        answer = Answer(stop_ids, checked.stop, checked.max_new_tokens, text)
        with self._news:
            if self._closed:
                raise InputError("the engine is closed; make another one for further requests")
            number = next(self._arrivals)
            own = checked.seed is not None
            seed, row = (checked.seed, checked.row) if own else (self._seed, number)
            job = _Job(checked, stream, answer, seed, row, matcher)
            self._scheduler.submit(job, checked.priority)
            self._counts["requests"] += 1
            self._news.notify_all()
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
            for row, prompt in enumerate(_as_rows(prompts))
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
        return _generation(results, seconds, compiled, compiled if reading is None else reading)

    def score(self, tokens) -> list[float]:
        """The log-probability of each token but the first, given those before it."""
        stream = self.submit(Request(tokens, max_new_tokens=0, prompt_logprobs=0))
        result = stream.result()
        if result.error is not None:
            raise InputError(result.error)
        return [each.logprob for each in result.prompt_logprobs[1:]]

    def warm_up(self) -> float:
        """Compiles every program, so that no request waits for one; the seconds that it took."""
        with self._lock:
            return self._programs.warm_up()

    def stats(self) -> dict[str, Any]:
        """Counters since the engine was made, and how many requests wait and run now."""
        with self._lock:
            now = {
                "queue_depth": self._scheduler.waiting,
                "slots_busy": self._scheduler.busy,
                "compilations": self._programs.compiled,
            }
            acceptance = self._accepted_at / np.maximum(self._verified_at, 1)
            now["acceptance"] = acceptance.round(4).tolist()
            return self._counts | now | ({} if self._prefixes is None else self._prefixes.stats())

    def start(self) -> None:
        """Runs the loop in a thread, until `close`."""
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, daemon=True, name="v4jax-engine")
                self._thread.start()

    def close(self) -> None:
        """Ends every request with `cancelled`, and the thread. A second call does nothing."""
        with self._news:
            self._closed = True
            for job in self._scheduler.jobs():
                self._finish(job, job.answer.end("cancelled"))
            self._pending.clear()
            if self._prefixes is not None:
                self._prefixes.close()
            self._news.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    # The loop.

    def step(self) -> bool:
        """One chunk of a prompt and one decode round, at most; whether there was anything to do."""
        with self._lock:
            self._end_cancelled()
            if self._prefixes is not None:
                self._prefixes.store_due()
            self._admit()
            reads = self._scheduler.reading is not None
            if reads:
                # A chunk takes long: tokens that are there already do not wait for it.
                self._hand_out(0)
                self._read_chunk()
            decodes = self._decode_round()
            # The newest round goes on while the host looks at those before it.
            self._hand_out(1 if decodes and not self._needs_tokens() else 0)
            return reads or decodes or bool(self._pending)

    def _run(self):
        while True:
            with self._news:
                if self._closed:
                    return
                if not (self._scheduler.jobs() or self._pending or self._cancelled):
                    self._news.wait()
                    continue
                try:
                    self.step()
                except Exception as error:
                    self._fail(error)
                    raise

    def _wait(self):
        """Called by whoever waits for an event."""
        if self._thread is None:
            try:
                self.step()
            except Exception as error:
                self._fail(error)
                raise
        else:
            time.sleep(0.0005)

    def _fail(self, error):
        """The device or a program failed: no request can go on."""
        with self._lock:
            self._closed = True
            self._pending.clear()
            sentence = f"the engine stopped: {type(error).__name__}: {str(error)[:300]}"
            for job in self._scheduler.jobs():
                self._finish(job, job.answer.end("error", sentence))

    def _cancel(self, stream):
        with self._news:
            self._cancelled.append(stream)
            self._news.notify_all()

    def _end_cancelled(self):
        streams, self._cancelled = self._cancelled, []
        for job in self._scheduler.jobs():
            if job.stream in streams:
                self._counts["cancelled"] += 1
                self._finish(job, job.answer.end("cancelled"))

    def _admit(self):
        admitted = self._scheduler.admit()
        if admitted is not None:
            _, job = admitted
            self._row = self._programs.fresh_row()
            # Scores are asked of every token of the prompt: none can be left out.
            if self._prefixes is not None and job.request.prompt_logprobs is None:
                prompt, salt = job.request.tokens, job.request.salt
                self._row, hit = self._prefixes.restore(prompt, salt, self._row)
                job.read, job.on_grid = hit.length, hit.on_grid
                wanted = job.request.keep_at
                job.units = self._prefixes.places(len(prompt), job.read, hit.shared, wanted)
                self._counts["cached_tokens"] += job.read
            job.stream.begun(job.read)

    def _read_chunk(self):
        """The next chunk of the prompt that is being read; behind its last the first choice."""
        slot, job = self._scheduler.reading
        prompt = job.request.tokens
        # Chunks end at multiples of the chunk, wherever the first one began.
        end = min((job.read // self._chunk + 1) * self._chunk, len(prompt))
        end = min([place for place in job.units if place > job.read] + [end])
        tokens = prompt[job.read : end]
        if job.request.prompt_logprobs is None:
            logits_1V, self._row = self._programs.read(tokens, self._row)
        else:
            following = prompt[job.read + 1 : end + 1]
            logits_1V, self._row, scores = self._programs.read_scored(tokens, following, self._row)
            job.scores += _logprobs(following, scores, job.request.prompt_logprobs)
        self._counts["prompt_tokens"] += end - job.read
        job.on_grid &= job.read % self._chunk == 0 and end - job.read == self._chunk
        job.read = end
        if end in job.units:
            salt, known = job.request.salt, prompt[:end]
            self._prefixes.add(self._prefixes.take(self._row, 0, known, salt, job.on_grid))
        if end == len(prompt):
            self._begin_answer(slot, job, logits_1V)

    def _begin_answer(self, slot, job, logits_1V):
        """The prompt is read: its row goes into the slot, and its first token is chosen."""
        if job.request.prompt_logprobs is not None:
            job.stream.scored([None, *job.scores])
        if job.request.max_new_tokens == 0:
            self._row = None
            finite = bool(np.isfinite(np.asarray(logits_1V)).all())
            ended = job.answer.end("length") if finite else _not_finite(job)
            self._finish(job, ended)
            return
        self._scheduler.start_decoding()
        _set_draw(self._draws, slot, job)
        if not self._permitted(slot, job):
            self._row = None
            return
        draws = jax.tree.map(lambda x: x[slot : slot + 1].copy(), self._draws)
        draws = draws._replace(active=np.ones(1, bool), allowed_SPW=draws.allowed_SPW[:, :1])
        choice = self._programs.first(logits_1V, draws, job.request.logprobs is not None)
        self._lane = self._programs.put(self._lane, slot, self._row, choice.token)
        self._row, job.asked = None, 1
        self._pending.append(_Pending(choice, {0: job}))

    def _decode_round(self) -> bool:
        """Asks for the next tokens of every slot that wants some."""
        if self._needs_tokens():
            self._hand_out(0)
        jobs = {
            slot: job
            for slot, job in self._scheduler.decoding.items()
            if job.wants_more and self._permitted(slot, job)
        }
        if not jobs:
            return False
        self._take_units(jobs)
        drafts_SP, limit_S = self._programs.no_drafts()
        self._draws.active[:] = False
        for slot, job in jobs.items():
            self._draws.active[slot] = True
            self._draws.step[slot] = job.asked
            limit_S[slot] = min(self._drafted, job.request.max_new_tokens - job.asked - 1)
            if self._stores_answers:
                # A round ends where a unit can be taken.
                limit_S[slot] = min(limit_S[slot], -(job.held + 1) % self._prefixes.page)
            job.asked += 1
        scored = any(job.request.logprobs is not None for job in jobs.values())
        # The arrays are changed while the round may not have read them yet.
        draws = jax.tree.map(np.copy, self._draws)
        width = self._programs.rounds[-1]
        if self._drafted:
            drafts_SP, confidence_SP = self._programs.propose(self._lane, draws)
            self._permit_behind(jobs, drafts_SP, draws, limit_S)
            if len(self._programs.rounds) > 1:
                width = self._widths.choose(np.asarray(confidence_SP), draws.active)
                np.minimum(limit_S, width - 1, out=limit_S)
        began = time.perf_counter()
        verified = self._programs.verify(self._lane, drafts_SP, limit_S, draws, scored, width)
        choice, self._lane = verified
        self._pending.append(_Pending(choice, jobs, limit_S, width, began))
        self._counts["rounds"] += 1
        self._counts["row_rounds"] += len(jobs)
        return True

    @property
    def _stores_answers(self):
        # What decoding made is not to the bit what reading it would make.
        return self._prefixes is not None and not self._exact

    def _take_units(self, jobs):
        """Of slots whose prompt and answer fill whole pages."""
        if not self._stores_answers:
            return
        for slot, job in jobs.items():
            if job.held % self._prefixes.page == 0 and job.held >= len(job.request.tokens):
                self._hand_out(0)
                tokens = np.array([*job.request.tokens, *job.made[: job.asked - 1]], np.int32)
                salt = job.request.salt
                job.newest = self._prefixes.take(self._lane, slot, tokens, salt, False)

    def _needs_tokens(self):
        """Whether the next round can only be asked for once the tokens before it are known."""
        jobs = self._scheduler.decoding.values()
        return self._drafted > 0 or any(job.matcher is not None for job in jobs)

    def _permitted(self, slot, job):
        """Whether the answer can go on; one whose grammar permits nothing ends."""
        if self._permit(slot, job):
            return True
        message = "the grammar permits no token here that the model has; correct the grammar"
        self._finish(job, job.answer.end("error", message))
        return False

    def _permit(self, slot, job):
        """Which tokens the slot may choose next; whether there are any."""
        self._draws.allowed_SPW[slot] = ALL
        if job.matcher is None:
            return True
        allowed_W = fitted(job.matcher.allowed(), words(self._config.vocab_size))
        self._draws.allowed_SPW[slot, 0] = allowed_W
        return bool(allowed_W.any())

    def _permit_behind(self, jobs, drafts_SP, draws, limit_S):
        """Which tokens may come behind each draft; drafts that a grammar forbids are cut off."""
        for slot, job in jobs.items():
            if job.matcher is not None:
                drafts = np.asarray(drafts_SP)[slot, : limit_S[slot]].tolist()
                masks = job.matcher.walk(drafts)
                limit_S[slot] = len(masks) - 1
                for place, mask in enumerate(masks):
                    fit = fitted(mask, words(self._config.vocab_size))
                    draws.allowed_SPW[slot, place] = fit

    def _hand_out(self, keep):
        """Reads the choices that are under way, but the newest `keep`, and hands tokens out."""
        while len(self._pending) > keep:
            pending = self._pending.pop(0)
            choice = jax.tree.map(np.asarray, pending.choice)
            if self._drafted and pending.limit_S is not None:
                self._widths.took(pending.width, time.perf_counter() - pending.began)
            for row, job in pending.jobs.items():
                if job.answer.finish is None:
                    self._take(job, jax.tree.map(lambda x, row=row: x[row], choice))
                    if self._drafted and pending.limit_S is not None:
                        self._verified(job, pending.limit_S[row], choice.count[row])

    def _verified(self, job, limit, count):
        """A round's drafts of one row: how many were proposed, how many accepted."""
        job.asked += int(count) - 1
        limit, accepted = int(limit), int(count) - 1
        job.stream.verified(limit, accepted)
        self._counts["drafted"] += limit
        self._counts["accepted"] += accepted
        self._verified_at[:limit] += 1
        self._accepted_at[:accepted] += 1

    def _take(self, job, choice):
        """The new tokens of one row, until one of them ends the answer."""
        for place in range(choice.count):
            self._take_one(
                job, jax.tree.map(lambda x, place=place: x[place], choice[2:]), choice.token[place]
            )
            if job.answer.finish is not None:
                return

    def _take_one(self, job, scores, token):
        token = int(token)
        job.made.append(token)
        if token < 0:
            self._finish(job, _not_finite(job))
            return
        logprob = None
        if job.request.logprobs is not None:
            logprob = _logprobs([token], [x[None] for x in scores], job.request.logprobs)[0]
        event = job.answer.add(token, logprob)
        if job.matcher is not None and job.answer.finish is None:
            job.matcher.advance(token)
            if job.matcher.done():
                rest = job.answer.end("stop")
                event = rest if event is None else _joined(event, rest)
        self._counts["output_tokens"] += 1
        if event is not None and event.finish is not None:
            self._finish(job, event)
        elif event is not None:
            job.stream.push(event)

    def _finish(self, job, event):
        """The request's last event; its slot is free."""
        if self._scheduler.reading is not None and self._scheduler.reading[1] is job:
            self._row = None
        slot = self._scheduler.remove(job)
        if job.newest is not None and event.finish in ("stop", "length"):
            self._prefixes.add(job.newest)
        if event.finish == "error" and slot is not None and not self._closed:
            self._clear(slot)
        self._counts[f"finished_{event.finish}"] += 1
        job.stream.push(event)

    def _clear(self, slot):
        """Numbers that are not finite do not stay behind."""
        row, token_11 = self._programs.fresh_row(), np.zeros((1, 1), np.int32)
        self._lane = self._programs.put(self._lane, slot, row, token_11)


_COUNTS = (
    *("requests", "cancelled", "prompt_tokens", "output_tokens", "rounds", "row_rounds"),
    *("drafted", "accepted", "cached_tokens"),
    *("finished_stop", "finished_length", "finished_cancelled", "finished_error"),
)


def _chunk(config, prefill_chunk, max_length):
    """Tokens of a chunk: as given, else as `generate`, no more than a slot needs."""
    page = page_tokens(config)
    whole = -(-max_length // page) * page
    if prefill_chunk is None:
        return min(PREFILL_CHUNK // page * page or page, whole)
    chunk = whole_number("prefill_chunk", prefill_chunk, page)
    if chunk % page:
        raise InputError(f"prefill_chunk is {chunk}; expected a multiple of {page}")
    return min(chunk, whole)


def draft_of(config, draft: str | None) -> str | None:
    """The kind of draft that is used; "auto": that of the model which makes it faster, if any.

    On a CPU a round of one row costs nearly twice a step of one row with two tokens, since it is
    bound by the number of operations: an MTP block wins there what it costs, and no more.
    """
    if draft != "auto":
        return draft
    kinds = draft_lib.kinds(config)
    if jax.default_backend() == "cpu":
        kinds = tuple(kind for kind in kinds if kind != "mtp")
    return next(iter(kinds), None)


def _draft(config, draft, tokens):
    """The kind of draft and how many tokens it proposes."""
    draft = draft_of(config, draft)
    if draft is None:
        return None, 0
    draft_lib.check_kind(config, draft)
    block = config.dspark.block_size if draft == "dspark" else None
    if tokens is None:
        return draft, block or MTP_TOKENS
    return draft, whole_number("draft_tokens", tokens, 1, block)


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


def _as_rows(prompts):
    """A list of prompts, also of a single one."""
    single = len(prompts) and isinstance(prompts[0], int | np.integer)
    return [prompts] if single or getattr(prompts, "ndim", 2) == 1 else prompts


def _set_draw(draws: Draws, slot, job):
    for values, value in zip(draws.sampling, job.request.sampling, strict=True):
        values[slot] = value
    draws.seed[slot], draws.row[slot], draws.step[slot] = job.seed, job.row, 0


def _logprobs(tokens, scores, count) -> list[TokenLogprob]:
    """Log-probabilities of tokens with the `count` likeliest at each place; see `Choice`."""
    own, top, top_logprob = (np.asarray(x) for x in scores)
    return [
        TokenLogprob(
            int(token),
            float(own[i]),
            tuple((int(top[i, k]), float(top_logprob[i, k])) for k in range(count)),
        )
        for i, token in enumerate(tokens)
    ]


def _joined(event: Event, rest: Event) -> Event:
    """Two events as one."""
    return Event(
        event.tokens + rest.tokens,
        event.text + rest.text,
        event.logprobs + rest.logprobs,
        rest.finish,
        rest.error,
    )


def _not_finite(job) -> Event:
    return job.answer.end(
        "error",
        f"the logits are not finite at new token {job.answer.count}; expected finite numbers: look "
        "for NaN in the weights with `v4jax inspect --check`",
    )
