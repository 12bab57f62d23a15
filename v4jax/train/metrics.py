"""What a run notes down: DIR/metrics.jsonl, a TensorBoard file, and how fast the device is used."""

import concurrent.futures
import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import accounting, chips
from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.files.atomic import write_atomically
from v4jax.files.json_reader import parse_json
from v4jax.files.writing import append, writing
from v4jax.train.events import EventFile
from v4jax.train.lora import SUBTREE
from v4jax.train.optimizer import joined, matches

FILE = "metrics.jsonl"


class Metrics:
    """Appends a line a logged step to metrics.jsonl and to a TensorBoard event file.

    Args:
      step: the step that the run goes on from; lines of later ones, from a run that was killed
        after its last checkpoint, are dropped: they will be written again. Damaged lines are too.

    Attributes:
      damaged: how many those were.

    Raises:
      InputError: files that cannot be read or made, a full disk.
    """

    def __init__(self, workdir: Path, step: int):
        path = workdir / FILE
        before = _content(path)
        found = list(_lines(before))
        # A kill may have cut off the last line; any other that is no line is damage.
        self.damaged = sum(line is None for _, line in found[:-1])
        self.damaged += bool(found) and found[-1][1] is None and before.endswith(b"\n")
        kept = b"".join(raw + b"\n" for raw, line in found if line and line["step"] <= step)
        with writing(path):
            if kept != before:
                write_atomically(path, kept)
            self._file = path.open("ab", buffering=0)
        self._events = EventFile(workdir / f"events.out.tfevents.{int(time.time())}.v4jax")

    def write(self, line: dict[str, Any]) -> None:
        append(self._file, json.dumps(line).encode() + b"\n")
        self._events.write(line["step"], {k: v for k, v in line.items() if k != "step"})

    def close(self) -> None:
        self._file.close()
        self._events.close()


