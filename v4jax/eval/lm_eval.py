"""lm-eval reads a checkpoint through the engine: `python -m v4jax.eval.lm_eval --model v4jax`.

All other flags are lm-eval's; `--model_args checkpoint=nano` names the checkpoint. lm-eval (0.4.13)
looks for no models in other packages, so this module registers ours and runs lm-eval's command.

Log-likelihoods are the engine's log-probabilities of a prompt, made chunk by chunk: the logits of a
whole prompt never exist. A text begins with the beginning-of-sequence token, as in training.
"""

import sys
from pathlib import Path

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from v4jax.checkpoints.load import load, locate
from v4jax.datasets import chat_tokens
from v4jax.engine.engine import Engine
from v4jax.engine.request import Request
from v4jax.errors import InputError
from v4jax.eval.in_chat import Chats
from v4jax.eval.sample import Prompt
from v4jax.infer.generation_config import end_ids
from v4jax.infer.tokenizer import Tokenizer

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_IGNORED = {"do_sample", "until", "max_gen_toks"}  # read by name


class V4Jax(TemplateLM):
    """A checkpoint as lm-eval's model; the arguments are what `--model_args` takes.

    Args:
      checkpoint: directory, or "nano".
      max_length: tokens of a prompt with its answer; None for the model's own limit. Of a longer
        context the end is kept, as lm-eval's other models do.
      batch_size: requests that are answered together.
      dtype, numerics: as of `v4jax.load`.
      add_bos_token: whether a text begins with the beginning-of-sequence token.
      device, max_batch_size: what lm-eval passes to every model; jax chooses the device.

    Raises:
      InputError: no such checkpoint, no tokenizer, or a model without that token.
    """

    def __init__(
        self,
        checkpoint: str = "nano",
        max_length: int | None = None,
        batch_size: int | str | None = 8,
        dtype: str | None = None,
        numerics: str | None = None,
        add_bos_token: bool = True,
        device=None,
        max_batch_size=None,
    ):
        super().__init__()
        directory = Path(locate(checkpoint))
        self._directory = directory
        self._tokenizer = Tokenizer(directory)
        model, params = load(checkpoint, dtype=dtype, numerics=numerics)
        config = model.config
        self._chats: Chats | None = None
        bos, self._adds_bos = config.bos_token_id, add_bos_token
        self._stop_ids = end_ids(directory, config)
        if bos is None:
            raise InputError(
                f"{directory}/config.json names no bos_token_id, which a text without context is "
                "scored behind; add it there"
            )
        self._bos: int = bos
        self.max_length = max_length or config.max_position_embeddings
        slots = 8 if batch_size in (None, "auto") else int(batch_size)
        self._engine = Engine(
            model, params, slots=slots, max_length=self.max_length, tokenizer=self._tokenizer
        )

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's stores of requests are named by."""
        return str(self._directory)

    @property
    def eot_token_id(self) -> int:
        return self._stop_ids[0] if self._stop_ids else self._bos

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        return self._bos

    def tok_encode(self, string, add_special_tokens=None, **_) -> list[int]:
        """The ids of a text, without the beginning-of-sequence token unless it is asked for.

        A chat that `apply_chat_template` has written begins with that token and keeps it; other
        special tokens that a chat spells out are themselves, as in transformers.
        """
        if self._chats is not None and string.startswith(chat_tokens.BOS):
            return self._tokenizer.encode(string, special_tokens=True)
        ids = self._tokenizer.encode(string)
        ids = ids[1:] if ids[:1] == [self._bos] else ids
        return [self._bos, *ids] if add_special_tokens else ids

    def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
        """A chat as text, with thinking off, up to where the answer begins.

        Args:
          chat_history: messages with "role" and "content".
          add_generation_prompt: False: the last message is the beginning of the answer.

        Raises:
          InputError: the checkpoint cannot chat, or what is no chat.
        """
        if self._chats is None:
            self._chats = Chats(self._directory, self._directory.name)
            self._stop_ids = tuple(sorted({*self._stop_ids, *self._chats.stop_ids}))
        prefix = "" if add_generation_prompt else chat_history[-1]["content"]
        messages = chat_history if add_generation_prompt else chat_history[:-1]
        tokens = self._chats.tokens(Prompt(tuple(messages), prefix))
        return self._tokenizer.decode(tokens, special_tokens=True)

    def chat_template(self, chat_template=False) -> str | None:
        """What lm-eval notes of the template: the format has no text of its own."""
        return "v4-ga, thinking off" if chat_template else None

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        """(log-likelihood of the continuation, whether it is the greedy one) of each request."""
        pairs = []
        for (_text, continued), context, continuation in requests:
            if self._adds_bos and context[:1] != [self._bos]:
                context = [self._bos, *context]
            if len(continuation) >= self.max_length:
                raise InputError(
                    f"the continuation {continued[:40]!r} has {len(continuation)} tokens; expected "
                    f"fewer than max_length, {self.max_length}"
                )
            pairs.append((context, continuation))
        found = self._score(pairs, disable_tqdm)
        for (key, _, _), result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, result)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        """The log-likelihood of whole texts, each token scored once with what fits before it."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            # A window's input and what it predicts together are one token longer than its input.
            for window in get_rolling_token_windows(
                self.tok_encode(text), self._bos, self.max_length - 1, context_len=1
            ):
                windows.append(make_disjoint_window(window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scores = self._score(windows, disable_tqdm)
        for owner, (logprob, _) in zip(owners, scores, strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        """The model's continuations, without the text that ended each."""

        def request_of(instance):
            context, given = instance.args
            given = normalize_gen_kwargs(given)
            new = min(given["max_gen_toks"], self.max_length - 1)
            unknown = set(given) - _IGNORED - set(_SAMPLING)
            if unknown:
                raise InputError(
                    f"the task asks for {', '.join(sorted(unknown))}; expected of its "
                    f"generation_kwargs until, max_gen_toks, do_sample, {', '.join(_SAMPLING)}"
                )
            return Request(
                self._kept(self.tok_encode(context, self._adds_bos), self.max_length - new),
                max_new_tokens=new,
                stop=tuple(text for text in given["until"] if text),
                stop_ids=self._stop_ids,
                seed=0,
                **{name: given[name] for name in _SAMPLING if given.get(name) is not None},
            )

        results = self._run([request_of(each) for each in requests], disable_tqdm)
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, result.text)
        return [result.text for result in results]

    def close(self) -> None:
        """Frees the engine."""
        self._engine.close()

    def _kept(self, tokens, count):
        """The last `count` tokens; behind the beginning-of-sequence token, if that is the first."""
        if len(tokens) <= count:
            return tokens
        first = tokens[:1] if tokens[0] == self._bos and count > 1 else []
        return first + tokens[-(count - len(first)) :]

    def _score(self, pairs, disable_tqdm):
        """As `_loglikelihood_tokens`, of pairs of context and continuation."""
        requests = [
            Request(
                self._kept(context + continuation, self.max_length),
                max_new_tokens=0,
                prompt_logprobs=1,
            )
            for context, continuation in pairs
        ]
        found = []
        for (_, continuation), result in zip(pairs, self._run(requests, disable_tqdm), strict=True):
            places = result.prompt_logprobs[-len(continuation) :]
            greedy = all(place.token == place.top[0][0] for place in places)
            found.append((sum(place.logprob for place in places), greedy))
        return found

    def _run(self, requests, disable_tqdm):
        """The results, in order; longer prompts are begun first, so that none waits at the end."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
        streams = {i: self._engine.submit(requests[i]) for i in order}
        results = {}
        for i in order if disable_tqdm else tqdm(order, "Running requests", disable=None):
            results[i] = streams[i].result()
            if results[i].error is not None:
                raise InputError(f"request {i}: {results[i].error}")
        return [results[i] for i in range(len(requests))]


def register() -> None:
    """Makes the model known to lm-eval as "v4jax"."""
    if "v4jax" not in model_registry:
        model_registry.register("v4jax", target=V4Jax)


def main() -> None:
    """lm-eval's own command, which now knows `--model v4jax`."""
    from lm_eval.__main__ import cli_evaluate

    register()
    try:
        cli_evaluate()
    except InputError as error:
        sys.exit(f"v4jax: {error}")


if __name__ == "__main__":
    main()
