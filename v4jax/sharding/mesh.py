"""The device mesh: five axes, always all present, those that a run does not use of length 1."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from v4jax.errors import InputError
from v4jax.sharding import processes

AXES = ("data", "fsdp", "expert", "sequence", "tensor")


def make_mesh(devices: Sequence[Any] | None = None, **sizes: int) -> Mesh:
    """A mesh of the axes `AXES`, in that order (the last one's devices are neighbours).

    Args:
      devices: real or described ones; None for all that jax has.
      **sizes: length of each axis; those left out are 1. One may be -1: what remains.

    Raises:
      InputError: an unknown axis, or sizes whose product is not the number of devices.
    """
    if devices is None:
        devices = jax.devices()
    shape = tuple(complete(sizes, len(devices)).values())
    if all(isinstance(device, jax.Device) for device in devices) and _whole(devices):
        # Lays a mesh along the interconnect of a TPU pod; elsewhere the devices' own order.
        return jax.make_mesh(
            shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=tuple(devices)
        )
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_of(sizes: str | None, flag: str, example: str) -> Mesh | None:
    """The mesh of a flag such as "expert=4,sequence=2" on all devices; None for one device.

    Args:
      sizes: the flag's value. flag, example: its name and an axis to advise, for errors.

    Raises:
      InputError: several processes without a mesh, or as `parse_sizes` and `make_mesh`.
    """
    if sizes is not None:
        return make_mesh(None, **parse_sizes(sizes))
    if processes.count() > 1:
        raise InputError(
            f"{flag} is missing; {processes.count()} processes with {jax.device_count()} devices "
            f"expect one, such as {example}={jax.device_count()}"
        )
    return None


def _whole(devices):
    return list(devices) == jax.devices()


def complete(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """All five sizes, a -1 worked out, checked against the number of devices."""
    _check(sizes)
    full = {axis: sizes.get(axis, 1) for axis in AXES}
    free = [axis for axis, size in full.items() if size == -1]
    known = math.prod(size for size in full.values() if size != -1)
    if free and devices % known == 0:
        full[free[0]] = devices // known
    found = math.prod(full.values())
    if found != devices:
        shown = " x ".join(f"{axis} {size}" for axis, size in full.items() if size != 1) or "1"
        raise InputError(
            f"the mesh {shown.replace('-1', '?')} needs {abs(found)} devices and there are "
            f"{devices}; choose sizes whose product is {devices}"
        )
    return full


def parse_sizes(text: str) -> dict[str, int]:
    """`data=2,fsdp=4` as sizes, checked as far as that goes without devices.

    Raises:
      InputError: text of another form, an unknown axis or one twice, or sizes that cannot be.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-?[0-9]{1,9})\s*", part)
        if match is None:
            raise InputError(
                f"mesh has {part[:200]!r}; expected AXIS=N with AXIS of {', '.join(AXES)}"
            )
        axis, size = match[1], int(match[2])
        if axis in sizes:
            raise InputError(f"mesh has {axis[:200]} twice; expected each axis once at most")
        sizes[axis] = size
    _check(sizes)
    return sizes


def _check(sizes):
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise InputError(
            f"mesh axis {unknown[0][:200]!r} is unknown; expected some of {', '.join(AXES)}"
        )
    if any(size < 1 and size != -1 for size in sizes.values()) or [*sizes.values()].count(-1) > 1:
        given = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise InputError(
            f"mesh {given}: expected sizes of 1 or more, and -1 (what remains) at most once"
        )


def replicate(mesh: Mesh, values: Any) -> Any:
    """Host arrays, the same in every process, on all of a mesh's devices."""
    sharding = NamedSharding(mesh, PartitionSpec())
    put = functools.partial(jax.make_array_from_process_local_data, sharding)
    with jax.transfer_guard("allow"):  # what several processes do here does not count as explicit
        return jax.tree.map(put, values)
