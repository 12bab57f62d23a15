"""A server of nano for tests: in process by Starlette's client, or real on loopback."""

import contextlib
import functools
import json
import shutil
import threading
import time
from pathlib import Path

import httpx2
import tokenizers
from starlette.testclient import TestClient

import v4jax
from tests.support.chats import SPECIALS
from tests.support.checkpoints import small_config, synthetic
from v4jax.checkpoints.load import locate
from v4jax.config import CSA, HCA, with_hash_routing
from v4jax.engine.engine import Engine
from v4jax.engine.prefix_cache import PrefixCache
from v4jax.hf.config import read_config
from v4jax.serve import server as server_lib
from v4jax.serve.app import make_app
from v4jax.serve.build import chat_format
from v4jax.serve.serving import Serving
from v4jax.serve.settings import Settings

# Few and small programs, which all tests share.
LENGTH = 2048
SIZES = {"slots": 2, "max_length": LENGTH, "prefill_chunk": 128, "exact": True, "draft": None}


class Kept:
    """An engine that several servers use one after the other: closing it is left to the last."""

    def __init__(self, engine, cache):
        self._engine, self.cache = engine, cache

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def warm_up(self):
        """Nothing: a program is compiled by the first test that needs it."""
        return 0.0

    def close(self):
        pass


@functools.cache
def nano():
    return v4jax.load("nano")


def kept_engine(tokenizer, made=None, **changes):
    """An engine of nano or of another model that was made, started; the programs are shared."""
    model, params = nano() if made is None else made
    cache = PrefixCache()
    sizes = SIZES | changes
    engine = Engine(model, params, tokenizer=tokenizer, prefix_cache=cache, **sizes)
    engine.start()
    return Kept(engine, cache)


def serving(engine, directory="nano", figures=None, **settings):
    """The parts of a server; directory: of the tokenizer. figures: of the lens, if it is on."""
    return parts_of(engine, directory, Settings(**({"name": "nano"} | settings)), figures)


def parts_of(engine, directory, settings, figures=None):
    """The same with settings that are made already."""
    config = read_config(f"{locate('nano')}/config.json")
    chat, why_not = chat_format(directory, settings, engine.max_length)
    return Serving(
        settings,
        engine,
        v4jax.Tokenizer(directory),
        bos=config.bos_token_id,
        eos=config.eos_token_id,
        stop_ids=frozenset({config.eos_token_id}),
        chat=chat,
        no_chat=why_not,
        prefix_cache=engine.cache,
        figures=figures,
    )


def tiny_checkpoint(directory):
    """A directory of two layers of random weights with nano's tokenizer: few and small programs."""
    layers = with_hash_routing((CSA, HCA), 1)
    sizes = {"vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 1, "mtp_layers": ()}
    synthetic(directory, small_config(layers=layers, **sizes))
    shutil.copy(Path(locate("nano")) / "tokenizer.json", directory)
    return str(directory)


def chat_nano(directory):
    """A directory of nano whose tokenizer can chat: special tokens in place of its last merges."""
    shutil.copytree(locate("nano"), directory, dirs_exist_ok=True)
    path = Path(directory) / "tokenizer.json"
    described = json.loads(path.read_text())
    model, count = described["model"], len(SPECIALS)
    merged = sorted(model["vocab"], key=model["vocab"].get)[-count:]
    model["vocab"] = {name: at for name, at in model["vocab"].items() if name not in merged}
    model["merges"] = [
        merge
        for merge in model["merges"]
        if "".join(merge.split(" ") if isinstance(merge, str) else merge) not in merged
    ]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(described))
    for name, special in SPECIALS.items():
        token = tokenizers.AddedToken(name, special=special, normalized=not special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    assert tokenizer.get_vocab_size() == 2048
    tokenizer.save(str(path))
    return directory


@contextlib.contextmanager
def in_process(parts, wait=True):
    """A client of an app that runs in this process, once it is ready."""
    with TestClient(make_app(parts), "http://localhost") as client:
        if wait:
            until(lambda: parts.state == "ready")
        yield client


@contextlib.contextmanager
def on_loopback(parts):
    """The base address of a real server in a thread of this process."""
    listening = server_lib.bound_socket("127.0.0.1", 0)
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = server_lib.server_of(make_app(parts), parts)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        until(lambda: parts.state == "ready" and httpx2.get(f"{address}/health").is_success)
        yield address
    finally:
        server.should_exit = True
        thread.join()


def until(true, seconds=600):
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)
