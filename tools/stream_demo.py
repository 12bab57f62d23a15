"""Runs full-size layers from disk and holds them against the same layers in memory.

python tools/stream_demo.py --layers 8 --directory /scratch/demo      # 31 GB of disk

Writes a checkpoint of random weights, then, each in a process of its own and with nothing of the
checkpoint in the page cache: plain reads of its files (the disk's own rate), the streamed model
(prefill, then tokens one by one), and the same calls with each layer whole in memory as one
program. Prints one JSON object: peak memory, bytes, rates, and how far the logits are apart. The
checkpoint is deleted at the end, unless --keep.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from make_synthetic_checkpoint import write_checkpoint

import v4jax
from v4jax.model.block import Block
from v4jax.model.context import place_tokens
from v4jax.named_configs import get_config
from v4jax.streamed import programs

FLAGS = flags.FLAGS
_PIECE = 8 << 20  # bytes of one plain read


def main(_):
    directory = Path(FLAGS.directory)
    if FLAGS.part:
        print(json.dumps(PARTS[FLAGS.part](directory)))
        return
    checkpoint = directory / "checkpoint"
    if not checkpoint.exists():
        directory.mkdir(parents=True, exist_ok=True)
        _write(checkpoint)
    try:
        found = {"layers": FLAGS.layers, "prompt": FLAGS.prompt, "new_tokens": FLAGS.new_tokens}
        for part in PARTS:
            _forget(checkpoint)
            found |= {part: _in_a_process(part)}
        whole, streamed = (np.load(directory / f"{name}.npy") for name in ("held", "streamed"))
        found["largest_logit"] = float(np.abs(whole).max())
        found["largest_difference"] = float(np.abs(whole - streamed).max())
        print(json.dumps(found, indent=2))
    finally:
        if not FLAGS.keep:
            shutil.rmtree(directory)


def plain_reads(directory: Path) -> dict[str, float]:
    """The disk's own rate: all files, in pieces, by as many threads as the streamed model has."""
    files = sorted((directory / "checkpoint").glob("*.safetensors"))
    pieces = [
        (path, at) for path in files for at in range(0, path.stat().st_size, _PIECE)
    ]  # neighbours in time are neighbours on the disk
    started = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        nbytes = sum(pool.map(_read_piece, pieces))
    return {"bytes": nbytes, "bytes_per_second": nbytes / (time.perf_counter() - started)}


def _read_piece(piece):
    path, at = piece
    buffer = bytearray(_PIECE)
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [buffer], at)
    finally:
        os.close(fd)


def streamed(directory: Path) -> dict[str, float]:
    """The streamed model, twice: the second time everything is compiled."""
    model, source = v4jax.load(directory / "checkpoint", stream=True)
    with source:
        _run(lambda *call: model.apply(source, call[0], cache=call[1], logits="last"), model)
        _forget(directory / "checkpoint")
        found, meter = {}, source.meter
        before, busy, started = meter.bytes, meter.seconds, time.perf_counter()

        def apply(tokens, cache):
            out = model.apply(source, tokens, cache=cache, logits="last")
            name = "prefill" if tokens.shape[1] > 1 else "decode"
            found[name + "_bytes"] = (
                meter.bytes
                - before
                - sum(
                    n
                    for key, n in found.items()
                    if key.endswith("_bytes") and key != name + "_bytes"
                )
            )
            found[name + "_seconds"] = time.perf_counter() - started
            return out

        logits = _run(apply, model)
        np.save(directory / "streamed.npy", logits)
        seconds = time.perf_counter() - started
        found["decode_seconds"] -= found["prefill_seconds"]
        return found | {
            "bytes": meter.bytes - before,
            "seconds": seconds,
            "bytes_per_second": (meter.bytes - before) / seconds,
            "bytes_per_second_while_reading": (meter.bytes - before) / (meter.seconds - busy),
            "peak_bytes": _peak(),
            "checkpoint_bytes": source.total_bytes,
        }


