"""What an engine does where nothing is said: the chunk of a prompt, the draft and its width."""

import jax

from v4jax.engine.acceptance import RULES
from v4jax.engine.slots import page_tokens
from v4jax.errors import InputError
from v4jax.infer.arguments import whole_number
from v4jax.infer.generate import PREFILL_CHUNK
from v4jax.model import draft as draft_lib

MTP_TOKENS = 2  # a chain of more seldom has its last ones accepted


def chunk_of(config, prefill_chunk, max_length):
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


def draft_rule_of(rule: str) -> str:
    """The rule by which drafts are accepted."""
    if rule not in RULES:
        raise InputError(f"draft_rule is {rule!r}; expected one of {RULES}")
    return rule


def draft_tokens_of(config, draft: str | None, tokens) -> tuple[str | None, int]:
    """The kind of draft and how many tokens it proposes."""
    draft = draft_of(config, draft)
    if draft is None:
        return None, 0
    draft_lib.check_kind(config, draft)
    block = config.dspark.block_size if draft == "dspark" else None
    if tokens is None:
        return draft, block or MTP_TOKENS
    return draft, whole_number("draft_tokens", tokens, 1, block)
