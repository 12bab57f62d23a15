"""A plan: what one step of a job takes on one device of a slice, by the compiler and by hand."""

import dataclasses
import functools
import resource
import time
from collections.abc import Mapping

import jax

from v4jax.config import ModelConfig
from v4jax.model.transformer import Transformer
from v4jax.plan import exchange, hlo, memory, program, roofline, variables
from v4jax.plan.hlo import Collective
from v4jax.plan.job import Job, shards_of
from v4jax.plan.memory import Held
from v4jax.plan.roofline import Time
from v4jax.plan.topology import Topology
from v4jax.plan.variables import Leaf
from v4jax.sharding.rules import Shards

ROOM = "RESOURCE_EXHAUSTED"  # how XLA says that a program does not fit


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
class Compiled:
    """What the compiler says, bytes of one device.

    Attributes:
      arguments: by kind, as the program's shardings divide them.
      argument: all of them, by the compiler. peak: at the worst moment, arguments included; None
        where the program does not fit. failure: the compiler's words then.
      collectives, unknown_loops: see `hlo.collectives`.
      seconds: to trace, lower and compile; processor: seconds of processors, which a busy machine
        stretches over more time. host: peak memory of this process.
    """

    arguments: dict[str, int]
    argument: int | None
    peak: int | None
    failure: str | None
    collectives: list[Collective]
    unknown_loops: int
    seconds: float
    processor: float
    host: int


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
    shards = shards_of(job, sizes, topology.devices)
    counted = count(job, topology, shards)
    compiled = compile_program(program.build(job, shards), dict(shards.mesh.shape))
    mesh = dict(shards.mesh.shape)
    return Plan(job, topology, mesh, shards.strategy.name, counted, compiled)


def count(job: Job, topology: Topology, shards: Shards) -> Counted:
    """Everything by hand."""
    leaves = leaves_of(job.config, job.weights)
    held = memory.held(job, shards, leaves)
    operations = roofline.operations(job, shards)
    traffic = roofline.traffic(job, shards, held)
    uneven = roofline.imbalance(job, shards)
    found = exchange.expected(job, shards, leaves)
    work = sum(operations.values()), uneven, sum(traffic.values())
    time = roofline.times(topology.chip, *work, found)
    return Counted(held, operations, traffic, uneven, found, time)


@functools.lru_cache(maxsize=8)
def leaves_of(config: ModelConfig, weights: str) -> list[Leaf]:
    """The model's variables in leaves, cut into segments as `Transformer` does by default."""
    model = Transformer(config)
    tree = variables.stored_variables(config, weights, model.min_repeats)
    return variables.leaves(tree, model.logical_axes())


def compile_program(planned: program.Program, mesh: Mapping[str, int]) -> Compiled:
    """Compiles; a program that does not fit is a result, not an error."""
    started, worked = time.perf_counter(), time.process_time()
    analysis, found, unknown, failure = None, [], 0, None
    try:
        compiled = planned.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if ROOM not in str(error):
            raise
        failure = _first_sentences(str(error))
    seconds, processor = time.perf_counter() - started, time.process_time() - worked
    if failure is None:
        analysis = compiled.memory_analysis()
        found, unknown = hlo.collectives(compiled.as_text(), mesh)
    return Compiled(
        arguments={kind: planned.bytes(kind) for kind in planned.arguments},
        argument=analysis and analysis.argument_size_in_bytes,
        peak=analysis and _peak(analysis),
        failure=failure,
        collectives=found,
        unknown_loops=unknown,
        seconds=seconds,
        processor=processor,
        host=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


def _peak(analysis):
    """Bytes at the worst moment. XLA:GPU leaves its own figure out of ahead-of-time results."""
    found = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    found += analysis.temp_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.peak_memory_in_bytes or found


def _first_sentences(message):
    """What the compiler says before it lists its buffers."""
    text = message.partition("\n\n")[0].replace("\n", " ")
    return " ".join(text.removeprefix(f"{ROOM}: ").split())[:400]
