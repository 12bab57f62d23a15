"""The engine's loop: one chunk of one prompt and one decode round a step.

What it decides, it decides from plain numbers of the host. A round is under way before the tokens
of the one before are looked at, unless a draft or a grammar needs them.
"""

import time
from typing import Any

import jax
import numpy as np

from v4jax.engine.adjust import Adjusting
from v4jax.engine.choice import ALL, Draws, no_draws, words
from v4jax.engine.constraint import fitted
from v4jax.engine.functions import Row
from v4jax.engine.job import Job, Pending
from v4jax.engine.prefixes import Prefixes
from v4jax.engine.processes import Leader
from v4jax.engine.programs import Programs
from v4jax.engine.request import Event, TokenLogprob
from v4jax.engine.scheduler import Scheduler
from v4jax.engine.speculate import Widths
from v4jax.engine.stream import Stream


class Loop:
    """The state of all slots, and what a step does with it; for one thread at a time.

    Args:
      programs, slots, chunk, exact, drafted: see `Engine`. prefixes: what is stored where, or None.

    Attributes:
      scheduler: the queue and the slots. counts: what was done since the beginning.
    """

    def __init__(
        self,
        programs: Programs | Leader,
        prefixes: Prefixes | None,
        *,
        slots: int,
        chunk: int,
        exact: bool,
        drafted: int,
    ):
        self.programs, self.prefixes = programs, prefixes
        self.scheduler: Scheduler[Job] = Scheduler(slots)
        self.counts = dict.fromkeys(_COUNTS, 0)
        self._chunk, self._exact, self._drafted = chunk, exact, drafted
        self._lane = programs.fresh_lane()
        self._row: Row | None = None  # of the prompt that is being read
        self._draws: Draws = programs.no_draws()
        self._adjusting = Adjusting(slots, programs.vocab_size)
        self._pending: list[Pending] = []
        self._cancelled: list[Stream] = []
        self._widths = Widths(programs.rounds)
        self._verified_at, self._accepted_at = np.zeros(drafted, int), np.zeros(drafted, int)
        self._times = {kind: [0, 0.0] for kind in STEPS}
        self._ended = False

    def submit(self, job: Job) -> None:
        """Puts a request into the queue."""
        self.scheduler.submit(job, job.request.priority)
        self.counts["requests"] += 1

    def cancel(self, stream: Stream) -> None:
        """Ends a request in the next step."""
        self._cancelled.append(stream)

    @property
    def idle(self) -> bool:
        """Whether a step would have nothing to do."""
        return not (self.scheduler.jobs() or self._pending or self._cancelled)

    def end(self, finish: str, error: str | None = None) -> None:
        """Ends every request."""
        self._ended = True
        for job in self.scheduler.jobs():
            self._finish(job, job.answer.end(finish, error))
        self._pending.clear()
        if self.prefixes is not None and finish != "error":
            self.prefixes.close()

    def stats(self) -> dict[str, Any]:
        """See `Engine.stats`."""
        now = {
            "queue_depth": self.scheduler.waiting,
            "slots_busy": self.scheduler.busy,
            "compilations": self.programs.compiled,
            "acceptance": (self._accepted_at / np.maximum(self._verified_at, 1)).round(4).tolist(),
            "accepted_at": self._accepted_at.tolist(),
            "step_seconds": {kind: tuple(times) for kind, times in self._times.items()},
        }
        return self.counts | now | ({} if self.prefixes is None else self.prefixes.stats())

    def step(self) -> bool:
        """One chunk of a prompt and one decode round, at most; whether there was anything to do."""
        began = time.perf_counter()
        self._end_cancelled()
        if self.prefixes is not None:
            self.prefixes.store_due()
        self._admit()
        reads = self.scheduler.reading is not None
        if reads:
            # A chunk takes long: tokens that are there already do not wait for it.
            self._hand_out(0)
            self._read_chunk()
        decodes = self._decode_round()
        # The newest round goes on while the host looks at those before it.
        self._hand_out(1 if decodes and not self._needs_tokens() else 0)
        if reads or decodes:
            times = self._times["both" if reads and decodes else "read" if reads else "decode"]
            times[0], times[1] = times[0] + 1, times[1] + time.perf_counter() - began
        return reads or decodes or bool(self._pending)

    def _end_cancelled(self):
        streams, self._cancelled = self._cancelled, []
        for job in self.scheduler.jobs():
            if job.stream in streams:
                self.counts["cancelled"] += 1
                self._finish(job, job.answer.end("cancelled"))

    def _admit(self):
        admitted = self.scheduler.admit()
        if admitted is not None:
            _, job = admitted
            self._row = self.programs.fresh_row()
            # Scores are asked of every token of the prompt: none can be left out.
            if self.prefixes is not None and job.request.prompt_logprobs is None:
                prompt, salt = job.request.tokens, job.request.salt
                self._row, hit = self.prefixes.restore(prompt, salt, self._row)
                job.read, job.on_grid = hit.length, hit.on_grid
                wanted = job.request.keep_at
                job.units = self.prefixes.places(len(prompt), job.read, hit.shared, wanted)
                self.counts["cached_tokens"] += job.read
            job.stream.begun(job.read)

    def _read_chunk(self):
        """The next chunk of the prompt that is being read; behind its last the first choice."""
        slot, job = self.scheduler.reading
        prompt = job.request.tokens
        # Chunks end at multiples of the chunk, wherever the first one began.
        end = min((job.read // self._chunk + 1) * self._chunk, len(prompt))
        end = min([place for place in job.units if place > job.read] + [end])
        tokens = prompt[job.read : end]
        if job.request.prompt_logprobs is None:
            logits_1V, self._row = self.programs.read(tokens, self._row)
        else:
            following = prompt[job.read + 1 : end + 1]
            logits_1V, self._row, scores = self.programs.read_scored(tokens, following, self._row)
            job.scores += _logprobs(following, scores, job.request.prompt_logprobs)
        self.counts["prompt_tokens"] += end - job.read
        job.on_grid &= job.read % self._chunk == 0 and end - job.read == self._chunk
        job.read = end
        if end in job.units:
            salt, known = job.request.salt, prompt[:end]
            self.prefixes.add(self.prefixes.take(self._row, 0, known, salt, job.on_grid))
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
        self.scheduler.start_decoding()
        _set_draw(self._draws, slot, job)
        if not self._permitted(slot, job):
            self._row = None
            return
        draws = jax.tree.map(lambda x: x[slot : slot + 1].copy(), self._draws)
        draws = draws._replace(active=np.ones(1, bool), allowed_SPW=draws.allowed_SPW[:, :1])
        self._adjusting.begin(slot, job.request.adjustment, job.request.tokens)
        adjust = self._adjusting.of(slice(slot, slot + 1))
        choice = self.programs.first(logits_1V, draws, job.request.logprobs is not None, adjust)
        ahead = draws._replace(step=draws.step + 1)
        self._lane = self.programs.put(self._lane, slot, self._row, choice.token, ahead)
        self._row, job.asked = None, 1
        self._pending.append(Pending(choice, {0: job}))

    def _decode_round(self) -> bool:
        """Asks for the next tokens of every slot that wants some."""
        if self._needs_tokens():
            self._hand_out(0)
        jobs = {
            slot: job
            for slot, job in self.scheduler.decoding.items()
            if job.wants_more and self._permitted(slot, job)
        }
        if not jobs:
            return False
        self._take_units(jobs)
        proposal, limit_S = self.programs.proposed(self._lane), self.programs.no_drafts()[1]
        self._draws.active[:] = False
        for slot, job in jobs.items():
            self._draws.active[slot] = True
            self._adjusting.count(slot, job.made)
            self._draws.step[slot] = job.asked
            limit_S[slot] = min(self._drafted, job.request.max_new_tokens - job.asked - 1)
            if self._stores_answers:
                # A round ends where a unit can be taken.
                limit_S[slot] = min(limit_S[slot], -(job.held + 1) % self.prefixes.page)
            job.asked += 1
        scored = any(job.request.logprobs is not None for job in jobs.values())
        # The arrays are changed while the round may not have read them yet.
        draws = jax.tree.map(np.copy, self._draws)
        width = self.programs.rounds[-1]
        if self._drafted:
            self._permit_behind(jobs, proposal, draws, limit_S)
            if len(self.programs.rounds) > 1:
                width = self._widths.choose(np.asarray(proposal.confidence), draws.active)
                np.minimum(limit_S, width - 1, out=limit_S)
        began = time.perf_counter()
        adjust = self._adjusting.of(slice(None))
        verified = self.programs.verify(self._lane, proposal, limit_S, draws, scored, width, adjust)
        choice, self._lane = verified
        self._pending.append(Pending(choice, jobs, limit_S, width, began))
        self.counts["rounds"] += 1
        self.counts["row_rounds"] += len(jobs)
        return True

    @property
    def _stores_answers(self):
        # What decoding made is not to the bit what reading it would make.
        return self.prefixes is not None and not self._exact

    def _take_units(self, jobs):
        """Of slots whose prompt and answer fill whole pages."""
        if not self._stores_answers:
            return
        for slot, job in jobs.items():
            if job.held % self.prefixes.page == 0 and job.held >= len(job.request.tokens):
                self._hand_out(0)
                tokens = np.array([*job.request.tokens, *job.made[: job.asked - 1]], np.int32)
                salt = job.request.salt
                job.newest = self.prefixes.take(self._lane, slot, tokens, salt, False)

    def _needs_tokens(self):
        """Whether the next round can only be asked for once the tokens before it are known."""
        jobs = self.scheduler.decoding.values()
        return self._drafted > 0 or any(job.waits for job in jobs)

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
        allowed_W = fitted(job.matcher.allowed(), words(self.programs.vocab_size))
        self._draws.allowed_SPW[slot, 0] = allowed_W
        return bool(allowed_W.any())

    def _permit_behind(self, jobs, proposal, draws, limit_S):
        """Which tokens may come behind each draft; those behind one that is forbidden are cut off.

        So is that one itself, but under rejection: there it is verified, and rejected for certain.
        Were it left out, its place would be drawn from all that may come, of which the drafts that
        are kept have had their share already.
        """
        for slot, job in jobs.items():
            if job.matcher is not None:
                drafts = np.asarray(proposal.token)[slot, : limit_S[slot]].tolist()
                masks = job.matcher.walk(drafts)
                legal, rejected = len(masks) - 1, proposal.probability is not None
                limit_S[slot] = min(limit_S[slot], legal + rejected)
                for place, mask in enumerate(masks):
                    fit = fitted(mask, words(self.programs.vocab_size))
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
        self.counts["drafted"] += limit
        self.counts["accepted"] += accepted
        self._verified_at[:limit] += 1
        self._accepted_at[:accepted] += 1

    def _take(self, job, choice):
        """The new tokens of one row, until one of them ends the answer."""
        for place in range(choice.count):
            scores = jax.tree.map(lambda x, place=place: x[place], choice[2:])
            # The last one is the model's own; those before it were proposed.
            self._take_one(job, scores, choice.token[place], place < choice.count - 1)
            if job.answer.finish is not None:
                return

    def _take_one(self, job, scores, token, drafted):
        token = int(token)
        job.made.append(token)
        if token < 0:
            self._finish(job, _not_finite(job))
            return
        logprob = None
        if job.request.logprobs is not None:
            logprob = _logprobs([token], [x[None] for x in scores], job.request.logprobs)[0]
        event = job.answer.add(token, logprob, bool(drafted))
        if job.matcher is not None and job.answer.finish is None:
            job.matcher.advance(token)
            if job.matcher.done():
                rest = job.answer.end("stop")
                event = rest if event is None else event.joined(rest)
        self.counts["output_tokens"] += 1
        if event is not None and event.finish is not None:
            self._finish(job, event)
        elif event is not None:
            job.stream.push(event)

    def _finish(self, job, event):
        """The request's last event; its slot is free."""
        if self.scheduler.reading is not None and self.scheduler.reading[1] is job:
            self._row = None
        slot = self.scheduler.remove(job)
        if slot is not None:
            self._adjusting.end(slot)
        if job.newest is not None and event.finish in ("stop", "length"):
            self.prefixes.add(job.newest)
        if event.finish == "error" and slot is not None and not self._ended:
            self._clear(slot)
        self.counts[f"finished_{event.finish}"] += 1
        job.stream.push(event)

    def _clear(self, slot):
        """Numbers that are not finite do not stay behind."""
        row, token_11 = self.programs.fresh_row(), np.zeros((1, 1), np.int32)
        draws = no_draws(1, self.programs.vocab_size)
        self._lane = self.programs.put(self._lane, slot, row, token_11, draws)


STEPS = ("read", "decode", "both")  # what a step did: a chunk of a prompt, a round, or both
_COUNTS = (
    *("requests", "cancelled", "prompt_tokens", "output_tokens", "rounds", "row_rounds"),
    *("drafted", "accepted", "cached_tokens"),
    *("finished_stop", "finished_length", "finished_cancelled", "finished_error"),
)


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


def _not_finite(job) -> Event:
    return job.answer.end(
        "error",
        f"the logits are not finite at new token {job.answer.count}; expected finite numbers: look "
        "for NaN in the weights with `v4jax inspect --check`",
    )
