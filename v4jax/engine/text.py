"""Text in, text out: `v4jax.generate` and `v4jax.stream`.

Texts are encoded by the tokenizer that lies beside the checkpoint, which the model knows. What
needs no more than `infer.generate` is done there; stop texts, log-probabilities, penalties and
biases are the engine's.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from v4jax.engine.engine import Engine
from v4jax.engine.request import Request
from v4jax.errors import InputError
from v4jax.infer import generate as generate_lib
from v4jax.infer.arguments import read_prompts
from v4jax.infer.generate import Generation, check_request
from v4jax.infer.generation_config import end_ids
from v4jax.infer.sampling import Sampling
from v4jax.infer.tokenizer import Tokenizer
from v4jax.model.transformer import Transformer

_SLOTS = 16  # prompts that an engine runs together


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
    stop_ids=None,
    max_length=None,
    prefill_chunk=None,
    on_token=None,
    on_compile=None,
    programs=None,
    *,
    stop=(),
    logprobs=None,
    repetition=1.0,
    presence=0.0,
    frequency=0.0,
    bias=None,
    tokenizer=None,
) -> Generation:
    """Continues each prompt.

    No row's tokens depend on the other rows. At temperature 0 they depend on the prompt only,
    otherwise also on (seed, row): step n of row i draws with `fold_in(fold_in(key(seed), i), n)`.

    Args:
      model, params: as `v4jax.load` returns them, streamed ones too. A model with a mesh reads
        prompts and decodes on all of it, whatever its strategy.
      prompts: a text or several, or token ids: a list or array a prompt, of any lengths, or one
        such list. Texts need the tokenizer that lies beside the checkpoint, or `tokenizer`.
      max_new_tokens: how many tokens to make for each prompt, at most.
      temperature: 0 takes the most likely token; else logits are divided by it.
      seed: 0 to 2^32 - 1; the same seed gives the same tokens.
      top_p, top_k, min_p: filters of the distribution, in the order top-k, top-p, min-p (see
        `v4jax/infer/sampling.py`); the defaults leave every token in.
      stop_ids: token or tokens that end a row. By default none ends token ids, and a text ends
        where the checkpoint says, in generation_config.json or config.json.
      max_length: tokens of prompt and answer that the cache can hold; by default the longest
        prompt and `max_new_tokens`, rounded up so that similar lengths share a compiled program.
      prefill_chunk: tokens of each prompt that are read in one call of the model, 2048 by default.
      on_token: called with (row, token) as soon as a token is known; not for stop tokens.
      on_compile: called with the names of the programs that are about to be compiled and None,
        and again with the seconds that it took.
      programs: a directory in which compiled programs are kept, so that another process with the
        same model, lengths and versions need neither trace nor compile; None keeps none. Of a
        model on a mesh none are kept.
      stop: texts that end a row, wherever token borders lie; none is part of it.
      logprobs: None, or how many of the likeliest tokens to name with each new token's own
        log-probability, 0 to 20; of the model's distribution, before any filter.
      repetition, presence, frequency: penalties; bias: a number by token id. See
        `v4jax/engine/adjust.py`; the defaults do nothing.
      tokenizer: a `v4jax.Tokenizer` in place of the checkpoint's own.

    Returns:
      A `Generation`; its `text` is there for texts, and where `stop` or `tokenizer` is given.

    Raises:
      InputError: for prompts or settings out of range, and for logits that are not finite.
    """
    texts, stop = _texts(prompts), (stop,) if isinstance(stop, str) else tuple(stop)
    tokenizer = _tokenizer(model, tokenizer, needed=texts is not None or bool(stop))
    if texts is not None:
        prompts = [tokenizer.encode(text) for text in texts]
        stop_ids = _ends(model) if stop_ids is None else stop_ids
    sampling = Sampling(temperature, top_k, top_p, min_p)
    ends = () if stop_ids is None else stop_ids
    common = {"max_new_tokens": max_new_tokens, "seed": seed, "stop_ids": ends}
    places = {"max_length": max_length, "prefill_chunk": prefill_chunk}
    told = {"on_compile": on_compile, "programs": programs}
    penalties = {"repetition": repetition, "presence": presence, "frequency": frequency}
    more = {"stop": stop, "logprobs": logprobs, "bias": bias} | penalties
    asked = {name: value for name, value in more.items() if value != _DEFAULTS[name]}
    if asked:
        prompts = read_prompts(prompts, model.config.vocab_size)
        request = check_request(model.config, prompts, setting=sampling, **common, **places)
        slots = min(len(prompts), _SLOTS)
        engine = _engine(model, params, asked, slots, request.capacity, places, tokenizer, told)
        with engine:
            common |= sampling._asdict()
            return engine.generate(prompts, on_token=on_token, **common, **asked)
    common |= sampling._asdict() | places | told
    result = generate_lib.generate(model, params, prompts, on_token=on_token, **common)
    return result if tokenizer is None else _with_text(result, tokenizer)


def stream(
    model, params, prompt, *, max_length=None, prefill_chunk=None, tokenizer=None, **options: Any
) -> Iterator[Any]:
    """The answer to one prompt as it comes: pieces of text, or token ids for a prompt of ids.

    Closing the iterator ends the answer.

    Args:
      model, params, prompt, max_length, prefill_chunk, tokenizer: as of `generate`, one prompt.
      options: fields of `v4jax.Request`, such as max_new_tokens, temperature, stop and presence.

    Raises:
      InputError: as `generate`; at once, not with the first piece.
    """
    is_text = isinstance(prompt, str)
    tokenizer = _tokenizer(model, tokenizer, needed=is_text or bool(options.get("stop")))
    if is_text:
        prompt = tokenizer.encode(prompt)
        options = {"stop_ids": _ends(model)} | options
    (prompt,) = read_prompts([prompt], model.config.vocab_size)
    request = Request(prompt, **({"seed": 0} | options))
    places = {"max_length": max_length, "prefill_chunk": prefill_chunk}
    limits = {"max_new_tokens": request.max_new_tokens, **places}
    capacity = check_request(model.config, [prompt], **limits).capacity
    engine = _engine(model, params, ["stream"], 1, capacity, places, tokenizer, {})
    return _pieces(engine, engine.submit(request), is_text)


_DEFAULTS: dict[str, Any] = {
    "stop": (),
    "logprobs": None,
    "repetition": 1.0,
    "presence": 0.0,
    "frequency": 0.0,
    "bias": None,
}


def _pieces(engine, events, is_text):
    with engine:
        for event in events:
            if event.error is not None:
                raise InputError(event.error)
            if is_text and event.text:
                yield event.text
            elif not is_text:
                yield from event.tokens


def _texts(prompts) -> list[str] | None:
    """The prompts if they are texts."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list | tuple) or not prompts:
        return None
    kinds = {isinstance(each, str) for each in prompts}
    if len(kinds) > 1:
        raise InputError("some prompts are texts and some are not; expected one of both")
    return list(prompts) if kinds == {True} else None


