"""Prefill and decode on this CPU, ours versus transformers, same float32 weights, one run.

    python tools/bench_cpu.py [--rival=false] [--out experiments/001_cpu_speed/history.jsonl]

Both sides run alternately after a warm-up; medians of --repeats steady-state runs. A length that
the rival cannot hold in memory is left to ours alone (--rival_limit).
"""

import json
import resource
import tempfile
import time
from pathlib import Path

import bench_history
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import v4jax

RIVAL = flags.DEFINE_bool("rival", True, "Also time transformers' DeepseekV4ForCausalLM.")
LENGTHS = flags.DEFINE_list("lengths", ["1024", "4096", "16384", "32768"], "Prefill lengths.")
DECODE = flags.DEFINE_list("decode", ["1024", "4096", "32768"], "Contexts of a decoded token.")
ROWS = flags.DEFINE_list("rows", ["8", "32"], "Rows of a decoded batch, at the first context.")
RIVAL_LIMIT = flags.DEFINE_integer("rival_limit", 4096, "Longest context given to transformers.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each figure.")
OUT = flags.DEFINE_string("out", None, "JSON lines file to add the result to.")
STEPS = 20  # decoded tokens of one timed run

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "head_dim": 128,
    "q_lora_rank": 256,
    "o_groups": 4,
    "o_lora_rank": 128,
    "n_routed_experts": 32,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 256,
    "index_n_heads": 16,
    "index_head_dim": 64,
    "index_topk": 256,
    "sliding_window": 128,
    "max_position_embeddings": 65536,
    "partial_rotary_factor": 0.5,
    "layer_types": ["sliding_attention"] * 2
    + ["compressed_sparse_attention", "heavily_compressed_attention"] * 2,
    "mlp_layer_types": ["moe"] * 6,
}


def write_checkpoint(folder):
    """A random transformers checkpoint of SIZES; the torch model."""
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**SIZES)).float().eval()
    model.save_pretrained(folder)
    return model


def median_seconds(runs):
    """Medians of runs by name, run alternately: a slow minute of the machine slows all."""
    times = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(REPEATS.value):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


def tokens_of(length, rows=1):
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (rows, length))


class Ours:
    """Jitted prefill into a cache and a jitted decode step."""

    def __init__(self, folder):
        self.model, self.variables = v4jax.load(folder)

        def call(variables, tokens, cache):
            out = self.model.apply(variables, tokens, cache=cache, logits="last")
            return out.logits, out.cache

        self.call = jax.jit(call, donate_argnums=2)

    def prefill(self, length):
        tokens = jnp.asarray(tokens_of(length), jnp.int32)

        def run():
            cache = self.model.init_cache(1, length + 64)
            jax.block_until_ready(self.call(self.variables, tokens, cache))

        return run

    def decode(self, length, rows=1):
        tokens = jnp.asarray(tokens_of(length, rows), jnp.int32)
        cache = self.model.init_cache(rows, length + 64 + STEPS * (REPEATS.value + 1))
        chunk = min(length, 4096 // rows)
        for at in range(0, length, chunk):
            _, cache = self.call(self.variables, tokens[:, at : at + chunk], cache)
        state = [cache]

        def run():
            for _ in range(STEPS):
                logits, state[0] = self.call(self.variables, tokens[:, :1], state[0])
            jax.block_until_ready(logits)

        return run


class Theirs:
    """transformers with its own cache."""

    def __init__(self, model):
        import torch

        torch.set_num_threads(2)
        self.torch, self.model = torch, model

    def prefill(self, length):
        tokens = self.torch.tensor(tokens_of(length))

        def run():
            with self.torch.no_grad():
                self.model(tokens, use_cache=True, logits_to_keep=1)

        return run

    def decode(self, length, rows=1):
        tokens = self.torch.tensor(tokens_of(length, rows))
        with self.torch.no_grad():
            past = self.model(tokens, use_cache=True, logits_to_keep=1).past_key_values

        def run():
            with self.torch.no_grad():
                for _ in range(STEPS):
                    self.model(tokens[:, :1], past_key_values=past, use_cache=True)

        return run


def measure(what, length, ours, theirs, **batch):
    """One row of the result: seconds of a prefill, or of one decoded token of every row."""
    runs = {"ours": getattr(ours, what)(length, **batch)}
    if theirs is not None and length <= RIVAL_LIMIT.value:
        runs["transformers"] = getattr(theirs, what)(length, **batch)
    once = STEPS if what == "decode" else 1
    row = {"what": f"{what} of {batch['rows']} rows" if batch else what, "length": length}
    row |= {name: seconds / once for name, seconds in median_seconds(runs).items()}
    if "transformers" in row:
        row["ratio"] = row["transformers"] / row["ours"]
    row["peak_rss_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps(row), flush=True)
    return row


def main(_):
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(folder)
        theirs = Theirs(model) if RIVAL.value else None
        ours = Ours(folder)
    rows = [measure("prefill", int(n), ours, theirs) for n in LENGTHS.value]
    rows += [measure("decode", int(n), ours, theirs) for n in DECODE.value]
    if DECODE.value:
        context = int(DECODE.value[0])
        rows += [measure("decode", context, ours, theirs, rows=int(n)) for n in ROWS.value]
    if OUT.value:
        record = {**bench_history.origin(), "rows": rows}
        with Path(OUT.value).open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    app.run(main)
