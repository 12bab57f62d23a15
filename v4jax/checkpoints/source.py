"""A checkpoint opened for reading: its config, and its tensors one by one under official keys.

Three kinds look alike to their readers: a folder of safetensors files (here), a directory in our
Orbax format (`orbax`) and a model's variables (`variables`). Each has

    path, config    config is in agreement with the tensors that are there
    config_text     the official config.json as bytes, None where it is not that of the tensors
    items           item -> its list of `TensorSpec`, each with the one dtype that was found
    fingerprint     text that changes when the content may have changed
    notes           a sentence for everything that is not as in the official checkpoints
    key_in_file(key) what the files call the tensor that officially has this key
    open_item(name) a context manager; gives `read(key, out)`, which fills an array

Folders and Orbax directories also have

    open_parts(name) the same; `read(key, out, region)` reads the bytes of a tensor's region alone
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from absl import logging

from v4jax import block_sizes
from v4jax.checkpoints.expand import check_scales, expand
from v4jax.checkpoints.fit import by_item, fit, says_the_same
from v4jax.checkpoints.foreign import Found
from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.files.regions import shape_of, slices, whole
from v4jax.files.regular import read_regular
from v4jax.files.safetensors import NUMPY_DTYPES, SafetensorsFolder
from v4jax.hf.config import MAX_CONFIG, parse_config
from v4jax.hf.names import names_for_errors, official_places
from v4jax.hf.tensors import TensorSpec, expanded_config, scale_key, tensor_table

JOURNAL_NAME = ".incomplete"  # there while a conversion into the directory is under way
CONFIG_NAME = "config.json"
MANIFEST_NAME = "v4jax.json"  # makes a directory a checkpoint in our Orbax format

Read = Callable[..., None]  # (key, out), or of parts (key, out, region)


class Announced(NamedTuple):
    """A checkpoint's config.json: its text, and the config that it says."""

    text: bytes
    config: ModelConfig


class FolderSource:
    """A directory of safetensors files, with official names or those of transformers.

    Args:
      announced: its config.json, where that has been read already.

    Raises:
      InputError: unreadable or damaged files, or tensors that are not those of the config.
    """

    def __init__(self, path: str | os.PathLike, announced: Announced | None = None):
        self.path = os.fspath(path)
        self._folder = SafetensorsFolder(self.path)
        entries = self._folder.entries
        found = {key: (entry.dtype, entry.shape) for key, entry in entries.items()}
        self._places = official_places(found, self.path)
        self.key_in_file = names_for_errors(self._places)
        found = {key: (place.dtype, place.shape) for key, place in self._places.items()}
        text, config = announced or read_announced(self.path)
        fitted = fit(config, found, self.path, self.key_in_file)
        self.config, self.items, self._stored = fitted.config, fitted.items, fitted.stored
        self.notes = fitted.notes
        say_notes(self.path, self.notes)
        renamed = any(place.key != key for key, place in self._places.items())
        self.config_text = text if not renamed and says_the_same(config, self.config) else None
        self.fingerprint = self._fingerprint(text)

    @contextlib.contextmanager
    def open_item(self, name: str) -> Iterator[Read]:
        shapes = {spec.key: spec.shape for spec in self.items[name]}

        def read_stored(key, out, region):
            place = self._places[key]
            self._folder.read_into(place.key, out, place.part(region))

        yield adapting(read_stored, self._stored, shapes)

    open_parts = open_item

    def close(self) -> None:
        self._folder.close()

    def _fingerprint(self, text):
        digest = hashlib.sha256(os.path.realpath(self.path).encode() + b"\0" + text)
        for name, file in self._folder.files.items():
            status = os.stat(file.path)
            digest.update(f"\0{name} {status.st_size} {status.st_mtime_ns}\0".encode())
            digest.update(file.header)
        return digest.hexdigest()


def say_notes(where: str, notes: Iterable[str]) -> None:
    """Warns of what is not as in the official checkpoints."""
    for note in notes:
        logging.warning("%s: %s", where, note)


def adapting(read: Read, stored: Found, shapes: Mapping[str, tuple[int, ...]]) -> Read:
    """A reader of tensors some of which are stored as another type or with more columns.

    Args:
      read: reads (key, out, region) as it is stored; region None for all of it.
      stored: dtype and shape in the files of the tensors that are read as something else.
      shapes: key -> shape as which a tensor is read.
    """

    def adapt(key, out, region=None):
        if key not in stored:
            read(key, out, region)
            return
        dtype, shape = stored[key]
        if region is None and shape != shapes[key]:
            region = whole(shapes[key])  # the first columns
        buffer = np.empty(out.shape, NUMPY_DTYPES[dtype])
        read(key, buffer, region)
        out[...] = buffer

    return adapt


