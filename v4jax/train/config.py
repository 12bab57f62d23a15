"""A training run as data: model, text, stages, optimiser. `v4jax train` takes any field of it.

Values that the report does not publish are choices, and fields here.
"""

import ast
import dataclasses
import json
import types
import typing
from typing import Any

from v4jax.config import ModelConfig, Yarn
from v4jax.datasets.config import DataConfig
from v4jax.errors import InputError
from v4jax.sharding.mesh import parse_sizes
from v4jax.train.draft_loss import DraftLoss
from v4jax.train.lora import LoraConfig
from v4jax.train.loss import LossWeights
from v4jax.train.optimizer import OptimizerConfig, check_pattern
from v4jax.train.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps that share a program.

    Attributes:
      steps: how many. length: tokens per row. batch: rows per step, over all processes. parts:
        parts of a batch whose gradients are added up.
      attention: "sparse", or "dense": CSA layers attend to every visible entry (the report's first
        1T tokens, and the indexer's warm-up).
      trained: only these parameters learn, a regular expression searched in their paths
        ("/indexer/" for the indexer's warm-up).
      learning_rate: constant, instead of the schedule's (V3.2's warm-up: 1e-3).
      indexer: weight of the indexer's loss, instead of the run's. 0 also keeps its parameters.
      quantized: quantisation-aware: native numerics, weights as they will be stored.
      rope_scaling: YaRN of this stage, instead of the model's.
      documents: only those whose names (paths in the data's directory) this regular expression is
        found in: a curriculum.
    """

    steps: int
    length: int = 512
    batch: int = 4
    parts: int = 1
    attention: str = "sparse"
    trained: str | None = None
    learning_rate: float | None = None
    indexer: float | None = None
    quantized: bool = False
    rope_scaling: Yarn | None = None
    documents: str | None = None

    def __post_init__(self):
        for name in ("steps", "length", "batch", "parts"):
            if getattr(self, name) < 1:
                raise InputError(f"a stage's {name} is {getattr(self, name)}; expected 1 or more")
        if self.attention not in ("sparse", "dense"):
            raise InputError(
                f"a stage's attention is {self.attention!r}; expected 'sparse' or 'dense'"
            )
        if self.batch % self.parts:
            raise InputError(
                f"a stage's batch of {self.batch} rows has {self.parts} parts; expected a divisor"
            )
        check_pattern("a stage's trained", self.trained)
        check_pattern("a stage's documents", self.documents)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything about a run. `v4jax.train.resume` says what of it may change between calls.

    Attributes:
      losses: weights; mtp_decayed is the MTP weight from the start of the learning rate's decay.
      bias_step: how far router biases move after each step.
      start: a checkpoint to fine-tune; None for fresh weights. lora: with a rank, only adapters
        learn, and everything else has no optimiser state.
      draft: trains the model's DSpark draft and nothing else, for the checkpoint `start`.
      mesh: axes and sizes on all devices, "data=2,fsdp=4"; None for one device.
      dtype: of activations. remat: recompute activations. min_repeats: as of `Transformer`.
      checkpoint_every, keep: steps between checkpoints and how many stay. evaluate_every: steps
        between evaluations on held-out rows, of at most evaluate_rows. log_every: steps per line.
    """

    model: ModelConfig
    stages: tuple[Stage, ...] = (Stage(steps=300),)
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: Schedule = Schedule(peak=6e-3, final=1.2e-4, warm_up=10, decay=100)
    losses: LossWeights = LossWeights()
    mtp_decayed: float = 0.1
    bias_step: float = 1e-3
    seed: int = 0
    start: str | None = None
    lora: LoraConfig = LoraConfig()
    draft: DraftLoss | None = None
    mesh: str | None = None
    dtype: str = "float32"
    remat: bool = False
    min_repeats: int = 4
    checkpoint_every: int = 100
    keep: int = 3
    log_every: int = 1
    evaluate_every: int | None = None
    evaluate_rows: int = 16

    def __post_init__(self):
        if not self.stages:
            raise InputError("stages is empty; expected at least one stage")
        for name in ("checkpoint_every", "keep", "log_every", "evaluate_rows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.evaluate_every is not None and self.evaluate_every < 1:
            raise InputError(
                f"evaluate_every is {self.evaluate_every}; expected 1 or more, or None"
            )
        if not self.losses.mtp and self.mtp_decayed:
            object.__setattr__(self, "mtp_decayed", 0.0)
        if self.lora.rank is not None and self.mesh is not None:
            raise InputError(
                f"lora.rank is {self.lora.rank} and mesh {self.mesh!r}; LoRA runs alone"
            )
        _check_draft(self)
        parse_sizes(self.mesh or "")
        self.schedule.check(self.steps)

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_of(self, step: int) -> tuple[int, int]:
        """The stage of a step, and how many of its steps are done. The last stage has no end."""
        for number, stage in enumerate(self.stages[:-1]):
            if step < stage.steps:
                return number, step
            step -= stage.steps
        return len(self.stages) - 1, step


def _check_draft(config):
    """Refuses a draft that there is nothing to train of, or not in this way."""
    if config.draft is None:
        return
    if config.model.dspark is None:
        raise InputError(
            "draft is set and model.dspark is None; give the model dspark and draft_layers, as in "
            "configs/draft_nano.py"
        )
    if config.start is None:
        raise InputError(
            "draft is set and start is None; a draft is trained for a checkpoint, so name one"
        )
    if config.lora.rank is not None or config.mesh is not None:
        raise InputError(
            f"draft is set, with lora.rank {config.lora.rank} and mesh {config.mesh!r}; a draft is "
            "trained alone and on one device, so leave both out"
        )


def by_dotted_name(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name, as --config.NAME=VALUE takes it."""
    if isinstance(config, tuple) and config and dataclasses.is_dataclass(config[0]):
        pairs = [(str(i), item) for i, item in enumerate(config)]
    elif dataclasses.is_dataclass(config):
        pairs = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]
    else:
        return {prefix: config}
    found = {}
    for name, value in pairs:
        found |= by_dotted_name(value, f"{prefix}.{name}" if prefix else name)
    return found


def as_json(config: TrainConfig) -> dict[str, Any]:
    """`by_dotted_name` as it comes back from JSON, to compare with a stored one."""
    return json.loads(json.dumps(by_dotted_name(config), default=repr))


def override(config: Any, texts: dict[str, str]) -> Any:
    """The config with fields set from text, by dotted names and numbers of stages.

    All of them at once: fields that depend on each other may come in any order.

    Raises:
      InputError: no such field, a value of another type, or values that contradict each other.
    """
    tree: dict[str, Any] = {}
    for key, text in texts.items():
        *above, last = key.split(".")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise InputError(
                    f"--config.{key}: {name!r} is set as a whole too; give one of both"
                )
        if isinstance(node.get(last), dict):
            raise InputError(f"--config.{key}: fields below it are set as well; give one of both")
        node[last] = text
    return _set(config, tree, "")


def _set(node, changes, at):
    if isinstance(node, tuple):
        items = list(node)
        for name, change in changes.items():
            if not name.isdigit() or int(name) >= len(node):
                raise InputError(
                    f"--config.{at}{name}: {name!r} is none of the numbers 0 to {len(node) - 1}"
                )
            items[int(name)] = _set(node[int(name)], change, f"{at}{name}.")
        return tuple(items)
    known = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
    values = {}
    for name, change in changes.items():
        key = at + name
        if name not in known:
            expected = ", ".join(known) or "nothing below it"
            raise InputError(f"--config.{key}: there is no field {name!r}; expected {expected}")
        if isinstance(change, dict):
            values[name] = _set(getattr(node, name), change, f"{key}.")
        else:
            values[name] = _parse(change, typing.get_type_hints(type(node))[name], key)
    return dataclasses.replace(node, **values)


def _parse(text, hint, key):
    """A value of a field's type."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in kinds and text in ("None", "none", "null"):
        return None
    for kind in kinds:
        if kind is str:
            return text
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if value is None or not any(isinstance(value, k) for k in kinds if isinstance(k, type)):
        expected = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
        raise InputError(f"--config.{key} is {text!r}; expected {expected}")
    return value
