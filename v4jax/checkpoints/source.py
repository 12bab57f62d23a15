"""A checkpoint opened for reading: its config, and its tensors one by one under official keys.

Three kinds look alike to their readers: a folder of safetensors files (here), a directory in our
Orbax format (`orbax_io`) and a model's variables (`checkpoint`). Each has

    path, config    config is in agreement with the tensors that are there
    config_text     the official config.json as bytes, None where the source has none
    items           item -> its list of `TensorSpec`, each with the one dtype that was found
    fingerprint     text that changes when the content may have changed
    open_item(name) a context manager; gives `read(key, out)`, which fills an array

Folders and Orbax directories also have

    open_parts(name) the same; `read(key, out, region)` reads the bytes of a tensor's region alone
"""

import contextlib
import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
from absl import logging

from v4jax.checkpoints.expand import check_scales, expand
from v4jax.config import WINDOW, ModelConfig
from v4jax.errors import InputError
from v4jax.files.json_reader import quote, word
from v4jax.files.regions import shape_of, slices
from v4jax.files.regular import read_regular
from v4jax.files.safetensors import SafetensorsFolder
from v4jax.hf.config import MAX_CONFIG
from v4jax.weights import (
    BLOCK,
    GROUP,
    TensorSpec,
    expanded_config,
    scale_key,
    stored_form,
    tensor_table,
    transformers_key,
)

JOURNAL_NAME = ".incomplete"  # there while a conversion into the directory is under way
CONFIG_NAME = "config.json"

_CARRIED = re.compile(r"mtp\.\d{1,4}(\.\w{1,80}){1,8}", re.ASCII)
Read = Callable[..., None]  # (key, out), or of parts (key, out, region)
Found = Mapping[str, tuple[str, tuple[int, ...]]]  # key -> dtype, shape


class FolderSource:
    """A directory of safetensors files, in the official or the transformers layout.

    Raises:
      InputError: unreadable or damaged files, or tensors that are not those of the config.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._folder = SafetensorsFolder(self.path)
        entries = self._folder.entries
        found = {key: (entry.dtype, entry.shape) for key, entry in entries.items()}
        transformers = any(key.startswith("model.") for key in found)
        text = read_config(self.path)
        config = ModelConfig.from_hf(self.path)
        self._file_keys = {}
        if transformers:
            config = dataclasses.replace(config, mtp_layers=(), draft_layers=0)
            self._file_keys = {
                spec.key: transformers_key(spec.key) for spec in tensor_table(config)
            }
            official = {file_key: key for key, file_key in self._file_keys.items()}
            found = {official.get(key, key): entry for key, entry in found.items()}
        self.config, self.items = fit(config, found, self.path, self._file_keys)
        self.config_text = None if transformers else text
        self.fingerprint = self._fingerprint(text)

    @contextlib.contextmanager
    def open_item(self, name: str) -> Iterator[Read]:
        def read(key, out, region=None):
            self._folder.read_into(self._file_keys.get(key, key), out, region)

        yield read

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


def fit(
    config: ModelConfig,
    found: Found,
    where: str,
    file_keys: Mapping[str, str] = MappingProxyType({}),
) -> tuple[ModelConfig, dict[str, list[TensorSpec]]]:
    """Holds the tensors that were found against those of the config, by official keys.

    Args:
      config: what config.json says. MTP and DSpark draft blocks are counted by keys.
      found: dtype and shape of each tensor.
      where: the checkpoint's name, for errors; file_keys: what it calls a key, if differently.

    Returns:
      The config with the blocks that are there, and the items. Draft blocks become items
      `carried_0`, ..., whose tensors are passed on as they are.

    Raises:
      InputError: a missing, extra, misshapen or wrongly typed tensor.
    """
    config = _count_blocks(config, found, where)
    sample = found.get("layers.0.attn.wq_a.scale")
    form = stored_form(config, None if sample is None else sample[0])
    table = tensor_table(config, form=form)
    carried = _carried(found, where) if config.draft_layers else []
    specs = matched([*table, *carried], found, where, file_keys)
    return config, by_item(specs)


def matched(
    table: Iterable[TensorSpec], found: Found, where: str, file_keys: Mapping[str, str]
) -> list[TensorSpec]:
    """The table with the dtypes that were found; an error unless all of it fits."""
    specs, problems = [], []
    table = list(table)
    for spec in table:
        dtype, shape = found.get(spec.key, (None, None))
        key = file_keys.get(spec.key, spec.key)
        expected = f"expected {' or '.join(spec.dtypes)} {list(spec.shape)}"
        if dtype is None:
            problems.append(f"{key} is missing ({expected})")
        elif dtype not in spec.dtypes or shape != spec.shape:
            problems.append(f"{key} is {dtype} {quote(shape)} ({expected})")
        elif spec.dtypes != (dtype,):
            spec = spec._replace(dtypes=(dtype,))
        specs.append(spec)
    known = {spec.key for spec in table}
    for key in found:
        if key not in known:
            dtype, shape = found[key]
            found_as = f"{word(key)}, {dtype} {quote(shape)}"
            problems.append(f"{found_as}, is not a tensor of this model")
    if problems:
        shown = "; ".join(problems[:4]) + ("; ..." if len(problems) > 4 else "")
        raise InputError(
            f"{where}: {len(problems)} tensors do not fit config.json: {shown}. Check that config "
            "and weights are of the same checkpoint and that all of it is there"
        )
    return specs


def by_item(specs: Iterable[TensorSpec]) -> dict[str, list[TensorSpec]]:
    items = {}
    for spec in specs:
        items.setdefault(spec.item, []).append(spec)
    return items


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
    rows, columns = (1, GROUP) if packed else (BLOCK, BLOCK)
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


def read_config(path: str) -> bytes:
    """The text of a checkpoint's config.json."""
    where = os.path.join(path, CONFIG_NAME)
    if not os.path.exists(where):
        raise InputError(
            f"{path}: {CONFIG_NAME} cannot be read (no such file); it belongs beside the weights"
        )
    return read_regular(where, MAX_CONFIG)


