"""Serve a checkpoint's model over HTTP, with the APIs of OpenAI and the Messages API.

Where it listens, and what it cannot do, goes to stderr. SIGINT or SIGTERM stops it: what runs is
finished first.
"""

import dataclasses
import logging
import os
import signal
import sys
from pathlib import Path

from absl import flags

from v4jax.cli import compilation_cache, draft_flags, process_flags
from v4jax.errors import InputError
from v4jax.extras import require
from v4jax.files.writing import writable_directory
from v4jax.sharding import processes

FLAGS = flags.FLAGS


def define_flags():
    """Declares the flags of this subcommand."""
    flags.DEFINE_string("checkpoint", "nano", "Checkpoint directory, or the name of a packaged one")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; without --keys a loopback one")
    flags.DEFINE_integer("port", 8000, "Port to listen on; 0: any free one")
    flags.DEFINE_string("served_name", None, "Model name of the API (default: the directory's)")
    flags.DEFINE_string(
        "keys", None, "Key file; see v4jax keys. Without one only this machine asks"
    )
    flags.DEFINE_string("audit", None, "Directory of the audit log")
    flags.DEFINE_enum(
        "retention",
        None,
        ["none", "metadata", "full"],
        "What is kept: nothing, a line a request, or texts too (default: metadata with --audit)",
    )
    flags.DEFINE_integer("keep_days", 30, "Days for which the audit log and prefixes are kept")
    flags.DEFINE_integer("slots", 8, "Requests decoded together")
    flags.DEFINE_integer("max_length", None, "Tokens of prompt and answer (default: 4096, or less)")
    flags.DEFINE_enum("profile", "v4-ga", ["v4-ga", "v4-preview"], "The chat format's profile")
    draft_flags.define_flags()
    flags.DEFINE_string("prefix_cache", None, "Directory of prefixes (default: memory alone)")
    flags.DEFINE_float("prefix_memory", 1.0, "GB of prefixes in memory; 0: none are kept")
    flags.DEFINE_boolean("lens", False, "Let the page look into requests; keeps them in memory")
    flags.DEFINE_string("mesh", None, "Run on many devices, as expert=4,sequence=2")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Activations (default: the model's)")
    flags.DEFINE_enum("numerics", None, ["native"], "native: the official FP8 and FP4 rounding")
    flags.DEFINE_integer("max_waiting", 256, "Requests that wait for a slot; more get 429")
    flags.DEFINE_float("max_waiting_seconds", 120.0, "Longest wait for a slot; then 503")
    flags.DEFINE_integer("max_prompt_tokens", None, "Longest prompt (default: what a slot holds)")
    flags.DEFINE_integer("max_body_bytes", 8 << 20, "Longest body of a request")
    flags.DEFINE_integer("drain_seconds", 120, "Time that running answers have once told to stop")
    process_flags.define_flags()
    compilation_cache.define_flag()


def run() -> int:
    """Loads and serves; the exit status."""
    for module in ("starlette", "uvicorn", "prometheus_client"):
        require(module, "serve", "the server")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    settings = _settings()
    with process_flags.joined_by_flags():
        return _serve(settings) if processes.index() == 0 else _follow(settings)


def _follow(settings):
    """Computes with process 0, which alone has a socket, keys and a log."""
    from v4jax.serve.build import build

    compilation_cache.begin()
    settings = dataclasses.replace(settings, keys=None, audit=None, retention="none")
    prefixes = _prefix_cache()
    serving = build(
        FLAGS.checkpoint, settings, loading=_loading(), prefix_cache=prefixes, **_options()
    )
    # A scheduler tells every process to stop. The first one finishes what runs, which needs these,
    # and then lets them go; if it dies, they notice.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    serving.engine.follow()
    return 0


def _serve(settings):
    from v4jax.serve import server
    from v4jax.serve.app import make_app
    from v4jax.serve.build import build

    # What can be wrong without the weights is said before they are read.
    with server.bound_socket(FLAGS.host, FLAGS.port) as listening:
        server.check_loopback(listening, settings.keys is not None)
        prefixes = _prefix_cache()
        compilation_cache.begin()
        serving = build(
            FLAGS.checkpoint, settings, loading=_loading(), prefix_cache=prefixes, **_options()
        )
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        _say(f"{settings.name} at http://{shown}:{port}/v1, warming up; SIGINT or SIGTERM stops it")
        if serving.chat is None:
            _say(f"completions only: {serving.no_chat}")
        server.serve(make_app(serving), serving, listening)
    return 0


def _settings():
    from v4jax.serve.settings import Settings

    retention = FLAGS.retention or ("none" if FLAGS.audit is None else "metadata")
    if FLAGS.retention == "none" and FLAGS.prefix_cache:
        raise InputError(
            "--retention none keeps nothing but counters, and --prefix_cache keeps prompts in a "
            "directory; leave one of them out"
        )
    path = Path(FLAGS.checkpoint)
    names = ("profile", "keep_days", "max_body_bytes", "max_prompt_tokens", "max_waiting")
    names += ("max_waiting_seconds", "drain_seconds")
    return Settings(
        name=FLAGS.served_name or path.resolve().name or "model",
        keys=None if FLAGS.keys is None else Path(FLAGS.keys),
        audit=None if FLAGS.audit is None else Path(FLAGS.audit),
        retention=retention,
        **{name: getattr(FLAGS, name) for name in names},
    )


def _prefix_cache():
    from v4jax.engine.prefix_cache import PrefixCache

    if FLAGS.prefix_cache:
        writable_directory(FLAGS.prefix_cache, "--prefix_cache")
    if not 0 <= FLAGS.prefix_memory < 1e6:
        raise InputError(f"--prefix_memory is {FLAGS.prefix_memory}; expected GB, 0 or more")
    size = int(FLAGS.prefix_memory * 1e9)
    return PrefixCache(size, os.path.expanduser(FLAGS.prefix_cache) if FLAGS.prefix_cache else None)


def _loading():
    from v4jax.sharding.mesh import mesh_of
    from v4jax.sharding.rules import PREFILL, Layout

    options = {"dtype": FLAGS.dtype, "numerics": FLAGS.numerics}
    mesh = mesh_of(FLAGS.mesh, "--mesh", "expert")
    return options if mesh is None else options | {"shards": Layout(mesh, PREFILL)}


def _options():
    return {
        "slots": FLAGS.slots,
        "max_length": FLAGS.max_length,
        "lens": FLAGS.lens,
        "draft": draft_flags.draft(),
        "programs": compilation_cache.programs(),
    }


def _say(line):
    print(f"v4jax serve: {line}", file=sys.stderr, flush=True)
