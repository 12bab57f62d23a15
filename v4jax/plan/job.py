"""What is planned: a model, one step of it, and on what it runs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import AbstractMesh

from v4jax import weights
from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.sharding.mesh import complete, make_mesh
from v4jax.sharding.rules import DECODE, DECODE_LONG, PREFILL, TRAIN, TRAIN_LONG, Layout, Strategy


@dataclasses.dataclass(frozen=True)
class Job:
    """One step of a model.

    Attributes:
      mode: "train", "prefill" (the whole context in one call) or "decode" (one token a row).
      context: tokens of a row; decoding, the length of its cache.
      batch: rows.
      weights: how they are stored: "stored", "bf16" or "float32" (training keeps masters).
      parts: microbatches of a training step, one after the other.
      waves: parts in which a layer's tokens go to their experts; see `Layout`.
      numerics: None, or "native" for inference that rounds as the released kernels do and keeps its
        cache as they store it.
    """

    config: ModelConfig
    mode: str
    context: int
    batch: int
    weights: str = "stored"
    parts: int = 1
    waves: int = 1
    numerics: str | None = None

    def __post_init__(self):
        if self.numerics not in (None, "native"):
            raise InputError(f"numerics is {self.numerics!r}; expected None or 'native'")
        if self.numerics and self.mode == "train":
            raise InputError(
                "training was asked for with numerics='native'; expected prefill or decode, a step "
                "of training is planned in bf16"
            )
        if self.context > self.config.max_position_embeddings:
            raise InputError(
                f"the context is {self.context}, beyond the model's max_position_embeddings "
                f"{self.config.max_position_embeddings}; choose a shorter one"
            )
        if self.mode == "train" and self.weights == "stored":
            raise InputError(
                "training with stored (FP8, FP4) weights; expected bf16 or float32, choose one "
                "with --weights"
            )

        if self.batch % self.parts:
            raise InputError(
                f"a batch of {self.batch} rows cannot be cut into {self.parts} equal parts; choose "
                "a number of parts that divides it"
            )

    @property
    def rows(self) -> int:
        """Rows of a part of the batch."""
        return self.batch // self.parts

    @property
    def tokens(self) -> int:
        """Tokens that one step computes."""
        return self.batch if self.mode == "decode" else self.batch * self.context


def strategy(job: Job, sizes: Mapping[str, int]) -> Strategy:
    """The table of shardings that a job runs with on a mesh of these sizes.

    Training and decoding, every device has rows of its own where their number (in a microbatch)
    allows; else each row, or its cache, is spread.
    """
    if job.mode == "prefill":
        return PREFILL
    many, few = {"train": (TRAIN, TRAIN_LONG), "decode": (DECODE, DECODE_LONG)}[job.mode]
    rows = math.prod(sizes[axis] for axis in many.axes["batch"])
    return few if job.rows % rows else many


def layout_of(job: Job, sizes: Mapping[str, int], devices: Sequence[Any]) -> Layout:
    """The mesh and strategy of a job on real or described devices.

    Raises:
      InputError: sizes that are not the devices', or that do not divide the model or the job.
    """
    return _checked(job, make_mesh(devices, **sizes))


def abstract_layout(job: Job, sizes: Mapping[str, int]) -> Layout:
    """`layout_of` without devices, to count with."""
    full = complete(sizes, math.prod(sizes.values()))
    return _checked(job, AbstractMesh(tuple(full.values()), tuple(full)))


def _checked(job, mesh):
    layout = Layout(mesh, strategy(job, mesh.shape), waves=job.waves)
    layout.check_divides({"batch": job.rows, **weights.axis_sizes(job.config)})
    if job.mode != "decode":
        layout.check_divides({"sequence": job.context})
    return layout