def held(directory: Path) -> dict[str, float]:
    """The same calls, each layer whole in memory with all its experts, as one program."""
    model, source = v4jax.load(directory / "checkpoint", stream=True)
    with source:
        np.save(
            directory / "held.npy", _run(functools.partial(_whole_layers, model, source), model)
        )
    return {"peak_bytes": _peak()}


def _whole_layers(model, source, tokens, cache):
    """As `model.apply(..., logits="last")`."""
    config, execution = model.config, model.transformer.execution()
    context = place_tokens(jnp.asarray(tokens), None, cache.lengths, None)
    h_BTMD = programs.begin(config.hc_mult, execution, source.embedding(tokens))
    everything, kept = np.arange(config.n_routed_experts), {}
    for layer, spec in enumerate(config.layers):
        item, name = f"layer_{layer:03d}", f"layers_{layer}"
        variables = source.dense(item)
        experts = source.experts(item, everything, len(everything))
        variables["params"]["ffn"]["experts"] = experts
        kind = programs.Kind(config, spec, execution)
        h_BTMD, own = _whole_layer(kind, variables, h_BTMD, context, cache.layers[name][0])
        kept[name] = (jax.block_until_ready(own),)
        del variables, experts
    y_BTD = programs.collapse(kind, source.dense("head"), context.last(h_BTMD))
    logits = programs.logits_of_rows(y_BTD, source.head_rows(0, config.vocab_size))
    lengths = cache.lengths + tokens.shape[1]
    return v4jax.Output(logits=logits, cache=cache.replace(lengths=lengths, layers=kept))


@functools.partial(jax.jit, static_argnames="kind")
def _whole_layer(kind, variables, h_BTMD, context, cache):
    block = Block(kind.config, kind.spec, kind.execution)
    return block.apply(variables, h_BTMD, context, cache)[:2]


def _run(apply, model):
    """Prefill and decode of the same tokens everywhere: the logits of each call, [calls, V]."""
    count = FLAGS.prompt + FLAGS.new_tokens
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, count), np.int32)
    cache, found = model.init_cache(1, count), []
    ends = [FLAGS.prompt, *range(FLAGS.prompt + 1, count + 1)]
    for first, end in zip([0, *ends[:-1]], ends, strict=True):
        out = apply(tokens[:, first:end], cache)
        cache = out.cache
        found.append(np.asarray(out.logits[0, -1]))
    return np.stack(found)


PARTS = {"plain_reads": plain_reads, "streamed": streamed, "held": held}


def _write(checkpoint):
    config = get_config(FLAGS.config)
    layers = config.layers[: FLAGS.layers]
    config = dataclasses.replace(config, layers=layers, mtp_layers=(), draft_layers=0, dspark=None)
    nbytes = write_checkpoint(config, str(checkpoint))
    print(f"wrote {nbytes:,} bytes", file=sys.stderr)


def _in_a_process(part):
    command = [sys.executable, __file__, f"--part={part}", *sys.argv[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(f"{part}: {done.stdout.strip()}", file=sys.stderr)
    return json.loads(done.stdout)


def _forget(checkpoint):
    """Asks the system to drop the files from its page cache."""
    for path in checkpoint.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _peak():
    """The largest memory that this process has had."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


if __name__ == "__main__":
    flags.DEFINE_string("directory", None, "New directory for the checkpoint", required=True)
    flags.DEFINE_string("config", "flash", "Whose layers")
    flags.DEFINE_integer("layers", 8, "How many of them")
    flags.DEFINE_integer("prompt", 512, "Tokens of the prompt")
    flags.DEFINE_integer("new_tokens", 4, "Tokens behind it, one by one")
    flags.DEFINE_bool("keep", False, "Leave the directory there")
    flags.DEFINE_enum("part", None, list(PARTS), "For the processes that this one starts")
    app.run(main)
