"""The smallest slice that holds a job and the mesh on which it is fastest, by the roofline.

Every mesh is counted by hand first, which takes a moment; only the best few that could fit are
compiled.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

from v4jax.errors import InputError
from v4jax.plan.job import Job, abstract_layout
from v4jax.plan.memory import Held
from v4jax.plan.plan import Counted, Plan, count, make_plan
from v4jax.plan.roofline import parallel
from v4jax.plan.topology import Topology
from v4jax.sharding.mesh import AXES
from v4jax.sharding.rules import Layout

# Of a device's memory, what hand-counted bytes may take: temporaries need the rest.
FULL = 0.9
BF16 = 2
# Arrays as large as the buffer of rows on their way to experts that live at once: what compiled
# steps of Flash and Pro come to (experiments/003_plans), all else of their layers included.
TRAIN_ROWS, PREFILL_ROWS = 24, 4
PART_TOKENS = 4096  # of a device in one microbatch: enough rows for the experts' products


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh with what is counted by hand of the job on it; `job` has its microbatches."""

    job: Job
    sizes: dict[str, int]
    counted: Counted
    needed: int | float


def search(
    job: Job,
    topologies: Sequence[Topology],
    most: int = 3,
    tell: Callable[[Plan], None] = lambda plan: None,
) -> Plan:
    """The fastest plan that fits, on the first of the slices that has one.

    Args:
      topologies: slices, the smallest first. most: meshes of a slice to compile.
      tell: called with every plan that was compiled.

    Raises:
      InputError: the job fits on none of them.
    """
    for topology in topologies:
        found = []
        for candidate in candidates(job, topology)[:most]:
            plan = make_plan(candidate.job, topology, candidate.sizes)
            tell(plan)
            found += [plan] * plan.fits
        if found:
            return min(found, key=lambda plan: (plan.time.floor, plan.time.sum))
    names = f"{topologies[0].name} to {topologies[-1].name}" if len(topologies) > 1 else "it"
    raise InputError(
        f"no mesh of {names} holds {job.mode} of {job.batch} rows of {job.context} tokens; choose "
        "a larger slice, a shorter context or fewer rows"
    )


def candidates(job: Job, topology: Topology) -> list[Candidate]:
    """Meshes whose hand-counted bytes fit, the fastest first, of equals the one with most room."""
    found = []
    # Without gathered weights fsdp and expert are the same to a model: one of them is enough.
    axes = AXES if job.mode == "train" else [axis for axis in AXES if axis != "fsdp"]
    for sizes in shapes(topology.count, axes):
        candidate = _fitting(job, topology, sizes)
        if candidate is not None:
            found.append(candidate)
    return sorted(found, key=lambda c: (float(f"{c.counted.time.floor:.1e}"), c.needed))


def _fitting(job, topology, sizes):
    """A mesh with as few microbatches as fit; None if none do, or they do not divide the job."""
    try:
        for parts in part_counts(job, sizes):
            candidate = _candidate(dataclasses.replace(job, parts=parts), topology, sizes)
            if candidate.needed <= FULL * topology.chip.memory:
                return candidate
    except InputError:  # sizes that do not divide this model or job
        pass
    return None


def _candidate(job, topology, sizes):
    layout = abstract_layout(job, sizes)
    counted = count(job, topology, layout)
    needed = counted.held.arguments + working(job, layout, counted.held)
    return Candidate(job, sizes, counted, needed)


@functools.cache
def _divisors(number):
    return [n for n in range(1, number + 1) if number % n == 0]


def shapes(devices: int, axes: Sequence[str] = AXES) -> Iterator[dict[str, int]]:
    """Every way to lay devices along the mesh axes."""
    if len(axes) == 1:
        yield {axes[0]: devices}
        return
    for size in _divisors(devices):
        for rest in shapes(devices // size, axes[1:]):
            yield {axes[0]: size} | rest


def microbatches(job: Job, sizes: dict[str, int]) -> int:
    """As few parts of a training batch as leave a device `PART_TOKENS` at most, or one row."""
    return part_counts(job, sizes)[0]


def part_counts(job: Job, sizes: dict[str, int]) -> list[int]:
    """`microbatches` and every larger number, down to a row a device.

    More parts need less memory and gather weights more often.

    Raises:
      InputError: sizes that do not divide the model or the job.
    """
    layout = abstract_layout(job, sizes)
    if job.mode != "train" or job.parts > 1:
        return [job.parts]
    rows = job.batch // layout.size("batch")
    length = job.context // layout.size("sequence")
    return [n for n in _divisors(rows) if rows // n * length <= PART_TOKENS or n == rows]


def working(job: Job, layout: Layout, held: Held) -> int | float:
    """Bytes that come and go in a step and that no compiler could do without.

    Rows on their way to experts, whose buffers have room for the most uneven routing; of training
    the gradients, the streams before every unit of layers and one layer's weights.
    """
    c = job.config
    tokens = job.tokens / job.parts / parallel(layout, ("batch", "sequence"))
    rows = BF16 * tokens * c.num_experts_per_tok * layout.size("expert") * c.hidden_size / job.waves
    if job.mode == "decode":
        return 0.0
    if job.mode == "prefill":
        return PREFILL_ROWS * rows
    # Units of two layers are the most common; a unit recomputes what is inside it.
    streams = BF16 * tokens * c.hc_mult * c.hidden_size * len(c.layers) / 2
    copies = 1 if job.parts == 1 else 2  # a part's gradients next to their sum
    weights = BF16 * held.gathered / len(c.layers)
    return copies * held.gradients + streams + weights + TRAIN_ROWS * rows
