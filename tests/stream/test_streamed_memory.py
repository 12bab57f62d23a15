"""How much memory a streamed model takes, measured in a process of its own."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from tests.support.checkpoints import synthetic
from v4jax.config import CSA, HCA, WINDOW, with_hash_routing
from v4jax.named_configs import get_config

_MIB = 1 << 20

_SCRIPT = """
import json, re, sys
import numpy as np
import v4jax

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

# Compiling takes memory of its own: a twin with the same programs and few weights compiles them.
def run(path):
    model, source = v4jax.load(path, stream=True)
    model = model.clone(group_bytes=8 << 20)
    tokens = np.arange(64, dtype=np.int32)[None] % model.config.vocab_size
    with source:
        out = model.apply(source, tokens, cache=model.init_cache(1, 128), logits="last")
        for _ in range(2):
            out = model.apply(source, tokens[:, :1], cache=out.cache, logits="last")
        return source.meter.bytes, source.total_bytes

run(sys.argv[1])
before = resident()
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
read, total = run(sys.argv[2])
print(json.dumps({"growth": peak() - before, "read": read, "total": total}))
"""


def big_config(layers):
    config = get_config("flash_tiny")
    kinds = (WINDOW, CSA, HCA)
    return dataclasses.replace(
        config,
        layers=with_hash_routing(tuple(kinds[i % 3] for i in range(layers)), 1),
        mtp_layers=(),
        hidden_size=512,
        n_routed_experts=64,
        moe_intermediate_size=512,
    )


@pytest.mark.slow
def test_grows_by_far_less_than_it_reads(tmp_path):
    """A checkpoint of more than 300 MB in less than 120 MB, its layers of 27 MB read in turn."""
    small = synthetic(tmp_path / "small", big_config(4))
    large = synthetic(tmp_path / "large", big_config(13))
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, small, large],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["total"] > 300 * _MIB
    assert found["read"] > 300 * _MIB
    assert found["growth"] < 120 * _MIB