def planned_items(source, weights: str) -> dict[str, list[TensorSpec]]:
    """The items that a copy of the source with these weights has (drafts stay as they are)."""
    if weights == "stored":
        return source.items
    what = _what_is_rounded(source.items["layer_000"], weights)
    if what:
        logging.warning("%s: %s do not fit %s exactly and are rounded", source.path, what, weights)
    specs = tensor_table(expanded_config(source.config, weights))
    table = by_item(spec._replace(dtypes=spec.dtypes[:1]) for spec in specs)
    carried = {name: specs for name, specs in source.items.items() if name not in table}
    return {**table, **carried}


def _what_is_rounded(specs, weights):
    """What has no exact form in these weights; E8M0 scales are powers of two and lose nothing."""
    if any(spec.role == "scale" and spec.dtypes == ("F32",) for spec in specs):
        return "FP8 values times float32 scales"
    if weights == "bf16" and any(s.role == "matrix" and s.dtypes == ("F32",) for s in specs):
        return "float32 weights"
    return None


def converting(source, item: str, read: Read) -> Read:
    """A reader of an item that also changes types: `out`'s dtype says what is wanted.

    Quantised values are expanded where a float array is wanted, and floats are cast. Bytes that
    need no change are read straight into `out`. Scales and token tables are checked. A region is
    one of what is wanted; in FP4 that is twice as wide as what is stored.
    """
    specs = {spec.key: spec for spec in source.items[item]}
    experts = source.config.n_routed_experts

    def convert(key, out, region=None):
        spec = specs[key]
        part = () if region is None else (region,)
        same = out.dtype == spec.dtype
        if not same and spec.part == "values":
            _expand_into(spec, specs[scale_key(key)], read, region, out)
            return
        stored = out if same else np.empty(out.shape, spec.dtype)
        read(key, stored, *part)
        if spec.role == "scale" and stored.dtype == np.uint8:
            check_scales(key, stored)
        if spec.role == "table":
            _check_table(key, stored, experts)
        if not same:
            out[...] = stored

    return convert


def _expand_into(spec, scales, read, region, out):
    """Reads and expands a matrix, or the blocks around a region of it."""
    if region is None:
        values, factors = (np.empty(each.shape, each.dtype) for each in (spec, scales))
        read(spec.key, values)
        read(scales.key, factors)
        expand(spec.key, values, factors, out)
        return
    packed = spec.dtype == np.uint8
    rows, columns = (1, block_sizes.FP4) if packed else (block_sizes.FP8, block_sizes.FP8)
    blocks = tuple(
        (first // size, -(-end // size))
        for (first, end), size in zip(region, (rows, columns), strict=True)
    )
    full = (spec.shape[0], spec.shape[1] * (2 if packed else 1))
    around = tuple(
        (first * size, min(end * size, most))
        for (first, end), size, most in zip(blocks, (rows, columns), full, strict=True)
    )
    stored = (around[0], tuple(n // 2 for n in around[1])) if packed else around
    values = np.empty(shape_of(stored), spec.dtype)
    factors = np.empty(shape_of(blocks), scales.dtype)
    read(spec.key, values, stored)
    read(scales.key, factors, blocks)
    expanded = np.empty(shape_of(around), out.dtype)
    expand(spec.key, values, factors, expanded)
    out[...] = expanded[slices(region, around)]


def _check_table(key, table, experts):
    low, high = int(table.min()), int(table.max())
    if low < 0 or high >= experts:
        raise InputError(
            f"{key} holds expert numbers from {low} to {high}; expected 0 to {experts - 1}, so the "
            "file is damaged or of another model"
        )


def read_announced(path: str | os.PathLike) -> Announced:
    """Reads the config.json of a checkpoint's directory."""
    where = os.path.join(path, CONFIG_NAME)
    if not os.path.exists(where):
        raise InputError(
            f"{path}: {CONFIG_NAME} cannot be read (no such file); it belongs next to the weights"
        )
    text = read_regular(where, MAX_CONFIG)
    return Announced(text, parse_config(text, where))
