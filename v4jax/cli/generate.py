"""Continue a prompt with a checkpoint's model.

The text goes to stdout: the prompt and, token by token, what follows it. With several prompts each
is printed at the end, under a header. Where there is no tokenizer the ids are printed instead, in
the form that --prompt_ids takes. What was loaded and how fast it went goes to stderr.
"""

import collections
import json
import os
import sys
import time
from pathlib import Path

import jax
from absl import flags

from v4jax.accounting import count_parameters
from v4jax.checkpoints import load as checkpoint
from v4jax.checkpoints.source import read_announced
from v4jax.cli import compilation_cache, draft_flags, process_flags, streaming
from v4jax.engine.engine import Engine
from v4jax.engine.prefix_cache import PrefixCache
from v4jax.engine.settings import draft_of
from v4jax.errors import InputError
from v4jax.infer.generate import Generation, check_request, generate
from v4jax.infer.generation_config import end_ids, read_generation_config
from v4jax.infer.sampling import Sampling
from v4jax.infer.tokenizer import Tokenizer
from v4jax.quant import QTensor
from v4jax.sharding import processes
from v4jax.sharding.mesh import mesh_of
from v4jax.sharding.rules import ONE_DEVICE, PREFILL, Layout
from v4jax.tables import short

FLAGS = flags.FLAGS

# Without a prompt the command shows what the embedded checkpoint can do: it knows Python best, and
# a model of its size only repeats itself when it always takes the most likely token.
DEFAULT_PROMPT = "class Reader:\n    def __init__(self"
DEMO = {"temperature": 0.9, "top_p": 0.95}


