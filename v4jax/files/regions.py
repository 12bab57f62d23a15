"""Rectangular regions of arrays in files, read without the bytes around them."""

import itertools
import math
import os
from collections.abc import Iterable, Sequence

import numpy as np

Region = tuple[tuple[int, int], ...]  # first and end of each axis

_PIECE = 8 << 20  # bytes read at once


def whole(shape: Sequence[int]) -> Region:
    return tuple((0, size) for size in shape)


def shape_of(region: Region) -> tuple[int, ...]:
    return tuple(end - first for first, end in region)


def slices(region: Region, within: Region | None = None) -> tuple[slice, ...]:
    """A region as slices, counted from the corner of the region `within`."""
    corners = [0] * len(region) if within is None else [first for first, _ in within]
    return tuple(
        slice(first - corner, end - corner)
        for (first, end), corner in zip(region, corners, strict=True)
    )


def hull(regions: Iterable[Region]) -> Region:
    """The smallest region around all."""
    return tuple(
        (min(first for first, _ in axis), max(end for _, end in axis))
        for axis in zip(*regions, strict=True)
    )


def read_region(
    fd: int, offset: int, shape: Sequence[int], region: Region, out: np.ndarray
) -> None:
    """Fills `out` with a region of the array of `shape` that starts at `offset` of a file.

    Args:
      out: C-contiguous, of as many bytes as the region has in the file.

    Raises:
      EOFError: the file ends before the region does.
    """
    elements = math.prod(shape_of(region))
    if not elements:
        return
    if out.nbytes % elements or not out.flags.c_contiguous:
        raise ValueError(f"{out.shape} {out.dtype} is no C-contiguous buffer for {region}")
    itemsize = out.nbytes // elements
    buffer = memoryview(out.reshape(-1).view(np.uint8))
    strides = [itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    # Axes that are whole, counted from the last, make one run with the axis before them.
    run = len(shape)
    while run and region[run - 1] == (0, shape[run - 1]):
        run -= 1
    outer = region[: max(run - 1, 0)]
    length = itemsize * math.prod(shape_of(region[len(outer) :]))
    start = offset
    if len(outer) < len(shape):
        start += region[len(outer)][0] * strides[len(outer)]
    done = 0
    for indices in itertools.product(*(range(*axis) for axis in outer)):
        at = start + sum(i * stride for i, stride in zip(indices, strides, strict=False))
        _read_run(fd, at, buffer[done : done + length])
        done += length


def _read_run(fd, offset, buffer):
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done : done + _PIECE]], offset + done)
        if not count:
            raise EOFError
        done += count
