"""What `train` tells a person on stderr: model, devices, data, where it begins, how far it is."""

import sys
from typing import Any

import jax
from tqdm import tqdm

from v4jax import accounting
from v4jax.datasets.source import Source
from v4jax.sharding import processes
from v4jax.sharding.rules import Layout
from v4jax.train.config import TrainConfig


def say(sentence: str) -> None:
    """One line, by the first of all processes; a bar that is being drawn stays below it."""
    if processes.index() == 0:
        tqdm.write(f"v4jax train: {sentence}", file=sys.stderr)


def opening(config: TrainConfig, layout: Layout, source: Source, done: int, steps: int) -> None:
    """Before the first step of a call: on what, on which devices, from where."""
    say(f"{_model(config)}; {_devices(layout)}")
    say(_data(config, source))
    where = f"goes on from the checkpoint of step {done}" if done else "begins at step 0"
    say(f"{where} of {config.steps}{_stops(config, steps)}")


def bar(done: int, steps: int) -> tqdm:
    """A bar that begins at the steps that are done; disabled where stderr is no terminal."""
    return tqdm(initial=done, total=steps, unit="step", dynamic_ncols=True, disable=None)


def show(bar: tqdm, line: dict[str, Any]) -> None:
    """Moves the bar to a step, next to its loss and speed."""
    loss = "no targets" if line["loss"] is None else f"loss {line['loss']:.3f}"
    bar.set_postfix_str(
        f"{loss}, {line['tokens_per_second']:.0f} tokens/s, MFU {line['mfu']:.1%}",
        refresh=False,
    )
    bar.update(line["step"] - bar.n)


def progress(line: dict[str, Any], steps: int) -> None:
    """A step's loss, with the held-out one where it was evaluated."""
    held_out = ""
    if "held_out" in line:
        held_out = f", held-out loss {line['held_out']:.4f}"
        if "held_out_bits_per_byte" in line:
            held_out += f" ({line['held_out_bits_per_byte']:.3f} bits per byte)"
    loss = "no targets" if line["loss"] is None else f"loss {line['loss']:.4f}"
    speed = f"{line['tokens_per_second']:,.0f} tokens/s"
    say(f"step {line['step']} of {steps}: {loss}{held_out}, {speed}")


def compiling(config: TrainConfig, number: int) -> None:
    """Before the program of a stage is compiled."""
    stage, count = config.stages[number], len(config.stages)
    rows = f"{stage.batch} rows of {stage.length} tokens"
    say(f"compiles the step of stage {number + 1} of {count} ({stage.steps} steps, {rows})")


def _model(config):
    counts, model = accounting.count_parameters(config.model), config.model
    mtp = f" and {len(model.mtp_layers)} MTP" if model.mtp_layers else ""
    total = counts.total + sum(counts.mtp_blocks)
    parameters = f"{_short(total)} parameters ({_short(counts.active)} active per token)"
    lora = f", LoRA of rank {config.lora.rank}" if config.lora.rank is not None else ""
    return f"{parameters}, {len(model.layers)}{mtp} layers, {config.dtype}{lora}"


def _devices(layout):
    devices = jax.devices()
    kind = devices[0].device_kind
    if layout.mesh is None:
        return f"on one {kind} device" + (f" of {len(devices)}" if len(devices) > 1 else "")
    axes = ", ".join(f"{axis}={size}" for axis, size in layout.mesh.shape.items() if size > 1)
    several = f", {processes.count()} processes" if processes.count() > 1 else ""
    return f"on {layout.mesh.size} {kind} devices (mesh {axes or 'of one'}){several}"


def _data(config, source):
    run = sum(stage.steps * stage.batch * stage.length for stage in config.stages)
    named = f"data {config.data.path or config.data.kind}"
    if not hasattr(source.rows, "tokens"):
        return f"{named}: tasks made as they are needed; the run takes {_short(run)} tokens"
    held_out = "nothing held out"
    if source.held_out is not None:
        held_out = f"{_of(source.held_out)} held out"
    return f"{named}: {_of(source.rows.tokens)}, {held_out}; the run takes {_short(run)} tokens"


def _of(tokens):
    return f"{_short(tokens.ids.size)} tokens in {tokens.starts.size:,} documents"


def _stops(config, steps):
    if steps >= config.steps:
        return ""
    schedule, decay = config.schedule, config.steps - config.schedule.decay
    return f", stops at {steps} (warm-up to {schedule.warm_up}, decay from {decay})"


def _short(count):
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**4, "k")):
        if count >= size:
            return f"{count / (10**3 if unit == 'k' else size):.4g} {unit}"
    return f"{count:,}"
