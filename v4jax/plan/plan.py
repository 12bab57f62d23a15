"""A plan: what one step of a job takes on one device of a slice, by the compiler and by hand."""

import dataclasses
import functools
from collections.abc import Mapping

from v4jax.config import ModelConfig
from v4jax.model.transformer import Transformer
from v4jax.plan import exchange, memory, roofline, variables
from v4jax.plan.compiler import Compiled, compile_job
from v4jax.plan.hlo import Collective
from v4jax.plan.job import Job, layout_of
from v4jax.plan.memory import Held
from v4jax.plan.roofline import Time
from v4jax.plan.topology import Topology
from v4jax.plan.variables import Leaf
from v4jax.sharding.rules import Layout


@dataclasses.dataclass(frozen=True)
class Counted:
    """What is counted by hand, no compiler needed.

    Attributes:
      held: bytes of a device. operations, traffic: of one step on the average device, by part.
      imbalance: of the device with the most work over the average. exchange: collectives expected.
      time: by these.
    """

    held: Held
    operations: dict[str, float]
    traffic: dict[str, int | float]
    imbalance: float
    exchange: list[Collective]
    time: Time


@dataclasses.dataclass(frozen=True)
class Plan:
    """A job on a mesh of a slice."""

    job: Job
    topology: Topology
    mesh: dict[str, int]
    strategy: str
    counted: Counted
    compiled: Compiled

    @property
    def fits(self) -> bool:
        peak = self.compiled.peak
        return peak is not None and peak <= self.topology.chip.memory

    @functools.cached_property
    def time(self) -> Time:
        """The roofline, its exchanges those of the compiled program."""
        if self.compiled.failure:
            return self.counted.time
        found = self.compiled.collectives
        chip = self.topology.chip
        seconds = sum(c.count * roofline.interconnect_seconds(chip, c) for c in found)
        return dataclasses.replace(self.counted.time, interconnect=seconds)


def make_plan(job: Job, topology: Topology, sizes: Mapping[str, int]) -> Plan:
    """Counts and compiles a job.

    Raises:
      InputError: sizes that do not fit the devices, the model or the job; no compiler.
    """
    layout = layout_of(job, sizes, topology.devices)
    counted = count(job, topology, layout)
    compiled = compile_job(job, topology, sizes)
    mesh = dict(layout.mesh.shape)
    return Plan(job, topology, mesh, layout.strategy.name, counted, compiled)


def count(job: Job, topology: Topology, layout: Layout) -> Counted:
    """Everything by hand."""
    leaves = leaves_of(job.config, job.weights)
    held = memory.held(job, layout, leaves)
    operations = roofline.operations(job, layout)
    traffic = roofline.traffic(job, layout, held)
    uneven = roofline.imbalance(job, layout)
    found = exchange.expected(job, layout, leaves)
    work = sum(operations.values()), uneven, sum(traffic.values())
    time = roofline.times(topology.chip, *work, found)
    return Counted(held, operations, traffic, uneven, found, time)


@functools.lru_cache(maxsize=8)
def leaves_of(config: ModelConfig, weights: str) -> list[Leaf]:
    """The model's variables in leaves, cut into segments as `Transformer` does by default."""
    model = Transformer(config)
    tree = variables.stored_variables(config, weights, model.min_repeats)
    return variables.leaves(tree, model.logical_axes())
