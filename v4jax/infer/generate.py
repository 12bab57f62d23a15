"""Text generation: prefill in chunks, then one compiled decode step, again and again.

Prompts are padded to a few lengths and the cache is given a few sizes, so that a second call finds
its programs compiled (`v4jax/infer/programs.py`).
"""

import dataclasses
import os
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from v4jax.errors import InputError
from v4jax.infer import sampling as sampling_lib
from v4jax.infer.arguments import read_prompts, read_stop_ids, whole_number
from v4jax.infer.executables import executables_of
from v4jax.infer.placement import Placement
from v4jax.infer.programs import Decoder
from v4jax.infer.streamed import StreamedDecoder
from v4jax.streamed.model import StreamedTransformer

PREFILL_CHUNK = 2048


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` made, one entry a prompt, and how long it took.

    Attributes:
      tokens: the new tokens only; the token that stopped a row is not among them.
      finish_reason: "stop" (a stop token came) or "length" (`max_new_tokens` were made).
      prompt_tokens: length of each prompt.
      compile_seconds: time that tracing and compiling took, or reading programs that were kept;
        near 0 for shapes seen before. It is not part of the other two.
      time_to_first_token: seconds from the start of the prefill to the first token of every row.
      tokens_per_second: tokens of all rows after their first, over the time after the first; 0.0
        when there are none.
      cached_tokens: tokens of each prompt that an engine found stored; None without an engine.
      drafted, accepted: tokens that a draft proposed for each row, and that the model took.
      text: of the new tokens, where a tokenizer is there.
      logprobs: a `TokenLogprob` of the engine for each new token, where they were asked for.
    """

    tokens: list[list[int]]
    finish_reason: list[str]
    prompt_tokens: list[int]
    compile_seconds: float
    time_to_first_token: float
    tokens_per_second: float
    cached_tokens: list[int] | None = None
    drafted: list[int] | None = None
    accepted: list[int] | None = None
    text: list[str] | None = None
    logprobs: list[list[Any]] | None = None


def generate(
    model,
    params,
    prompts,
    max_new_tokens=64,
    temperature=0.0,
    seed=0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    stop_ids=(),
    max_length=None,
    prefill_chunk=None,
    on_token=None,
    on_compile=None,
    programs=None,
) -> Generation:
    """Continues each prompt.

    No row's tokens depend on the other rows. At temperature 0 they depend on the prompt only,
    otherwise also on (seed, row): step n of row i draws with `fold_in(fold_in(key(seed), i), n)`.

    Args:
      model, params: as `v4jax.load` returns them, streamed ones too. A model with a mesh reads
        prompts and decodes on all of it, whatever its strategy: `Placement`.
      prompts: token ids, a list or array a prompt, of any lengths; or one such list.
      max_new_tokens: how many tokens to make for each prompt, at most.
      temperature: 0 takes the most likely token; else logits are divided by it.
      seed: 0 to 2^32 - 1; the same seed gives the same tokens.
      top_p, top_k, min_p: filters of the distribution, in the order top-k, top-p, min-p (see
        `v4jax/infer/sampling.py`); the defaults leave every token in.
      stop_ids: token or tokens that end a row; by default none does, not even the model's own end
        token (`model.config.eos_token_id`).
      max_length: tokens of prompt and answer that the cache can hold; by default the longest
        prompt and `max_new_tokens`, rounded up so that similar lengths share a compiled program.
      prefill_chunk: tokens of each prompt that are read in one call of the model, 2048 by default.
      on_token: called with (row, token) as soon as a token is known; not for stop tokens.
      on_compile: called with the names of the programs that are about to be compiled and None,
        and again with the seconds that it took.
      programs: a directory in which compiled programs are kept, so that another process with the
        same model, lengths and versions need neither trace nor compile; None keeps none. Of a
        model on a mesh none are kept.

    Returns:
      A `Generation`.

    Raises:
      InputError: for prompts or settings out of range, and for logits that are not finite.
    """
    request = check_request(
        model.config,
        prompts,
        max_new_tokens=max_new_tokens,
        setting=sampling_lib.Sampling(temperature, top_k, top_p, min_p),
        seed=seed,
        stop_ids=stop_ids,
        max_length=max_length,
        prefill_chunk=prefill_chunk,
    )
    prompts, capacity = request.prompts, request.capacity
    decoder = _decoder(model, params, request, programs, on_compile)
    answers = _Answers(prompts, request.stop_ids, on_token)
    cache = decoder.empty_cache(len(prompts), capacity)
    chunks = _prefill_chunks(prompts, request.prefill_chunk, capacity)
    compile_seconds = decoder.compile(chunks, cache, request.max_new_tokens > 1)
    return _run(decoder, chunks, cache, answers, request.max_new_tokens, compile_seconds)


def _decoder(model, params, request, programs, on_compile) -> Decoder | StreamedDecoder:
    key = jax.random.key(request.seed)
    if isinstance(model, StreamedTransformer):
        return StreamedDecoder(model, params, request.setting, key)
    placement = Placement.of(model, len(request.prompts))
    executables = None if programs is None else executables_of(os.fspath(programs))
    variables, key = placement.variables(params), placement.replicate(key)
    return Decoder(placement, variables, request.setting, key, executables, on_compile)


class GenerationRequest(NamedTuple):
    """The checked arguments of `generate`; capacity: tokens that the cache holds."""

    prompts: list[np.ndarray]
    max_new_tokens: int
    setting: sampling_lib.Sampling
    seed: int
    stop_ids: frozenset[int]
    capacity: int
    prefill_chunk: int


def check_request(
    config,
    prompts,
    *,
    max_new_tokens=64,
    setting=sampling_lib.GREEDY,
    seed=0,
    stop_ids=(),
    max_length=None,
    prefill_chunk=None,
) -> GenerationRequest:
    """Checks what `generate` is given against a model's config: no weights are needed for it.

    Raises:
      InputError: prompts or settings out of range.
    """
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
    chunk = PREFILL_CHUNK if prefill_chunk is None else prefill_chunk
    chunk = whole_number("prefill_chunk", chunk, 1)
    seed = whole_number("seed", seed, 0, 2**32 - 1)
    setting = sampling_lib.check(setting)
    prompts = read_prompts(prompts, config.vocab_size)
    stop_ids = read_stop_ids(stop_ids, config.vocab_size)
    capacity = _cache_length(prompts, max_new_tokens, max_length, config)
    return GenerationRequest(prompts, max_new_tokens, setting, seed, stop_ids, capacity, chunk)


def _run(decoder, chunks, cache, answers, max_new_tokens, compile_seconds) -> Generation:
    started = time.perf_counter()
    tokens_B, cache = decoder.prefill(chunks, cache)
    answers.add(np.asarray(tokens_B), step=0)
    first = time.perf_counter()
    if max_new_tokens > 1 and not answers.finished:
        _decode_all(decoder, tokens_B, cache, answers, max_new_tokens)
    last = time.perf_counter()
    after_first = sum(max(len(row) - 1, 0) for row in answers.tokens)
    return Generation(
        tokens=answers.tokens,
        finish_reason=["stop" if stopped else "length" for stopped in answers.stopped],
        prompt_tokens=answers.prompt_tokens,
        compile_seconds=compile_seconds,
        time_to_first_token=first - started,
        tokens_per_second=after_first / (last - first) if after_first else 0.0,
    )


def _decode_all(decoder, tokens_B, cache, answers, max_new_tokens):
    """The second and all later tokens.

    Each step is under way before the tokens of the one before are read, so that the device never
    waits for the host; its work is lost when those tokens end the last row. Of a streamed model,
    whose steps read gigabytes, each waits for the one before.
    """
    tokens_B, cache = decoder.decode(tokens_B, cache, 1)
    for step in range(1, max_new_tokens):
        known_B, more = tokens_B, step + 1 < max_new_tokens
        if more and decoder.runs_ahead:
            tokens_B, cache = decoder.decode(tokens_B, cache, step + 1)
        answers.add(np.asarray(known_B), step)
        if answers.finished:
            break
        if more and not decoder.runs_ahead:
            tokens_B, cache = decoder.decode(tokens_B, cache, step + 1)


class _Answers:
    """The new tokens of each row so far, and which rows are done."""

    def __init__(self, prompts, stop_ids, on_token):
        self.prompt_tokens = [len(prompt) for prompt in prompts]
        self.tokens = [[] for _ in prompts]
        self.stopped = [False] * len(prompts)
        self._stop_ids = stop_ids
        self._on_token = on_token

    @property
    def finished(self):
        return all(self.stopped)

    def add(self, tokens_B, step):
        """Takes one token a row; rows that are done stay as they are."""
        for row, token in enumerate(tokens_B.tolist()):
            if self.stopped[row]:
                continue
            if token < 0:
                raise InputError(
                    f"the logits of prompt {row} are not finite at new token {step}; expected "
                    "finite numbers: look for NaN in the weights with `v4jax inspect --check`"
                )
            if token in self._stop_ids:
                self.stopped[row] = True
                continue
            self.tokens[row].append(token)
            if self._on_token is not None:
                self._on_token(row, token)


def _prefill_chunks(prompts, chunk, capacity):
    """Cuts right-padded prompts into calls: a list of tokens [B, T] and their lengths [B].

    Every chunk but the last has `chunk` tokens; the last is padded to one of a few lengths.
    """
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths_B.max())
    chunks = []
    for start in range(0, longest, chunk):
        width = min(_bucket(min(longest - start, chunk), 256), chunk, capacity - start)
        tokens_BT = np.zeros((len(prompts), width), np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[start : start + width]
            tokens_BT[row, : len(part)] = part
        chunks.append((tokens_BT, np.clip(lengths_B - start, 0, width)))
    return chunks


def _bucket(length, step):
    """The length rounded up: to a power of two from 16, above `step` to its multiples."""
    if length > step:
        return -(-length // step) * step
    return max(16, 1 << (length - 1).bit_length())


def _cache_length(prompts, max_new_tokens, max_length, config):
    """Tokens that the cache holds, checked against the longest prompt and the model."""
    limit = config.max_position_embeddings
    if max_length is not None:
        max_length = whole_number("max_length", max_length, 1)
        if max_length > limit:
            raise InputError(
                f"max_length is {max_length}; expected at most the model's "
                f"max_position_embeddings, {limit}"
            )
    name = "max_position_embeddings" if max_length is None else "max_length"
    allowed = limit if max_length is None else max_length
    row = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    needed = len(prompts[row]) + max_new_tokens
    if needed > allowed:
        raise InputError(
            f"prompt {row} has {len(prompts[row])} tokens and max_new_tokens is {max_new_tokens}, "
            f"{needed} together; expected at most {name} = {allowed}: shorten the prompt or lower "
            "max_new_tokens" + ("" if max_length is None else ", or raise max_length")
        )
    return min(_bucket(needed, 1024), limit) if max_length is None else max_length