def read(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run so far: objects of numbers (or null: no such figure) with a "step".

    What a kill cut off or damage made of a line does not count.

    Raises:
      InputError: the file cannot be read.
    """
    return [line for _, line in _lines(_content(workdir / FILE)) if line]


def _content(path):
    name = str(path)[:200]
    try:
        if not path.exists():
            return b""
        if not path.is_file():
            raise InputError(f"{name}: is no regular file; expected the metrics of a run")
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{name}: cannot be read ({error.strerror}); mend that, or give another directory"
        ) from error


def _lines(content):
    """Pairs of a line's bytes and what it says, None where that is not what `write` writes."""
    for raw in content.split(b"\n"):
        if not raw:
            continue
        try:
            line = parse_json(raw.decode(), FILE, watched=frozenset(), nan=True)
        except ValueError:  # no UTF-8, no JSON, or nested without end
            line = None
        yield raw, line if _is_line(line) else None


def _is_line(line):
    if not isinstance(line, dict) or not all(map(_is_figure, line.values())):
        return False
    return isinstance(line.get("step"), int) and line["step"] > 0


def _is_figure(value):
    if value is None or isinstance(value, float):
        return True
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


class Clock:
    """How fast steps of one size follow one another.

    A step ends when its figures are computed, not when they are read: a thread waits for each. It
    begins where the one before ended or, after a pause for an evaluation, a checkpoint or the
    compiler, where `start` says.

    Args:
      tokens: of a step, in rows of `length`. flops: operations of a step (`step_flops`).
    """

    def __init__(self, tokens: int, length: int, flops: float):
        self._tokens, self._length = tokens, length
        with jax.transfer_guard("allow"):
            self._at_peak = flops / peak_flops()[0]
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self.start()

    def start(self) -> None:
        """The next step begins now: a pause has ended."""
        self._begin = time.perf_counter()

    def watch(self, noted: Any) -> concurrent.futures.Future:
        """When the step ends that computes these arrays, for `tick`."""
        return self._thread.submit(_time_of, noted)

    def tick(self, ended: concurrent.futures.Future) -> dict[str, float]:
        """Figures of the next step; every step is to be asked for, in order."""
        end = ended.result()
        seconds, self._begin = end - self._begin, end
        speed = {"tokens_per_second": self._tokens / seconds, "mfu": self._at_peak / seconds}
        return speed | {"seconds": seconds, "length": self._length}

    def close(self) -> None:
        self._thread.shutdown(wait=False)


def _time_of(noted):
    jax.block_until_ready(noted)
    return time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Shares:
    """Shares of a forward pass's operations, 0 to 1.

    back: of products with weights, those through which gradients flow back; layers: of those in
    layers. learnt: those whose weights get gradients.
    """

    back: float = 1.0
    layers: float = 1.0
    learnt: float = 1.0

    def operations(self, of_weights: float, of_entries: float) -> float:
        """With those of both passes; products of activations have two gradients to pass back."""
        return of_weights * (1 + self.back + self.learnt) + of_entries * (1 + 2 * self.layers)


@dataclasses.dataclass(frozen=True)
class Passes:
    """What a step computes backward: the indexer, which has a loss of its own, and the rest."""

    indexer: Shares = Shares()
    rest: Shares = Shares()


class _Weight(NamedTuple):
    """A leaf of the params: its depth, the operations a token pays for it, whether it learns."""

    name: str
    depth: float
    operations: float
    learns: bool


def passes(params: Any, trained: str | None, config: ModelConfig) -> Passes:
    """What a step computes that trains some of the parameters of the main model.

    Gradients flow back as far as the first layer that learns, through the indexer only where it
    does. Adapters of LoRA, thin, count for no operations of their own.

    Args:
      params: a tree of arrays or shapes. trained: as `StepConfig.trained`.
    """
    weights = [
        _weight(joined(path), math.prod(leaf.shape), trained, config)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    weights = [weight for weight in weights if not weight.name.startswith("mtp_")]
    indexer = [weight for weight in weights if "/indexer/" in weight.name]
    rest = [weight for weight in weights if "/indexer/" not in weight.name]
    return Passes(_shares([weight._replace(depth=0) for weight in indexer]), _shares(rest))


def _weight(path, size, trained, config):
    name = path.removeprefix(SUBTREE + "/")
    learns = trained is None or matches(trained, path)
    top = name.split("/")[0]
    if top == "embed" or name != path or name.endswith("/ape"):  # a lookup, an adapter, a sum
        size = 0
    if "/experts/" in name:
        size *= config.num_experts_per_tok / config.n_routed_experts
    layer = int(top.removeprefix("layers_")) if top.startswith("layers_") else math.inf
    return _Weight(name, -1 if top == "embed" else layer, size, learns)


def _shares(weights):
    first = min((weight.depth for weight in weights if weight.learns), default=math.inf)
    learns = any(weight.learns for weight in weights)
    in_layers = [weight for weight in weights if weight.depth < math.inf]
    return Shares(
        back=_share(weights, lambda weight: learns and weight.depth >= first),
        layers=_share(in_layers, lambda weight: weight.depth >= first),
        learnt=_share(weights, lambda weight: weight.learns),
    )


def _share(weights, chosen):
    whole = sum(weight.operations for weight in weights)
    return sum(w.operations for w in weights if chosen(w)) / whole if whole else 0.0


def step_flops(
    config: ModelConfig, tokens: int, length: int, passes: Passes, dense: bool = False
) -> float:
    """Operations of a training step, of the main model; nothing computed again counts.

    Every row is taken for one document: in packed rows attention pays for less.

    Args:
      dense: CSA layers attend to every visible entry.
    """
    if dense:
        config = dataclasses.replace(config, index_topk=None)
    context = length // 2
    parts = accounting.flops_per_token(config, context, accounting.ONE_EACH)
    scores = sum(
        accounting.layer_flops(config, layer, context, accounting.ONE_EACH)["index_scores"]
        for layer in config.layers
    )
    indexer, attention = parts.pop("indexer"), parts.pop("attention")
    of_indexer = passes.indexer.operations(indexer - scores, scores)
    return tokens * (of_indexer + passes.rest.operations(sum(parts.values()), attention))


@functools.cache
def peak_flops() -> tuple[float, str]:
    """Operations a second of all devices, and where the figure is from.

    A device of unknown kind is timed on a float32 matrix product.
    """
    device = jax.devices()[0]
    known = chips.peak_flops(device.device_kind)
    if known is not None:
        return known * jax.device_count(), "data sheet"
    n = 1024
    x = jax.device_put(np.ones((n, n), np.float32))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    # A CPU's fake devices share its cores.
    count = 1 if device.platform == "cpu" else jax.device_count()
    return 2 * n**3 / best * count, "a measured matrix product"