def _tokenizer(model, given, needed) -> Tokenizer | None:
    """The tokenizer that is given, or that of the checkpoint."""
    if given is not None:
        return given
    source = _source(model)
    if source is not None and os.path.exists(os.path.join(source, "tokenizer.json")):
        return Tokenizer(source) if needed else None
    if needed:
        where = "the model was not loaded from files" if source is None else f"{source} has none"
        raise InputError(
            f"texts need a tokenizer, and {where}; give tokenizer=v4jax.Tokenizer(directory), or "
            "token ids"
        )
    return None


def _ends(model):
    """Ids that end a text of the checkpoint."""
    return end_ids(_source(model), model.config)


def _engine(model, params, asked, slots, capacity, places, tokenizer, told) -> Engine:
    if not isinstance(model, Transformer):
        raise InputError(
            f"{', '.join(sorted(asked))} came with a model whose weights stay on disk, which the "
            "engine does not run; load it without stream=True, or leave that out"
        )
    chunk = places["prefill_chunk"]
    options = {"prefill_chunk": chunk, "draft": None, "tokenizer": tokenizer}
    return Engine(model, params, slots=slots, max_length=capacity, **options, **told)


def _source(model) -> str | None:
    """The directory that a model came from; one with its weights on disk holds another."""
    return getattr(getattr(model, "transformer", model), "source", None)


def _with_text(result: Generation, tokenizer) -> Generation:
    return dataclasses.replace(result, text=[tokenizer.decode(each) for each in result.tokens])
