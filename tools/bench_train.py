"""A full training step on this CPU, ours versus transformers with torch.optim.AdamW, in one run.

    python tools/bench_train.py [--lengths 256,1024,4096] [--vocab 4096] [--out FILE.jsonl]

Same sizes, float32, batch 1: forward, backward and update of every parameter with AdamW on both
sides (--matrices muon: ours with Muon). Each figure is measured in a process of its own, the two
sides in turn, so that peak memory is each side's own; medians of --repeats steady-state steps, no
compile time. Ours begins a step before it has the figures of the one before, as `v4jax train` does:
steps follow one another without waiting for Python. PyTorch has computed a step when it returns.
A length over --rival_limit is left to ours alone.
"""

import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_history
from absl import app, flags

import v4jax
from v4jax.cli import cpu_settings

LENGTHS = flags.DEFINE_list("lengths", ["256", "1024", "4096", "16384"], "Tokens of a step.")
VOCAB = flags.DEFINE_integer("vocab", 4096, "Vocabulary.")
RIVAL_LIMIT = flags.DEFINE_integer("rival_limit", 4096, "Longest step given to transformers.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed steps of each figure.")
MATRICES = flags.DEFINE_enum("matrices", "adamw", ["adamw", "muon"], "Our optimiser.")
OUT = flags.DEFINE_string("out", None, "JSON lines file to add the result to.")
CHILD = flags.DEFINE_string("child", None, "Measure one side, ours or theirs, and print it.")
CONFIG = flags.DEFINE_string("config", None, "The config.json that the two sides share.")

WINDOW, CSA, HCA = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "layer_types": [WINDOW, WINDOW, CSA, HCA, CSA],
    "mlp_layer_types": ["moe"] * 5,
    "num_attention_heads": 4,
    "head_dim": 32,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 16,
    "sliding_window": 32,
    "max_position_embeddings": 65536,
}


def ours(length, vocab):
    """A function that starts a step and waits for the one before, as `v4jax train` does."""
    import functools

    import jax
    import numpy as np

    from v4jax import weights
    from v4jax.model.transformer import Transformer
    from v4jax.train import host_memory
    from v4jax.train.batch import make_batch
    from v4jax.train.loss import LossWeights
    from v4jax.train.optimizer import OptimizerConfig, make_optimizer
    from v4jax.train.step import Rates, StepConfig, new_state, train_step

    config = v4jax.read_config(CONFIG.value)
    model = Transformer(config, dtype="float32")
    declared = weights.parameters(config, model.min_repeats)
    optimizer = make_optimizer(OptimizerConfig(matrices=MATRICES.value), declared)
    # What the rival trains: no MTP block, no loss of the indexer's own.
    fixed = StepConfig(losses=LossWeights(mtp=0.0, indexer=0.0))
    variables = jax.jit(model.init)(jax.random.key(0))
    begin = functools.partial(new_state, optimizer=optimizer)
    state = [jax.jit(begin)(variables["params"], variables["buffers"])]
    step = jax.jit(functools.partial(train_step, model, optimizer, fixed), donate_argnums=0)
    rows = np.random.default_rng(0).integers(0, vocab, (1, length + 1))
    batch = make_batch(rows, np.zeros_like(rows), np.ones(rows.shape, bool), 1, packed=False)
    batch, rates = jax.device_put(batch), jax.device_put(Rates(np.float32(1e-4), np.float32(0)))
    program = step.lower(state[0], batch, rates).compile()
    host_memory.forget_traces()  # as `v4jax train` does

    ahead = []

    def run():
        state[0], noted = program(state[0], batch, rates)
        ahead.append(noted)
        if len(ahead) > 1:
            jax.device_get(ahead.pop(0))

    return run


def write_config(directory):
    """The config as transformers writes it: our side then need not import that library."""
    from transformers import DeepseekV4Config

    config = DeepseekV4Config(**SIZES, vocab_size=VOCAB.value, num_nextn_predict_layers=0)
    config.save_pretrained(directory)
    return str(Path(directory) / "config.json")


def theirs(length, vocab):
    import numpy as np
    import torch
    from transformers import AutoConfig, DeepseekV4ForCausalLM

    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(Path(CONFIG.value).parent)
    model = DeepseekV4ForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    rows = torch.tensor(np.random.default_rng(0).integers(0, vocab, (1, length + 1)))

    def run():
        optimizer.zero_grad()
        logits = model(rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def measure(side, length):
    """Prints seconds a step and peak memory of one side, in this process."""
    if side == "ours":
        cpu_settings.compile_for_training()  # as `v4jax train` does
        cpu_settings.start_again_with_huge_pages()
    run = {"ours": ours, "theirs": theirs}[side](length, VOCAB.value)
    run()
    run()
    _forget_peak()
    times = []
    for _ in range(REPEATS.value):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    print(json.dumps({"seconds": statistics.median(times), "peak_mib": round(_peak())}))


def _forget_peak():
    """Peak memory is counted from here: a compiler's memory is given back first."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _peak():
    """Peak resident memory since `_forget_peak`, libraries included, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def child(side, length, config):
    command = [sys.executable, __file__, f"--child={side}", f"--lengths={length}"]
    command += [f"--config={config}"]
    command += [f"--vocab={VOCAB.value}", f"--repeats={REPEATS.value}"]
    command += [f"--matrices={MATRICES.value}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        return {"failed": run.stderr.strip().splitlines()[-1] if run.stderr else run.returncode}
    return json.loads(run.stdout.strip().splitlines()[-1])


def _rows(config):
    """A row for each length, printed as it comes."""
    for length in map(int, LENGTHS.value):
        row = {"length": length, "vocab": VOCAB.value, "ours": child("ours", length, config)}
        if length <= RIVAL_LIMIT.value:
            row["transformers"] = child("theirs", length, config)
            if all("seconds" in row[side] for side in ("ours", "transformers")):
                row["times_faster"] = row["transformers"]["seconds"] / row["ours"]["seconds"]
                row["memory"] = row["ours"]["peak_mib"] / row["transformers"]["peak_mib"]
        print(json.dumps(row), flush=True)
        yield row


def main(_):
    if CHILD.value:
        measure(CHILD.value, int(LENGTHS.value[0]))
        return
    with tempfile.TemporaryDirectory() as directory:
        rows = list(_rows(write_config(directory)))
    if OUT.value:
        record = {**bench_history.origin(), "matrices": MATRICES.value, "rows": rows}
        with Path(OUT.value).open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    app.run(main)
