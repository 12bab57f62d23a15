"""Loading onto a mesh: each process reads the bytes that its own devices need, and no others.

One item (a layer) is read at a time into one buffer for each part of a leaf that a device here
holds; devices with the same part share its buffer. Where parts of a tensor lie side by side they
are read as one.
"""

import dataclasses
import functools
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from v4jax.checkpoints.source import converting
from v4jax.errors import InputError
from v4jax.files.regions import Region, hull, shape_of, slices
from v4jax.files.safetensors import bytes_of
from v4jax.files.threads import run_all
from v4jax.hf.config import to_hf


@dataclasses.dataclass
class Part:
    """A part of a leaf, the devices here that hold it, and its bytes."""

    region: Region
    devices: list[Any]
    buffer: np.ndarray


class ShardedLeaf:
    """A leaf of the variables while this process's parts of it are read."""

    def __init__(self, where, shape, dtype, sharding: NamedSharding, allocate):
        self.shape, self.sharding = shape, sharding
        self.parts: dict[Region, Part] = {}
        for device, index in _local_parts(where, shape, sharding).items():
            region = tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))
            if region not in self.parts:
                self.parts[region] = Part(region, [], allocate(shape_of(region), dtype))
            self.parts[region].devices.append(device)

    def places(self, leading: tuple[int, ...]) -> list[tuple[Region, np.ndarray]]:
        """Regions of the tensor at these leading indices, and where each belongs."""
        found = []
        for region, part in self.parts.items():
            outer, inner = region[: len(leading)], region[len(leading) :]
            own = all(first <= i < end for i, (first, end) in zip(leading, outer, strict=True))
            if own:
                at = tuple(i - first for i, (first, _) in zip(leading, outer, strict=True))
                found.append((inner, part.buffer[at]))
        return found

    def finish(self) -> jax.Array:
        """The parts on their devices, as one array."""
        arrays = [
            jax.device_put(part.buffer, device)
            for part in self.parts.values()
            for device in part.devices
        ]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


def _local_parts(where, shape, sharding):
    try:
        return sharding.addressable_devices_indices_map(shape)
    except ValueError as error:  # jax's own sentence has the sizes
        raise InputError(
            f"{'/'.join(where)} {list(shape)} cannot be spread as {sharding.spec} on the mesh "
            f"{dict(sharding.mesh.shape)}: {str(error).splitlines()[0]}; choose a mesh that does"
        ) from None


def identity(source) -> dict[str, Any]:
    """What must be the same in all processes: the config, the tensors and a sample of their bytes.

    Paths and times of files may differ: each host can have a copy of its own.
    """
    specs = [spec for item in source.items.values() for spec in item]
    tensors = [(spec.key, spec.dtypes, spec.shape) for spec in specs]
    sample = 0
    with source.open_parts("head") as read:
        for spec in source.items["head"]:
            out = np.empty((1, *spec.shape[1:]), spec.dtype)  # the first row
            region = tuple((0, size) for size in out.shape)
            read(spec.key, out, region)
            sample = zlib.crc32(bytes_of(out), sample)
    return {
        "config": to_hf(source.config),
        "tensors": zlib.crc32(repr(tensors).encode()),
        "bytes of the head": sample,
    }


def fill_leaves(source, items, leaves, places, last_items) -> dict[tuple[str, ...], jax.Array]:
    """Reads all items into the leaves; each goes to the devices once it is complete.

    Args:
      leaves: path -> `ShardedLeaf`, emptied on the way.
      places: tensor key -> its leaf's path and its leading indices there.
      last_items: path -> the last item that has tensors of the leaf.
    """
    done = {}
    with ThreadPoolExecutor(8) as pool:
        for item, specs in items.items():
            specs = [spec for spec in specs if spec.key in places]
            if not specs:
                continue
            with source.open_parts(item) as read:
                convert = converting(source, item, read)
                run_all(pool, functools.partial(_fetch, convert, leaves, places), specs)
            for where in {places[spec.key][0] for spec in specs}:
                if last_items[where] == item:
                    done[where] = leaves.pop(where).finish()
    return done


def _fetch(convert, leaves, places, spec):
    """Reads the parts of one tensor."""
    where, leading = places[spec.key]
    wanted = leaves[where].places(leading)
    if not wanted:
        return
    around = hull([region for region, _ in wanted])
    joined = sum(math.prod(shape_of(region)) for region, _ in wanted)
    if len(wanted) == 1 or joined != math.prod(shape_of(around)):
        for region, out in wanted:
            convert(spec.key, out, region)
        return
    buffer = np.empty(shape_of(around), wanted[0][1].dtype)
    convert(spec.key, buffer, around)
    for region, out in wanted:
        out[...] = buffer[slices(region, around)]
