"""A checkpoint's chat format: requests of three APIs to ids and settings of the engine."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from v4jax.chat import body as body_lib
from v4jax.chat import constraints
from v4jax.chat.conversation import Conversation
from v4jax.chat.errors import refusal
from v4jax.chat.kept import KeptTurns
from v4jax.chat.recipe import APIS, Recipe, Turn, specials
from v4jax.checkpoints.load import locate
from v4jax.engine import adjust
from v4jax.errors import InputError
from v4jax.files.regular import read_regular
from v4jax.hf.config import read_config
from v4jax.infer import sampling as sampling_lib
from v4jax.infer.generation_config import end_ids
from v4jax.infer.sampling import Sampling
from v4jax.infer.tokenizer import Tokenizer

PROFILES = ("v4-ga", "v4-preview")
PAGE = 128  # tokens; prefixes are stored in whole pages


class ChatFormat:
    """How one model is talked to. `read` may be called by several threads.

    Args:
      path: a checkpoint's directory, "nano", or the path of a tokenizer.json.
      served_name: the model's name in requests and answers.
      profile: "v4-ga", or "v4-preview" for the checkpoints of April; see docs/chat.md.
      max_length: tokens of prompt and answer together, as of the engine; None: the model's own
        limit, which its config.json says.

    Attributes:
      tokenizer: the same tokenizer.json for the engine.
      stop_ids: ids that end an answer: the chat's end token, and those that the checkpoint names.
      kept: turns with tool calls as they were sampled.

    Raises:
      InputError: no tokenizer, or one without the special tokens of a V4 chat.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        served_name: str,
        profile: str = "v4-ga",
        max_length: int | None = None,
    ):
        if profile not in PROFILES:
            raise InputError(f"profile is {profile!r}; expected one of {', '.join(PROFILES)}")
        directory = Path(locate(path))
        if directory.name == "tokenizer.json":
            directory = directory.parent
        if not (directory / "tokenizer.json").exists():
            raise InputError(
                f"{directory}: there is no tokenizer.json, so the model cannot chat; put the "
                "checkpoint's there, or ask for completions of token ids, which alone are possible"
            )
        self.served_name, self.profile = served_name, profile
        self.tokenizer = Tokenizer(directory)
        self._ids = self._special_ids(directory)
        text = read_regular(directory / "tokenizer.json").decode()
        self._recipe = Recipe(text, served_name)
        self.max_length = _max_length(directory, max_length)
        self.stop_ids = frozenset({self._ids["eos"]} | _ends(directory))
        self.kept = KeptTurns()

    def read(
        self, body: bytes | str | dict[str, Any], api: str = "chat", tenant: str = ""
    ) -> Conversation:
        """The conversation that a request's body holds. Takes time with its length.

        Args:
          body: JSON. api: "chat" (Chat Completions), "responses" or "messages".
          tenant: for whom; turns that were kept for another are not used.

        Raises:
          ChatError: a request that cannot be answered, and how to say so.
        """
        if api not in APIS:
            raise ValueError(f"api is {api!r}; expected one of {APIS}")
        values = body_lib.read_body(api, body)
        checked = body_lib.checked(api, values, self.served_name, self.profile)
        turn = self._recipe.read(api, checked.values)
        if checked.must_call and not turn.required:
            raise refusal(api, "tool_choice cannot be obeyed here; leave it out", "tool_choice")
        tokens = self._with_kept(turn, self._recipe.encode(turn), tenant)
        return Conversation(
            recipe=self._recipe,
            turn=turn,
            tokens=tokens,
            max_new_tokens=self._recipe.max_new_tokens(turn, len(tokens), self.max_length),
            sampling=_sampling(api, checked.sampling),
            constraint=self._constraint(turn, checked),
            include_usage=checked.include_usage,
            stop_ids=self.stop_ids,
            thinking_end=self._ids["thinking_end"] if turn.thinking else None,
            keep_at=_before(tokens, self._ids["user"]),
            header=_last(tokens, self._ids["assistant"]) + 1,
            kept=self.kept,
            tenant=tenant,
        )

    def _special_ids(self, directory):
        """The ids of the special tokens by their names."""
        spelled = specials()._asdict()
        found = {name: self.tokenizer.special_id(text) for name, text in spelled.items()}
        missing = [spelled[name] for name, token in found.items() if token is None]
        if missing:
            raise InputError(
                f"{directory / 'tokenizer.json'} lacks the special tokens of a V4 chat "
                f"({', '.join(missing)}), so the model cannot chat; completions alone are possible"
            )
        return found

    def _with_kept(self, turn: Turn, tokens: list[int], tenant: str) -> list[int]:
        """The ids with turns as they were sampled, where those come back unchanged."""
        found = {
            place: kept
            for place, said in enumerate(turn.said)
            if (kept := self.kept.find(tenant, said)) is not None
        }
        if not found:
            return tokens
        heads = [i for i, token in enumerate(tokens) if token == self._ids["assistant"]]
        if turn.continues or len(heads) != len(turn.said) + 1:
            return tokens  # a form of history in which turns cannot be told apart
        for place, kept in reversed(found.items()):  # from behind, so that places stay
            begin = heads[place] + 2
            if tokens[begin - 1] == kept.header:
                end = tokens.index(self._ids["eos"], begin)
                tokens[begin:end] = kept.tokens
        return tokens

    def _constraint(self, turn: Turn, checked):
        """What the answer has to obey; a grammar that cannot be used is the request's fault."""
        grammar = None
        if checked.must_call:
            grammar = constraints.of_calls(
                turn.tools, checked.must_call, not checked.one_call, self._ids["dsml"]
            )
        elif turn.constraint is not None:
            grammar = constraints.of_content(*turn.constraint)
        if grammar is None:
            return None
        after = self._ids["thinking_end"] if turn.thinking else None
        found = constraints.ChatConstraint(grammar, after, self._ids["eos"])
        try:
            found.matcher(self.tokenizer, None)
        except InputError as error:
            raise refusal(turn.api, str(error)) from None
        return found


_NO_PENALTIES = {"presence": 0, "frequency": 0, "repetition": 1, "bias": None}


def _sampling(api, fields):
    """Fields of the engine's request, checked."""
    filters = {name: value for name, value in fields.items() if name in Sampling._fields}
    penalties = {name: value for name, value in fields.items() if name not in filters}
    try:
        checked = sampling_lib.check(Sampling(**filters))
        # The engine knows how many tokens there are.
        adjust.check(**(_NO_PENALTIES | penalties), vocab_size=2**31)
    except InputError as error:
        raise refusal(api, str(error)) from None
    return {name: getattr(checked, name) for name in filters} | penalties


def _max_length(directory, asked):
    if asked is not None:
        return asked
    if not (directory / "config.json").exists():
        raise InputError(
            f"{directory}: there is no config.json that says how much the model holds; give "
            "max_length"
        )
    return read_config(directory / "config.json").max_position_embeddings


def _ends(directory) -> set[int]:
    """Ids that the checkpoint says end a text."""
    path = directory / "config.json"
    return set(end_ids(directory, read_config(path) if path.exists() else None))


def _last(tokens: Sequence[int], token: int) -> int:
    """Where a token stands last; -1 for nowhere."""
    return next((i for i in range(len(tokens) - 1, -1, -1) if tokens[i] == token), -1)


def _before(tokens: Sequence[int], user: int) -> tuple[int, ...]:
    """The last whole page before the final user turn."""
    place = _last(tokens, user) // PAGE * PAGE
    return (place,) if place > 0 else ()
