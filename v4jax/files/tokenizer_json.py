"""Reads tokenizer.json, and makes of it the tokenizer of texts in which nothing is special."""

import json
import os
import re

import tokenizers

from v4jax.errors import InputError
from v4jax.files.regular import read_regular

# Added tokens that steer a model though their file does not call them special, as the markers of
# the released models: <｜User｜>, <think>, [INST]. Added words and runs of spaces are text.
_MARKER = re.compile(r"<\S+>|\[\S+\]|.*[|｜].*", re.DOTALL)


def read_tokenizer(path: str | os.PathLike, cure: str) -> tokenizers.Tokenizer:
    """The tokenizer of a file.

    Args:
      cure: what to do where there is none or it is damaged.

    Raises:
      InputError: it cannot be read, or is no tokenizer.
    """
    content = read_regular(path, cure=cure)
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except BaseException as error:  # plain Exception, or a panic, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read as a tokenizer ({reason}); {cure}") from None


def of_text(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer for texts of others: special tokens that they spell out stay text.

    All ids are the same; only that which encodes differs.
    """
    described = json.loads(tokenizer.to_str())  # the library's own words, nested as its types are
    for added in described["added_tokens"]:
        added["special"] |= _MARKER.fullmatch(added["content"]) is not None
    plain = tokenizers.Tokenizer.from_str(json.dumps(described))
    plain.encode_special_tokens = True
    return plain