def _count_blocks(config, found, where):
    """The config with as many MTP or draft blocks as there are keys of them."""
    numbers = {int(m[1]) for key in found if (m := re.match(r"mtp\.(\d{1,9})\.", key))}
    count = len(numbers)
    if not count and config.draft_layers:
        raise InputError(
            f"{where}: config.json announces {config.draft_layers} draft blocks and the files hold "
            "no mtp.* tensors; get the missing files"
        )
    if numbers != set(range(count)):
        raise InputError(
            f"{where}: has blocks mtp.{quote(sorted(numbers))}; expected them to count from 0 "
            "without gaps"
        )
    drafts = any(re.match(r"mtp\.\d+\.main_(proj|norm)\.", key) for key in found)
    if drafts:
        announced = config.draft_layers or len(config.mtp_layers)
        if announced not in (count, 1):
            raise InputError(
                f"{where}: config.json announces {announced} blocks after the layers and the files "
                f"hold {count} draft blocks (mtp.0 to mtp.{count - 1}); get the missing files"
            )
        return dataclasses.replace(config, mtp_layers=(), draft_layers=count)
    if config.draft_layers:
        return dataclasses.replace(config, mtp_layers=(WINDOW,) * count, draft_layers=0)
    return config


def _carried(found, where):
    for key, (dtype, shape) in found.items():
        if key.startswith("mtp."):
            # Carried tensors are files by that name in our Orbax format.
            if not _CARRIED.fullmatch(key):
                raise InputError(
                    f"{where}: holds the tensor {quote(key)}; expected a name such as "
                    "mtp.0.attn.wq_a.weight, of letters, digits and _ between dots"
                )
            item = f"carried_{key.split('.')[1]}"
            yield TensorSpec(key, shape, (dtype,), item, ("carried", key), role="carried")
