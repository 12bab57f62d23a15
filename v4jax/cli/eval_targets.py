"""What `v4jax eval` asks, as its flags say: a checkpoint in this process, or an endpoint."""

import os
import sys
from pathlib import Path

from absl import flags

from v4jax.cli import compilation_cache
from v4jax.errors import InputError
from v4jax.eval import latency
from v4jax.eval import sample as sample_lib
from v4jax.eval.descriptions import OfEndpoint, OfEngine
from v4jax.eval.suite import Target

FLAGS = flags.FLAGS
KEY = "V4JAX_API_KEY"
SERVER_SLOTS = 4


def define_flags():
    """Declares the flags."""
    flags.DEFINE_string("checkpoint", "nano", "Checkpoint directory, or the name of a packaged one")
    flags.DEFINE_string("endpoint", None, "URL of an OpenAI-compatible API, in its place")
    flags.DEFINE_string("model", None, "Name of the endpoint's model")
    flags.DEFINE_string("api_key", None, f"Key of the endpoint (default: {KEY}, if it is set)")
    flags.DEFINE_string("tokenizer", None, "Checkpoint whose tokenizer the endpoint's model has")
    flags.DEFINE_float("timeout", 600.0, "Seconds that the endpoint may be silent", lower_bound=0.1)
    flags.DEFINE_enum(
        "style", None, sample_lib.STYLES, "How it is asked (default: as the model can be)"
    )
    flags.DEFINE_integer("concurrency", 1, "Questions under way at a time", lower_bound=1)
    flags.DEFINE_boolean("prefix_cache", True, "Read prefixes that prompts share once")
    flags.DEFINE_integer(
        "max_positions", None, "Positions that the model reads, beyond its own limit", lower_bound=1
    )
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Activations (default: the model's)")
    flags.DEFINE_enum("numerics", None, ["native"], "native: the official FP8 and FP4 rounding")
    flags.DEFINE_string("other_key", None, "controls: key of another tenant")
    flags.DEFINE_string("limited_key", None, "controls: key that may not use completions")
    flags.DEFINE_string("audit", None, "controls: directory of the server's audit log")
    flags.DEFINE_enum(
        "retention", "metadata", ["none", "metadata", "full"], "controls: as the server is set"
    )


def of_checkpoint(longest: int) -> OfEngine:
    """The checkpoint's engine."""
    if FLAGS.model is not None:
        raise InputError("--model is given without --endpoint; name a --checkpoint, or both")
    return OfEngine(
        FLAGS.checkpoint,
        longest,
        slots=FLAGS.concurrency,
        style=FLAGS.style,
        prefix_cache=FLAGS.prefix_cache,
        max_positions=FLAGS.max_positions,
        dtype=FLAGS.dtype,
        numerics=FLAGS.numerics,
        programs=compilation_cache.programs(),
    )


def of_endpoint() -> OfEndpoint:
    """The endpoint."""
    if FLAGS["checkpoint"].present:
        raise InputError("--checkpoint and --endpoint are both given; expected one of them")
    if not FLAGS.model:
        raise InputError("--model is missing; expected the name of the endpoint's model")
    return OfEndpoint(
        FLAGS.endpoint, FLAGS.model, _key(), FLAGS.style or "chat", FLAGS.tokenizer, FLAGS.timeout
    )


def opened(described: OfEngine | OfEndpoint, longest: int) -> Target:
    """The target in this process, once an endpoint has answered.

    Raises:
      InputError: it reads no `longest` tokens, or whatever else is wrong with it.
    """
    if isinstance(described, OfEngine):
        return described.open()
    target = described.open(say)
    if target.max_length is not None and longest > target.max_length:
        raise InputError(
            f"the longest of --lengths is {longest} tokens, and {FLAGS.model} at {FLAGS.endpoint} "
            f"reads at most {target.max_length}: give shorter ones"
        )
    return target


def own_server():
    """The checkpoint behind a server of its own."""
    from v4jax.eval.own_server import OwnServer

    say(f"starting v4jax serve for {FLAGS.checkpoint} ...")
    return OwnServer(FLAGS.checkpoint, max(SERVER_SLOTS, FLAGS.concurrency), longest_talk())


def longest_talk() -> int:
    """Tokens of a conversation with tools, as far as the checkpoint reads."""
    return min(8192, longest_of_checkpoint())


def longest_of_checkpoint() -> int:
    """Tokens that the checkpoint's model reads, at most."""
    from v4jax.checkpoints.load import locate
    from v4jax.checkpoints.source import read_announced

    if FLAGS.max_positions is not None:
        return FLAGS.max_positions
    directory = Path(locate(FLAGS.checkpoint))
    if not (directory / "config.json").exists():
        raise InputError(
            f"--checkpoint is {FLAGS.checkpoint[:200]!r}, and there is no config.json in "
            f"{str(directory)[:200]}; expected a checkpoint's directory, or nano"
        )
    return read_announced(directory).config.max_position_embeddings


def controlled():
    """The endpoint for the checks of data controls."""
    from v4jax.eval.controls import Controlled
    from v4jax.eval.http_client import Client

    return Controlled(
        Client(FLAGS.endpoint, _key(), FLAGS.timeout),
        FLAGS.model,
        _key(),
        FLAGS.other_key,
        FLAGS.limited_key,
        None if FLAGS.audit is None else Path(FLAGS.audit),
        FLAGS.retention,
    )


def loads(text: str | None) -> tuple[int, ...]:
    return latency.CONCURRENCY if text is None else numbers("loads", text)


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise InputError(
            f"--{flag} is {text[:100]!r}; expected whole numbers between commas, such as 512,1024"
        ) from error


def _key():
    return FLAGS.api_key or os.environ.get(KEY)


def say(sentence: str) -> None:
    """Tells the user, beside the results."""
    print(sentence, file=sys.stderr, flush=True)
