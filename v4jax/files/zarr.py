"""Regions of the uncompressed Zarr arrays that our Orbax format is made of."""

import itertools
import math
import os

import numpy as np

from v4jax.errors import InputError
from v4jax.files.json_reader import quote, read_fields
from v4jax.files.regions import Region, read_region, slices
from v4jax.files.regular import open_regular

MAX_DESCRIPTION = 1 << 20  # bytes of .zarray


class ZarrArray:
    """One array: a folder with `.zarray` and a file a chunk.

    Raises:
      InputError: a description that cannot be read, or of another shape, or compressed chunks.
    """

    def __init__(self, folder: str, shape: tuple[int, ...]):
        self.folder, self.shape = folder, shape
        path = os.path.join(folder, ".zarray")
        described = read_fields(path, MAX_DESCRIPTION)
        self._chunks = described.integers("chunks", low=1)
        self._separator = described.string("dimension_separator", ".")
        found, compressor = described.integers("shape"), described.get("compressor")
        fits = found == shape and len(self._chunks) == len(shape)
        if not fits or compressor is not None or described.get("order") != "C":
            raise InputError(
                f"{folder}: is {quote(found)} in chunks of {quote(self._chunks)}, order "
                f"{quote(described.get('order'))}, compressor {quote(compressor)}; expected "
                f"{list(shape)} in C order without compressor, as v4jax.json says"
            )
        if self._separator not in (".", "/"):
            raise described.refuse("dimension_separator", "'.' or '/'")

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
        fd = open_regular(path)
        try:
            if os.fstat(fd).st_size != needed:
                raise InputError(
                    f"{path}: has {os.fstat(fd).st_size} bytes; expected {needed}, so copy or "
                    "convert the checkpoint again"
                )
            read_region(fd, 0, self._chunks, inside, out)
        finally:
            os.close(fd)
