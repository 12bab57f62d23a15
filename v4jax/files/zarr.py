"""Regions of the uncompressed Zarr arrays that our Orbax format is made of."""

import itertools
import json
import math
import os

import numpy as np

from v4jax.errors import InputError
from v4jax.files.regions import Region, read_region, slices


class ZarrArray:
    """One array: a folder with `.zarray` and a file a chunk.

    Raises:
      InputError: a description that cannot be read, or of another shape, or compressed chunks.
    """

    def __init__(self, folder: str, shape: tuple[int, ...]):
        self.folder, self.shape = folder, shape
        path = os.path.join(folder, ".zarray")
        try:
            with open(path, "rb") as file:
                described = json.load(file)
            self._chunks = tuple(described["chunks"])
            found, plain = tuple(described["shape"]), described["compressor"] is None
            self._separator = described.get("dimension_separator", ".")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: cannot be understood ({error!r}); the checkpoint is damaged, so copy or "
                "convert it again"
            ) from None
        if found != shape or not plain or described.get("order") != "C":
            raise InputError(
                f"{folder}: is {list(found)} with compressor {described['compressor']}; expected "
                f"{list(shape)} without one, as v4jax.json says"
            )

    def read_into(self, out: np.ndarray, region: Region) -> None:
        """Fills `out` with a region, reading nothing else."""
        grid = [
            range(first // size, -(-end // size))
            for (first, end), size in zip(region, self._chunks, strict=True)
        ]
        for index in itertools.product(*grid):
            corner = tuple(i * size for i, size in zip(index, self._chunks, strict=True))
            chunk = tuple(
                (max(first, at), min(end, at + size))
                for (first, end), at, size in zip(region, corner, self._chunks, strict=True)
            )
            inside = tuple(
                (first - at, end - at) for (first, end), at in zip(chunk, corner, strict=True)
            )
            target = out[slices(chunk, region)]
            if target.flags.c_contiguous:
                self._read_chunk(index, inside, target)
            else:
                buffer = np.empty(target.shape, target.dtype)
                self._read_chunk(index, inside, buffer)
                target[...] = buffer

    def _read_chunk(self, index, inside, out):
        name = self._separator.join(map(str, index)) or "0"
        path = os.path.join(self.folder, name)
        needed = math.prod(self._chunks) * out.dtype.itemsize
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); copy it again") from None
        try:
            if os.fstat(fd).st_size != needed:
                raise InputError(
                    f"{path}: has {os.fstat(fd).st_size} bytes; expected {needed}, so copy or "
                    "convert the checkpoint again"
                )
            read_region(fd, 0, self._chunks, inside, out)
        finally:
            os.close(fd)
