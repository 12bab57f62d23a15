"""Three ways to count tokens: nano's tokenizer, bytes, and words."""

import functools
import re


@functools.cache
def nano():
    from v4jax.infer.tokenizer import Tokenizer

    tokenizer = Tokenizer("nano")
    return lambda prompt: len(tokenizer.encode(prompt.text))


def of_bytes(prompt):
    return len(prompt.text.encode())


def of_words(prompt):
    return len(re.findall(r"\w+|[^\w\s]", prompt.text))


def measures():
    return {"nano": nano(), "bytes": of_bytes, "words": of_words}