def define_flags():
    """Declares the flags of this subcommand."""
    flags.DEFINE_string("checkpoint", "nano", "Checkpoint directory, or the name of a packaged one")
    flags.DEFINE_multi_string(
        "prompt", [], "Text to continue, as TEXT itself (default: the first words of a class)"
    )
    flags.DEFINE_multi_string(
        "prompt_ids", [], "Token ids to continue, as 1,2,3, in place of --prompt"
    )
    flags.DEFINE_bool(
        "special_tokens", False, "Special tokens spelt out in --prompt become their ids, not text"
    )
    flags.DEFINE_integer("max_new_tokens", 64, "Tokens to make for each prompt, at most")
    flags.DEFINE_float(
        "temperature", 0.0, "0 takes the most likely token (default without a prompt: 0.9)"
    )
    flags.DEFINE_float("top_p", 1.0, "Draw from the fewest tokens with this much probability")
    flags.DEFINE_integer("top_k", 0, "Draw from this many most likely tokens; 0: from all")
    flags.DEFINE_float("min_p", 0.0, "Leave out tokens less likely than this times the likeliest")
    flags.DEFINE_integer("seed", 0, "The same seed draws the same tokens")
    flags.DEFINE_string(
        "stop_ids", None, "Token ids that end the text, as 1,2; '' for none (default: the model's)"
    )
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Activations (default: the model's)")
    flags.DEFINE_enum(
        "weights", "stored", ["stored", "bf16", "float32"], "How weights are kept in memory"
    )
    flags.DEFINE_enum("numerics", None, ["native"], "native: the official FP8 and FP4 rounding")
    flags.DEFINE_bool(
        "verify", True, "Hold an Orbax checkpoint's tensors against their checksums (0.3 s per GB)"
    )
    flags.DEFINE_integer("max_length", None, "Tokens of prompt and text that the cache can hold")
    flags.DEFINE_string(
        "mesh", None, "Run on many devices, as expert=4,sequence=2 (axes: data, fsdp, tensor too)"
    )
    draft_flags.define_flags(rule=True)
    flags.DEFINE_string(
        "prefix_cache", None, "Directory in which prefixes of prompts and answers are kept"
    )
    streaming.define_flags()
    process_flags.define_flags()
    compilation_cache.define_flag()
    flags.DEFINE_enum("format", "text", ["text", "json"], "json: one object on stdout")


def run(*texts: str) -> int:
    """Loads, generates and prints; the exit status."""
    with process_flags.joined_by_flags():
        compilation_cache.begin()
        return _run([*texts, *FLAGS.prompt])


def _run(texts):
    # Whatever can be wrong without the weights is said before they are read.
    directory = _find_directory()
    announced = read_announced(directory)
    config = announced.config
    tokenizer = _find_tokenizer(directory)
    prompts = _read_prompts(tokenizer, texts)
    settings = _settings(directory, config, demo=not (texts or FLAGS.prompt_ids))
    _check(config, prompts, settings)
    streaming.check(config)
    if FLAGS.stream_weights:
        model, params = streaming.load(directory, prompts, settings["max_new_tokens"], announced)
        _say(streaming.describe(FLAGS.checkpoint, model, params))
    else:
        model, params = _load(directory, announced)
        _say(_describe(FLAGS.checkpoint, model, params))
    report = _Report(tokenizer, prompts, FLAGS.format)
    try:
        result = _generate(model, params, prompts, report.add, settings)
    except KeyboardInterrupt:
        report.finish(report.so_far())
        raise
    if result is not None:
        report.finish(result)
    return 0


def _load(directory, announced):
    return checkpoint.load(
        directory,
        dtype=FLAGS.dtype,
        weights=FLAGS.weights,
        numerics=FLAGS.numerics,
        shards=_layout(),
        verify=FLAGS.verify,
        announced=announced,
    )


def _generate(model, params, prompts, on_token, settings) -> Generation | None:
    """By the engine where a draft or a prefix cache is asked for.

    None in a process that only computes with process 0.
    """
    options = {"on_compile": tell_compiling, "programs": compilation_cache.programs()}
    draft = draft_of(model.config, draft_flags.draft())
    if FLAGS.draft == "auto" and FLAGS.stream_weights:
        draft = None  # drafts run with all weights in memory
    if draft is None and FLAGS.prefix_cache is None:
        return generate(model, params, prompts, on_token=on_token, **options, **settings)
    engine = Engine(
        model,
        params,
        slots=len(prompts),
        max_length=_check(model.config, prompts, settings).capacity,
        draft=draft,
        draft_rule=FLAGS.draft_rule,
        prefix_cache=FLAGS.prefix_cache and PrefixCache(directory=FLAGS.prefix_cache),
        **options,
    )
    with engine:
        if processes.index():
            engine.follow()
            return None
        del settings["max_length"]
        return engine.generate(prompts, on_token=on_token, **settings)


def _layout():
    """Where the model runs: one device, or the mesh of --mesh."""
    mesh = mesh_of(FLAGS.mesh, "--mesh", "expert")
    return ONE_DEVICE if mesh is None else Layout(mesh, PREFILL)


def _settings(directory, config, demo):
    """What `generate` is told: flags, else what lies beside the checkpoint, else flags' defaults.

    demo: without a prompt the demonstration's values stand in for flags that are not given.
    """
    names = ("max_new_tokens", "temperature", "seed", "top_p", "top_k", "min_p", "max_length")
    values = {name: getattr(FLAGS, name) for name in names}
    beside = read_generation_config(directory)._asdict()
    del beside["eos_token_id"]
    beside = {name: value for name, value in beside.items() if value is not None}
    if demo:
        beside = DEMO | beside
    values |= {name: value for name, value in beside.items() if not FLAGS[name].present}
    if FLAGS.stop_ids is None:
        return values | {"stop_ids": end_ids(directory, config)}
    return values | {"stop_ids": _parse_ids("stop_ids", FLAGS.stop_ids)}


def _check(config, prompts, settings):
    settings = dict(settings)
    sampling = Sampling(*(settings.pop(name) for name in Sampling._fields))
    return check_request(config, prompts, setting=sampling, **settings)


class _Report:
    """Prints the tokens as they come and the summary at the end."""

    def __init__(self, tokenizer, prompts, form):
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._json = form == "json"
        self._streams = not self._json and len(prompts) == 1
        self._text = tokenizer.stream() if tokenizer else None
        self._tokens = [[] for _ in prompts]
        self._started = time.perf_counter()
        self._times = []

    def add(self, row, token):
        if self._streams and not self._times:
            _write(self._show(self._prompts[0]))
        self._times.append(time.perf_counter())
        self._tokens[row].append(token)
        if self._streams:
            _write(self._text.add(token) if self._text else f",{token}")

    def so_far(self) -> Generation:
        """The result of a generation that was cut short, its times counted from outside."""
        first = self._times[0] if self._times else time.perf_counter()
        after_first = sum(max(len(tokens) - 1, 0) for tokens in self._tokens)
        return Generation(
            tokens=self._tokens,
            finish_reason=["interrupted"] * len(self._prompts),
            prompt_tokens=[len(prompt) for prompt in self._prompts],
            compile_seconds=0.0,
            time_to_first_token=first - self._started,
            tokens_per_second=after_first / (self._times[-1] - first) if after_first else 0.0,
        )

    def finish(self, result: Generation):
        if self._json:
            _write(json.dumps(self._as_json(result)) + "\n")
        elif self._streams:
            rest = self._text.flush() if self._text else ""
            _write((rest if self._times else self._show(self._prompts[0])) + "\n")
        else:
            for row, (prompt, tokens) in enumerate(zip(self._prompts, result.tokens, strict=True)):
                header = f"--- prompt {row} ({result.finish_reason[row]}) ---"
                _write(f"{header}\n{self._show([*prompt, *tokens])}\n")
        _say(_summary(result))

    def _show(self, ids):
        return self._tokenizer.decode(ids) if self._tokenizer else ",".join(map(str, ids))

    def _as_json(self, result):
        def texts(rows):
            return [self._tokenizer.decode(ids) if self._tokenizer else None for ids in rows]

        return {
            "checkpoint": FLAGS.checkpoint,
            "prompts": texts(self._prompts),
            "prompt_ids": self._prompts,
            "text": texts(result.tokens),
            "tokens": result.tokens,
            "finish_reason": result.finish_reason,
            "prompt_tokens": result.prompt_tokens,
            "new_tokens": [len(tokens) for tokens in result.tokens],
            "compile_seconds": result.compile_seconds,
            "time_to_first_token": result.time_to_first_token,
            "tokens_per_second": result.tokens_per_second,
            "cached_tokens": result.cached_tokens or [0] * len(self._prompts),
            "draft_acceptance": _acceptance(result),
        }


def tell_compiling(names, seconds):
    """One line on a terminal: what is compiled and, once it is, for how long."""
    if sys.stderr is None or not sys.stderr.isatty():
        return
    line = f"compiling {names} ..." if seconds is None else f" {seconds:.1f} s\n"
    print(line, end="", file=sys.stderr, flush=True)


def _summary(result: Generation) -> str:
    new_tokens = sum(len(tokens) for tokens in result.tokens)
    waited = result.compile_seconds + result.time_to_first_token
    return (
        f"{sum(result.prompt_tokens)} prompt tokens, {new_tokens} new tokens, first token after "
        f"{waited:.2f} s ({result.compile_seconds:.2f} s compiling, "
        f"{result.time_to_first_token:.3f} s reading the prompt), "
        f"{result.tokens_per_second:.1f} tokens/s, finished: {', '.join(result.finish_reason)}"
        f"{_of_engine(result)}"
    )


def _of_engine(result: Generation) -> str:
    """What a prefix cache and a draft spared."""
    said = ""
    if sum(result.cached_tokens or []):
        said += f", {sum(result.cached_tokens)} prompt tokens from the prefix cache"
    if (acceptance := _acceptance(result)) is not None:
        said += f", {acceptance:.0%} of {sum(result.drafted)} drafts accepted"
    return said


def _acceptance(result: Generation) -> float | None:
    """The share of a draft's tokens that the model took; None without drafts."""
    drafted = sum(result.drafted or [])
    return sum(result.accepted or []) / drafted if drafted else None


def _describe(name, model, params) -> str:
    """One line: name, parameters of the main model, layers, types and bytes in memory."""
    sizes = collections.Counter()
    for leaf in jax.tree.leaves(params, is_leaf=_is_quantised):
        kind = leaf.kind.upper() if _is_quantised(leaf) else str(leaf.dtype)
        sizes[kind] += sum(array.nbytes for array in jax.tree.leaves(leaf))
    kinds = " + ".join(kind for kind, _ in sizes.most_common())
    parameters = short(count_parameters(model.config).total, "B")
    return (
        f"{name}: {parameters} parameters, {len(model.config.layers)} layers, stored as {kinds} "
        f"in {short(sizes.total())}B"
    )


def _is_quantised(leaf):
    return isinstance(leaf, QTensor)


def _find_directory() -> Path:
    path = checkpoint.locate(FLAGS.checkpoint)
    if not os.path.isdir(path):  # where Path's is_dir raises, for a name too long
        raise InputError(
            f"--checkpoint is {FLAGS.checkpoint[:200]!r}, and there is no directory {path[:200]}; "
            "expected a checkpoint's directory, or nano"
        )
    directory = Path(path)
    checkpoint.check_finished(directory)
    return directory


def _find_tokenizer(directory) -> Tokenizer | None:
    """The checkpoint's tokenizer; None if there is none and the prompts are ids."""
    if FLAGS.prompt_ids and not (directory / "tokenizer.json").exists():
        return None
    return Tokenizer(directory)


def _read_prompts(tokenizer, texts) -> list[list[int]]:
    if texts and FLAGS.prompt_ids:
        raise InputError("a text and --prompt_ids are both given; expected one of them")
    if FLAGS.prompt_ids:
        return [_parse_ids("prompt_ids", ids) for ids in FLAGS.prompt_ids]
    return [tokenizer.encode(text, FLAGS.special_tokens) for text in texts or [DEFAULT_PROMPT]]


def _parse_ids(flag, text) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise InputError(
            f"--{flag} is {text[:200]!r}; expected whole numbers between commas, such as 1,2,3"
        ) from error


def _write(text):
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(line):
    print(line, file=sys.stderr, flush=True)
