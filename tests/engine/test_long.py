"""A prompt of 2^17 tokens beside short requests: memory and time of a chunk stay flat."""

import resource
import statistics
import time

import numpy as np
import pytest

from tests.support.tiny import drawn, tiny_config
from v4jax.engine.engine import Engine
from v4jax.engine.request import Request
from v4jax.model.transformer import Transformer

LENGTH = 1 << 17


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_short_requests_go_on_beside_a_long_one():
    config = tiny_config(max_position_embeddings=2 * LENGTH, mtp_layers=())
    model = Transformer(config, min_repeats=2)
    engine = Engine(model, drawn(model), slots=3, max_length=LENGTH + 64, draft=None)
    engine.submit(Request([1, 2, 3], max_new_tokens=4)).result()
    prompt = np.random.default_rng(0).integers(0, 331, LENGTH - 1)
    short = [engine.submit(Request([4, 5 + i], max_new_tokens=5000)) for i in range(2)]
    for _ in range(4):
        engine.step()
    long = engine.submit(Request(prompt, max_new_tokens=4))
    seconds, memory = [], []
    while not long.begun_answer:
        before = [len(stream._result.tokens) for stream in short]
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        # Between two tokens of a short one lies one chunk.
        assert all(len(s._result.tokens) > n for s, n in zip(short, before, strict=True))
    chunks = LENGTH // 2048
    assert len(seconds) >= chunks
    third = chunks // 3
    early, late = statistics.median(seconds[2:third]), statistics.median(seconds[-third:])
    assert late < 2 * early, (early, late)
    growth = (memory[-1] - memory[3]) / 1024
    assert growth < 100, growth
    assert len(long.result().tokens) == 4
    engine.close()
