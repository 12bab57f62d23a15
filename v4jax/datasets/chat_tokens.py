"""The special tokens of the V4 chat format, put into a tokenizer that was learnt without them."""

import json
from collections.abc import Mapping

import tokenizers

from v4jax.errors import InputError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, THINK_END, DSML = "<think>", "</think>", "｜DSML｜"
# In the released tokenizer these are added tokens that decoding does not leave out.
MARKERS = (USER, ASSISTANT, THINK, THINK_END, DSML, "<｜latest_reminder｜>")
PLACE_HOLDER = "<｜place▁holder▁no▁{}｜>"  # the released name of an id that is to be used later


def with_chat_tokens(
    tokenizer: tokenizers.Tokenizer, size: int, renamed: Mapping[str, str]
) -> tokenizers.Tokenizer:
    """The same tokenizer with the chat's special tokens behind its own, `size` ids in all.

    Every id that was there keeps its meaning, and every text without special tokens its ids.

    Args:
      size: the model's vocabulary; ids that are left over become place holders.
      renamed: added tokens that get another spelling: the begin and the end of a learnt tokenizer.

    Raises:
      InputError: a token to rename that is not there, or too small a size.
    """
    described = json.loads(tokenizer.to_str())
    added, vocabulary = described["added_tokens"], described["model"]["vocab"]
    for old, new in renamed.items():
        found = [token for token in added if token["content"] == old]
        if not found:
            raise InputError(f"the tokenizer has no added token {old!r}; expected one to rename")
        found[0]["content"] = new
        if old in vocabulary:
            vocabulary[new] = vocabulary.pop(old)
    first = 1 + max({*vocabulary.values(), *(token["id"] for token in added)})
    if size < first + len(MARKERS):
        raise InputError(
            f"a vocabulary of {size} ids has no room for {first} of the tokenizer and "
            f"{len(MARKERS)} of the chat; expected at least {first + len(MARKERS)}"
        )
    names = [*MARKERS, *(PLACE_HOLDER.format(i) for i in range(size - first - len(MARKERS)))]
    added += [_added(first + i, name, name not in MARKERS) for i, name in enumerate(names)]
    return tokenizers.Tokenizer.from_str(json.dumps(described))


def _added(number, content, special):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, "special": special, **flags}
