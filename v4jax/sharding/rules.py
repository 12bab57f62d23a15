"""Which mesh axes each logical axis is spread over: one table a strategy.

The whole model runs inside one `shard_map`, on the arrays of one shard, so every collective stands
in the source: `collectives`, `sequence`, `expert`. A weight whose table entry names an axis of
`gathered` lies in parts and is put together where it is used; along every other axis each shard
computes with its own part.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from v4jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A table of logical axis -> mesh axes.

    Attributes:
      table: pairs, hashable. Logical axes that it leaves out are on every shard.
      gathered: mesh axes along which weights are stored in parts and gathered where they are used.
      exchange: how tokens reach their experts: "all_to_all", or "gather" (all-gather of the tokens,
        reduce-scatter of the outputs: less latency for a decode step's few tokens).
    """

    name: str
    table: tuple[tuple[str, tuple[str, ...]], ...]
    gathered: tuple[str, ...] = ()
    exchange: str = "all_to_all"

    @functools.cached_property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return dict(self.table)


def _strategy(name, gathered=(), exchange="all_to_all", **table):
    return Strategy(name, tuple(table.items()), gathered, exchange)


# Logical axes of activations: batch, sequence (tokens of a call), entries (those of a cache).
_TRAINED = {
    "gathered": ("fsdp", "sequence"),
    "expert": ("expert",),
    "embed": ("fsdp", "sequence"),
    "q_latent": ("fsdp", "sequence"),
    "head_group": ("fsdp", "sequence"),
    "hc_embed": ("fsdp", "sequence"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
TRAIN = _strategy(
    "train",
    batch=("data", "fsdp", "expert"),
    sequence=("sequence",),
    entries=("sequence",),
    **_TRAINED,
)
# Few rows of long context: the tokens of each lie on more axes.
TRAIN_LONG = _strategy(
    "train_long",
    batch=("data",),
    sequence=("fsdp", "expert", "sequence"),
    entries=("fsdp", "expert", "sequence"),
    **_TRAINED,
)
PREFILL = _strategy(
    "prefill",
    batch=("data",),
    sequence=("fsdp", "expert", "sequence"),
    entries=("fsdp", "expert", "sequence"),
    expert=("fsdp", "expert"),
    heads=("tensor",),
    mlp=("tensor",),
    vocab=("tensor",),
)
# One row, as the engine reads prompts: its tokens are spread over data too.
PREFILL_ONE = _strategy(
    "prefill_one",
    sequence=("data", "fsdp", "expert", "sequence"),
    entries=("data", "fsdp", "expert", "sequence"),
    expert=("fsdp", "expert"),
    heads=("tensor",),
    mlp=("tensor",),
    vocab=("tensor",),
)
# Many rows: each shard has its own, with their whole caches.
DECODE = _strategy(
    "decode",
    exchange="gather",
    batch=("data", "fsdp", "expert", "sequence"),
    expert=("fsdp", "expert"),
    heads=("tensor",),
    mlp=("tensor",),
    vocab=("tensor",),
)
# Few rows of long context: every shard has a part of each cache, as PREFILL left it.
DECODE_LONG = _strategy(
    "decode_long",
    exchange="gather",
    batch=("data",),
    entries=("fsdp", "expert", "sequence"),
    expert=("fsdp", "expert"),
    heads=("tensor",),
    mlp=("tensor",),
    vocab=("tensor",),
)
# One row that every shard has whole, as a draft follows the prompt that is being read.
DECODE_ONE = _strategy(
    "decode_one",
    exchange="gather",
    expert=("fsdp", "expert"),
    heads=("tensor",),
    mlp=("tensor",),
    vocab=("tensor",),
)
STRATEGIES = {s.name: s for s in (TRAIN, TRAIN_LONG, PREFILL, DECODE, DECODE_LONG)}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and a strategy, or (with no mesh) one device: then every `axes` is empty.

    Attributes:
      mesh, strategy: both or neither; a mesh without devices is enough to count with.
      waves: parts in which tokens go to their experts, so that one part's exchange overlaps
        the computation of another and the buffers are that much smaller.
      capacity: token copies that a shard may send to each other one, in multiples of an even
        spread, where the exchange is a padded one; None for as many as could ever be sent.
    """

    mesh: Mesh | AbstractMesh | None = None
    strategy: Strategy | None = None
    waves: int = 1
    capacity: float | None = None

    def __post_init__(self):
        if (self.mesh is None) != (self.strategy is None):
            raise InputError("Layout got a mesh or a strategy alone; expected both or neither")

    def axes(self, logical: str | None) -> tuple[str, ...]:
        """The mesh axes, longer than 1, that a logical axis is spread over."""
        if self.mesh is None or logical is None:
            return ()
        named = self.strategy.axes.get(logical, ())
        return tuple(axis for axis in named if self.mesh.shape[axis] > 1)

    def size(self, logical: str | None) -> int:
        """Into how many parts a logical axis is cut."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(logical))

    def gathered(self, logical: str | None) -> tuple[str, ...]:
        """Those of `axes` along which a weight is gathered where it is used."""
        return tuple(axis for axis in self.axes(logical) if axis in self.strategy.gathered)

    def kept(self, logical: str | None) -> tuple[str, ...]:
        """Those of `axes` along which a shard computes with its own part of a weight."""
        return tuple(axis for axis in self.axes(logical) if axis not in self.strategy.gathered)

    def index(self, logical: str) -> jax.Array | int:
        """Which part of a logical axis this shard has; inside `shard_map`."""
        axes = self.axes(logical)
        return jax.lax.axis_index(axes) if axes else 0

    def spec(self, *logical: str | None) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes.

        Raises:
          InputError: two of them lie on one mesh axis.
        """
        taken: dict[str, str] = {}
        for name in logical:
            for axis in self.axes(name):
                if axis in taken:
                    raise InputError(
                        f"logical axes {taken[axis]!r} and {name!r} of one array both lie on mesh "
                        f"axis {axis!r} in strategy {self.strategy.name!r}; give one another axis"
                    )
                taken[axis] = name
        return PartitionSpec(*(self.axes(name) or None for name in logical))

    def sharding(self, *logical: str | None) -> NamedSharding:
        """`spec` on the mesh."""
        return NamedSharding(self.mesh, self.spec(*logical))

    def check_divides(self, sizes: Mapping[str, int]) -> None:
        """Refuses a logical axis whose size is not a multiple of its parts.

        Raises:
          InputError: with the axis, its size, the mesh axes and their sizes.
        """
        for logical, size in sizes.items():
            if size % self.size(logical):
                axes = " x ".join(f"{a}={self.mesh.shape[a]}" for a in self.axes(logical))
                raise InputError(
                    f"{logical} has size {size}, which mesh axes {axes} of strategy "
                    f"{self.strategy.name!r} do not divide; choose a mesh that does"
                )


ONE_DEVICE = Layout()
