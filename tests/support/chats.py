"""A small byte-level tokenizer with the special tokens of the V4 chat format, and requests."""

import json
import os
import shutil

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

# Names as the released tokenizer.json has them, and whether it calls them special there.
SPECIALS = {
    "<｜begin▁of▁sentence｜>": True,
    "<｜end▁of▁sentence｜>": True,
    "<｜▁pad▁｜>": True,
    "<｜User｜>": False,
    "<｜Assistant｜>": False,
    "<think>": False,
    "</think>": False,
    "｜DSML｜": False,
    "<｜latest_reminder｜>": False,
}
BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK, DSML, REMINDER = range(256, 265)
IDS = dict(zip(SPECIALS, range(256, 265), strict=True))

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1},
            },
            "required": ["city"],
        },
    },
}


def byte_ids(text: str) -> list[int]:
    """The ids of a text: a byte's id is its place in the alphabet of byte-level tokenizers."""
    return [_PLACES[byte] for byte in text.encode()]


def _byte_places():
    """GPT-2's alphabet, in the order of its characters: printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: byte for byte in printable}
    characters |= {byte: 256 + i for i, byte in enumerate(others)}
    order = sorted(range(256), key=lambda byte: characters[byte])
    return {byte: place for place, byte in enumerate(order)}


_PLACES = _byte_places()


def chat_tokenizer(names=SPECIALS) -> tokenizers.Tokenizer:
    """One token a byte, 0 to 255, and the special tokens behind them."""
    vocab = {
        character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name in names:
        token = tokenizers.AddedToken(name, special=SPECIALS[name], normalized=not SPECIALS[name])
        (tokenizer.add_special_tokens if SPECIALS[name] else tokenizer.add_tokens)([token])
    return tokenizer


def chat_directory(directory, names=SPECIALS, checkpoint=None):
    """Puts the tokenizer into a directory, beside a checkpoint's files if there is one."""
    if checkpoint is not None:
        shutil.copytree(checkpoint, directory, dirs_exist_ok=True)
    chat_tokenizer(names).save(os.path.join(directory, "tokenizer.json"))
    return directory


def encoded(text: str) -> list[int]:
    """The ids of a text in which special tokens stand for themselves."""
    return chat_tokenizer().encode(text).ids


def user(text):
    return {"role": "user", "content": text}


def body(*messages, **more):
    """A body of Chat Completions."""
    return {"model": "m", "messages": list(messages)} | more


def dsml(name: str, **arguments) -> str:
    """A tool call as a model writes it."""
    tag = "｜DSML｜"
    lines = [f'<{tag}invoke name="{name}">']
    for key, value in arguments.items():
        text = isinstance(value, str)
        shown = value if text else json.dumps(value)
        kind = "true" if text else "false"
        lines.append(f'<{tag}parameter name="{key}" string="{kind}">{shown}</{tag}parameter>')
    lines.append(f"</{tag}invoke>")
    return "\n".join(lines)


def calls(*each: str) -> str:
    """A block of calls behind a content."""
    return "\n\n<｜DSML｜tool_calls>\n" + "\n".join(each) + "\n</｜DSML｜tool_calls>"
