"""One engine in many processes, or in one: a random script of requests, and what came of it."""

import dataclasses
import json
import time

import jax
import numpy as np

from tests.support import meshes
from tests.support.tiny import drawn
from v4jax.draft_sizes import DSpark
from v4jax.engine.engine import Engine
from v4jax.engine.prefix_cache import PrefixCache
from v4jax.engine.request import Request
from v4jax.errors import InputError
from v4jax.model import sharded
from v4jax.model.transformer import Transformer
from v4jax.sharding import processes
from v4jax.sharding.mesh import make_mesh, parse_sizes
from v4jax.sharding.rules import PREFILL, Layout

SIZES = {"slots": 4, "max_length": 256, "prefill_chunk": 128, "exact": True, "draft": None}


class Letters:
    """A tokenizer: each id is a letter."""

    def stream(self):
        return self

    def add(self, token):
        return chr(ord("a") + token % 26)

    def flush(self):
        return ""


def config(draft: str | None = None, layers=(1, 3)):
    """Some of the layers window, CSA, HCA of `meshes.config`; and the draft's."""
    sizes = meshes.config()
    sizes = dataclasses.replace(sizes, layers=sizes.layers[slice(*layers)])
    if draft != "mtp":
        sizes = dataclasses.replace(sizes, mtp_layers=())
    if draft == "dspark":
        block = DSpark(3, 8, sizes.vocab_size - 1, (0, 1))
        sizes = dataclasses.replace(sizes, draft_layers=2, dspark=block)
    return sizes


def made(mesh: str | None, draft: str | None = None, layers=(1, 3)):
    """A model and its variables; mesh: such as "data=2,expert=2", None for one device."""
    model = Transformer(config(draft, layers), min_repeats=2)
    variables = drawn(model)
    if mesh is None:
        return model, variables
    sizes = parse_sizes(mesh)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    model = model.clone(sharding=Layout(make_mesh(devices, **sizes), PREFILL))
    host = jax.tree.map(np.asarray, variables)
    return model, jax.device_put(host, sharded.variable_shardings(model))


def requests(count: int, scored: bool) -> list[Request]:
    """Some begin alike; greedy or drawn, perhaps scored, with stops of both kinds."""
    rng = np.random.default_rng(0)
    head = rng.integers(0, 64, 250)
    found = []
    for number in range(count):
        length, same = int(rng.integers(1, 230)), int(rng.integers(0, 2))
        tokens = head[:length] if same else rng.integers(0, 64, length)
        options = {"temperature": 1.1, "top_p": 0.9} if number % 2 else {}
        options |= {"seed": number} if number % 4 == 1 else {}
        if scored:
            options |= {3: {"logprobs": 2}, 4: {"prompt_logprobs": 0}}.get(number % 5, {})
        options |= {"stop_ids": (7, 11)} if number % 3 == 1 else {}
        options |= {"stop": ("ab", "q")} if number % 3 == 2 else {}
        found.append(Request(tokens.tolist(), int(rng.integers(1, 20)), **options))
    return found


def played(engine: Engine, count: int, scored: bool) -> list[dict]:
    """The results of random requests, some cancelled on the way, others read as they come."""
    rng = np.random.default_rng(1)
    streams, streamed = [], {}
    for number, request in enumerate(requests(count, scored)):
        streams.append(engine.submit(request))
        for _ in range(int(rng.integers(0, 5))):
            engine.step()
        if rng.random() < 0.4:
            streams[int(rng.integers(max(0, number - 1), number + 1))].cancel()
        if rng.random() < 0.3:
            tokens = [token for event in streams[number] for token in event.tokens]
            streamed[number] = tokens
    results = [stream.result() for stream in streams]
    assert all(results[number].tokens == tokens for number, tokens in streamed.items())
    return [{"tokens": x.tokens, "text": x.text, "finish": x.finish} for x in results]


@dataclasses.dataclass(frozen=True)
class Play:
    """What is asked of an engine.

    Attributes:
      count: requests. times: how often. scored: whether some ask for log-probabilities.
      layers, options: of the model, of the engine. prefixes: whether it has a prefix cache.
      pause: seconds in which nothing is asked, before and after.
    """

    count: int
    times: int = 1
    scored: bool = True
    layers: tuple[int, int] = (1, 3)
    options: dict = dataclasses.field(default_factory=dict)
    prefixes: bool = False
    pause: float = 0.0

    def engine(self, mesh):
        model, variables = made(mesh, self.options.get("draft"), self.layers)
        cache = PrefixCache() if self.prefixes else None
        options = SIZES | self.options | {"prefix_cache": cache, "tokenizer": Letters()}
        if processes.count() > 1:
            _check_agreement(model, variables)
        return Engine(model, variables, **options)

    def on(self, engine):
        return [played(engine, self.count, self.scored) for _ in range(self.times)]


def serve(mesh: str, play: str):
    """All processes make one engine; prints what the first one's requests came to."""
    play = Play(**json.loads(play))
    engine = play.engine(mesh)
    if processes.index():
        for refused in (engine.step, engine.stats, engine.warm_up, engine.start):
            _refused(refused)
        _refused(lambda: engine.submit(Request([1])))
        engine.follow()
        engine.close()
        return
    _refused(engine.follow)
    with engine:
        time.sleep(play.pause)
        found = play.on(engine)
        time.sleep(play.pause)
        open_ = engine.submit(Request([1, 2, 3], max_new_tokens=9))
        engine.step()
        stats = engine.stats()
    assert open_.result().finish == "cancelled"
    print(json.dumps({"found": found, "stats": stats}))


def alone(play: Play) -> list[list[dict]]:
    """What one device comes to."""
    with play.engine(None) as engine:
        return play.on(engine)


def _check_agreement(model, variables):
    """Processes whose engines differ find out."""
    try:
        Engine(model, variables, **(SIZES | {"slots": 4 + 4 * processes.index()}))
    except processes.Disagreement as error:
        expected = "disagree on the engine: slots is 4 in process 0 and 8 in process 1"
        assert expected in str(error), error
    else:
        raise AssertionError("expected a disagreement")


def _refused(call):
    try:
        call()
    except InputError as error:
        assert "follow()" in str(error), error
    else:
        raise AssertionError("expected a refusal")
