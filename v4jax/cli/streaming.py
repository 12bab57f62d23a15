"""The parts of `v4jax generate --stream_weights` of its own: flags, loading, progress on stderr."""

import sys
import time
from typing import Any

from absl import flags

from v4jax.checkpoints import load as checkpoint
from v4jax.checkpoints.source import Announced
from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.infer.generate import PREFILL_CHUNK
from v4jax.tables import short

FLAGS = flags.FLAGS

_PAUSE = 30.0  # seconds between two lines where stderr is no terminal


def define_flags() -> None:
    """Declares --stream_weights and --layers."""
    flags.DEFINE_bool(
        "stream_weights", False, "Read layers from the checkpoint as needed: models beyond memory"
    )
    flags.DEFINE_integer("layers", None, "With --stream_weights: run only so many layers")


def check(config: ModelConfig) -> None:
    """Refuses flags that contradict each other or the model, before anything is read."""
    if not FLAGS.stream_weights:
        if FLAGS.layers is not None:
            raise InputError(
                f"--layers is {FLAGS.layers} without --stream_weights; expected both or neither"
            )
        return
    if FLAGS.mesh is not None:
        raise InputError(
            f"--stream_weights came with --mesh={FLAGS.mesh[:80]}; expected one of them: streamed "
            "layers run on one device"
        )
    if FLAGS.draft in ("mtp", "dspark") or FLAGS.prefix_cache is not None:
        name = "--draft" if FLAGS.prefix_cache is None else "--prefix_cache"
        raise InputError(
            f"--stream_weights came with {name}; expected one of them: streamed layers decode "
            "token by token, without drafts and prefixes"
        )
    if FLAGS.layers is not None and not 1 <= FLAGS.layers <= len(config.layers):
        raise InputError(
            f"--layers is {FLAGS.layers}; expected 1 to {len(config.layers)}, the layers of the "
            "model"
        )


def load(
    directory, prompts: list[list[int]], max_new_tokens: int, announced: Announced
) -> tuple[Any, Any]:
    """The streamed model of the flags, which tells its progress, and its open checkpoint."""
    model, source = checkpoint.load(
        directory,
        dtype=FLAGS.dtype,
        weights=FLAGS.weights,
        numerics=FLAGS.numerics,
        verify=FLAGS.verify,
        announced=announced,
        stream=True,
        layers=FLAGS.layers,
    )
    chunks = -(-max(map(len, prompts)) // PREFILL_CHUNK)
    progress = Progress(source.meter, len(model.config.layers), chunks, max_new_tokens - 1)
    return model.clone(on_layer=progress.layer), source


def describe(name: str, model, source) -> str:
    """One line: name, layers, and the bytes that stay on disk."""
    return (
        f"{name}: {len(model.config.layers)} layers read as needed from {short(source.total_bytes)}"
        "B on disk"
    )


class Progress:
    """Says after each layer how much was read, how fast, and how long the rest will take.

    On a terminal it is one line that changes; elsewhere a line now and then.

    Args:
      meter: what has been read, as of `StreamedWeights`.
      layers: of the model. chunks: calls that read the prompt; steps: later calls, at most.
    """

    def __init__(self, meter, layers: int, chunks: int, steps: int):
        self._meter, self._layers = meter, layers
        self._chunks, self._steps = chunks, steps
        self._done = 0
        self._started = self._phase_started = self._said = time.perf_counter()

    def layer(self, layer: int, streams: Any) -> None:
        """Counts one layer; as `StreamedTransformer.on_layer` calls it."""
        self._done += 1
        now = time.perf_counter()
        line = self._line(layer, now)
        if self._done == self._chunks * self._layers:  # tokens after the prompt have their own pace
            self._phase_started = now
        terminal = sys.stderr is not None and sys.stderr.isatty()
        if terminal:
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
            if layer == self._layers - 1:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
        elif now - self._said >= _PAUSE:
            self._said = now
            print(line, file=sys.stderr, flush=True)

    def _line(self, layer, now):
        call = (self._done - 1) // self._layers
        prompt = self._chunks * self._layers
        reading = self._done <= prompt
        done = self._done if reading else self._done - prompt
        of = prompt if reading else self._steps * self._layers
        left = (now - self._phase_started) / done * (of - done)
        rate = self._meter.bytes / max(now - self._started, 1e-9)
        if reading:
            what = f"prompt, part {call + 1} of {self._chunks}"
        else:
            what = f"token {call - self._chunks + 2} of at most {self._steps + 1}"
        return (
            f"{what}: layer {layer + 1} of {self._layers}, read {short(self._meter.bytes)}B at "
            f"{short(rate)}B/s, {_clock(left)} left" + ("" if reading else " at most")
        )


def _clock(seconds: float) -> str:
    """12:34 or 1:02:03."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
