"""Our Orbax format: a directory of one Orbax checkpoint for each block.

    config.json     the official config
    v4jax.json      the manifest, written last: without it the directory is no checkpoint
    items/embed, items/layer_000, ..., items/head, items/mtp_0, ... or items/draft_0, ...
                            Orbax PyTree checkpoints
    items/carried_0, ...    draft blocks of a config that does not describe them, as they came
    tokenizer.json, ...     companions, copied

An item is the tree of one unstacked block, {"params": ..., "buffers": ...} with the paths of
`weights.tensor_table`, or {"carried": {official key: array}}. The experts of a layer are stacked,
[E, out, in]. A quantised matrix is {"values", "scales"}: values float8_e4m3fn, or uint8 with two
E2M1 codes per byte; scales uint8 (E8M0) or float32. Token tables stay int64. Arrays are Zarr,
without compression (packed weights do not shrink) and without OCDBT, whose file names are random:
the same checkpoint always has the same bytes.

The manifest holds "format", "version", "weights" ("stored", "bf16" or "float32": what conversion
made of them), and for each item its tensors by official key: dtype and shape as in the official
files, and the CRC-32 of the bytes there.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from flax.traverse_util import unflatten_dict

from v4jax.checkpoints.fit import fit, says_the_same
from v4jax.checkpoints.leaves import path_of
from v4jax.checkpoints.source import (
    MANIFEST_NAME,
    Announced,
    Read,
    adapting,
    read_announced,
    say_notes,
)
from v4jax.errors import ChecksumError, InputError
from v4jax.files.atomic import sync_directory, write_atomically
from v4jax.files.json_reader import MAX_BYTES, Fields, parse_json
from v4jax.files.regions import slices, whole
from v4jax.files.regular import check_regular_below, read_regular
from v4jax.files.safetensors import NUMPY_DTYPES, bytes_of
from v4jax.files.threads import run_all
from v4jax.files.zarr import ZarrArray
from v4jax.hf.tensors import TensorSpec
from v4jax.sharding import processes

FORMAT = "v4jax-orbax"
VERSION = 1
_CHUNK = 64 << 20  # larger stacks of experts are cut into a file an expert


class OrbaxSource:
    """A checkpoint in our Orbax format, opened for reading; see `source`.

    Args:
      verify: hold what is read whole against the checksums of the manifest. One pass more over
        bytes in memory: 0.3 s for a GB and core.
      announced: its config.json, where that has been read already.

    Raises:
      InputError: no or a foreign manifest, missing items, or tensors that are not the config's.
    """

    def __init__(
        self, path: str | os.PathLike, verify: bool = True, announced: Announced | None = None
    ):
        self.path = os.fspath(path)
        found, checksums, text = _read_manifest(self.path)
        self._checksums = checksums if verify else {}
        config_text, config = announced or read_announced(self.path)
        fitted = fit(config, found, self.path)
        self.config, self.items, self._stored = fitted.config, fitted.items, fitted.stored
        self.notes, self.key_in_file = fitted.notes, str
        say_notes(self.path, self.notes)
        self.config_text = config_text if says_the_same(config, self.config) else None
        absent = [name for name in self.items if not os.path.isdir(item_path(self.path, name))]
        if absent:
            raise InputError(
                f"{self.path}: {len(absent)} of {len(self.items)} items are missing, first "
                f"items/{absent[0]}; copy or convert the checkpoint again"
            )
        identity = os.path.realpath(self.path).encode() + b"\0" + config_text + text
        self.fingerprint = hashlib.sha256(identity).hexdigest()

    @contextlib.contextmanager
    def open_item(self, name: str) -> Iterator[Read]:
        """Restores an item: one block in memory."""
        if processes.count() > 1:  # where Orbax would make all of them wait for one another
            with self.open_parts(name) as read:
                yield read
            return
        specs = self._stored_specs(name)
        tree = load_item(self.path, name, specs)
        parts = _parts(tree, specs)

        def read(key, out, region):
            self._check(key, parts[key])
            out[...] = parts[key] if region is None else parts[key][slices(region)]

        yield self._adapting(name, read)

    @contextlib.contextmanager
    def open_parts(self, name: str) -> Iterator[Read]:
        """Reads regions straight from the item's Zarr files, without Orbax."""
        specs = {spec.key: spec for spec in self._stored_specs(name)}
        tree, _ = empty_tree(list(specs.values()))  # memory that nobody touches
        path = item_path(self.path, name)

        def read(key, out, region):
            spec = specs[key]
            names = spec.path if spec.part == "array" else (*spec.path, spec.part)
            leaf = functools.reduce(dict.__getitem__, names, tree)
            everything = whole(spec.shape)
            region = everything if region is None else region
            inside, target = region, out
            if spec.expert is not None:
                inside, target = ((spec.expert, spec.expert + 1), *region), out[None]
            ZarrArray(os.path.join(path, ".".join(names)), leaf.shape).read_into(target, inside)
            if region == everything:
                self._check(key, out)

        yield self._adapting(name, read)

    def _stored_specs(self, name):
        """The tensors of an item as they are stored."""
        specs = [(spec, self._stored.get(spec.key)) for spec in self.items[name]]
        return [
            spec if stored is None else spec._replace(dtypes=(stored[0],), shape=stored[1])
            for spec, stored in specs
        ]

    def _adapting(self, name, read):
        return adapting(read, self._stored, {spec.key: spec.shape for spec in self.items[name]})

    def _check(self, key, tensor):
        """Raises unless a whole tensor's bytes are those that were written."""
        expected = self._checksums.get(key)
        if expected is None:
            return
        found = zlib.crc32(bytes_of(np.ascontiguousarray(tensor)))
        if found != expected:
            raise ChecksumError(
                f"{self.path}: the bytes of {key} are not those that were written: their CRC-32 is "
                f"{found:08x}, expected {expected:08x} as {MANIFEST_NAME} says; copy or convert "
                "the checkpoint again"
            )

    def close(self) -> None:
        """Nothing is kept open."""


def item_path(directory: str, name: str) -> str:
    return os.path.join(directory, "items", name)


def save_item(
    directory: str,
    name: str,
    specs: list[TensorSpec],
    read: Read,
    pool: ThreadPoolExecutor | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Writes one item: complete under its name, or not at all.

    Args:
      specs: its tensors, in the form to be saved. read: gives each of them.

    Returns:
      key -> CRC-32 of the tensor's bytes.
    """
    tree, slices = empty_tree(specs)

    def fetch(spec):
        out = slices[spec.key]
        read(spec.key, out)
        if progress is not None:
            progress(out.nbytes)
        return spec.key, zlib.crc32(bytes_of(out))

    checksums = dict(run_all(pool, fetch, specs))
    final, temporary = item_path(directory, name), item_path(directory, f".{name}.tmp")
    for path in (final, temporary):
        shutil.rmtree(path, ignore_errors=True)
    os.makedirs(temporary)
    _save_tree(temporary, tree)
    os.rename(temporary, final)
    sync_directory(os.path.dirname(final))
    return checksums


def load_item(directory: str, name: str, specs: list[TensorSpec]) -> dict:
    """Restores an item as a tree of numpy arrays of the shapes and dtypes of `specs`."""
    import orbax.checkpoint as ocp  # takes seconds, which official checkpoints need not wait for

    tree, _ = empty_tree(specs)
    wanted = _map_leaves(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    path = item_path(directory, name)
    check_regular_below(path)
    _check_sizes(path, tree, ())
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(os.path.abspath(path), restore_args=wanted)
    except Exception as error:  # Orbax and TensorStore raise whatever the damage leads to
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: cannot be restored ({type(error).__name__}: {reason}); it is damaged or "
            "incomplete, so copy or convert it again"
        ) from error
    _check_same(path, tree, restored, ())
    return restored


def empty_tree(specs: list[TensorSpec]) -> tuple[dict, dict[str, np.ndarray]]:
    """An item's tree of unfilled arrays, and the part of it that each tensor fills."""
    experts = {}
    for spec in specs:
        if spec.expert is not None:
            experts[spec.path] = max(experts.get(spec.path, 0), spec.expert + 1)
    leaves, slices = {}, {}
    for spec in specs:
        path = path_of(spec, spec.path)
        if path not in leaves:
            stack = (experts[spec.path],) if spec.expert is not None else ()
            leaves[path] = np.empty((*stack, *spec.shape), spec.dtype).view(_Owned)
        leaf = leaves[path].view(np.ndarray)
        slices[spec.key] = leaf if spec.expert is None else leaf[spec.expert]
    return unflatten_dict(leaves), slices


def reader(tree: dict, specs: list[TensorSpec]) -> Read:
    """Reads single tensors out of an item's tree."""
    parts = _parts(tree, specs)

    def read(key, out):
        out[...] = parts[key]

    return read


def _parts(tree, specs):
    """Each tensor's part of an item's tree."""
    parts = {}
    for spec in specs:
        leaf = functools.reduce(dict.__getitem__, path_of(spec, spec.path), tree)
        parts[spec.key] = leaf if spec.expert is None else leaf[spec.expert]
    return parts


def write_manifest(
    directory: str, items: dict[str, list[TensorSpec]], weights: str, checksums: dict[str, int]
) -> None:
    """Writes v4jax.json, which makes the directory a checkpoint."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "weights": weights,
        "layers": sum(name.startswith("layer_") for name in items),
        "bytes": sum(spec.nbytes for specs in items.values() for spec in specs),
        "items": {
            name: {
                spec.key: {
                    "dtype": spec.dtypes[0],
                    "shape": list(spec.shape),
                    "crc32": checksums[spec.key],
                }
                for spec in specs
            }
            for name, specs in items.items()
        },
    }
    text = json.dumps(manifest, separators=(",", ":")).encode() + b"\n"
    write_atomically(os.path.join(directory, MANIFEST_NAME), text)


class _Owned(np.ndarray):
    """An array that Orbax need not copy: it copies host arrays in case they change while it
    writes, and here nothing touches them before the save has ended."""

    def __deepcopy__(self, memo):
        return self


def _save_tree(path, tree):
    import orbax.checkpoint as ocp
    from etils import epath

    def chunks(leaf):
        if leaf.ndim == 3 and leaf.nbytes > _CHUNK:
            return ocp.SaveArgs(chunk_byte_size=_CHUNK, shard_axes=(0,))
        return ocp.SaveArgs()

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    save_args = _map_leaves(chunks, tree)
    try:
        handler.save(
            epath.Path(os.path.abspath(path)), args=ocp.args.PyTreeSave(tree, save_args=save_args)
        )
    except ValueError as error:  # TensorStore's errors have no type of their own
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    finally:
        handler.close()


def _map_leaves(function, tree):
    if isinstance(tree, dict):
        return {name: _map_leaves(function, child) for name, child in tree.items()}
    return function(tree)


def _check_sizes(path, tree, names):
    """Raises where an array's files are not there in full, before Orbax stumbles over them."""
    if isinstance(tree, dict):
        for name, child in tree.items():
            _check_sizes(path, child, (*names, name))
        return
    folder = os.path.join(path, ".".join(names))
    found = 0
    if os.path.isdir(folder):
        with os.scandir(folder) as entries:
            found = sum(entry.stat().st_size for entry in entries if entry.name != ".zarray")
    if found != tree.nbytes:
        raise InputError(
            f"{folder}: holds {found} bytes; expected {tree.nbytes}. It is damaged or incomplete, "
            "so copy or convert the checkpoint again"
        )


def _check_same(path, expected, found, names):
    """Raises unless what Orbax gave back has the shapes and dtypes of the manifest."""
    if isinstance(expected, dict):
        if not isinstance(found, dict) or expected.keys() != found.keys():
            raise InputError(f"{path}: {'/'.join(names)} does not hold what v4jax.json says")
        for name in expected:
            _check_same(path, expected[name], found[name], (*names, name))
    elif (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise InputError(
            f"{path}: {'/'.join(names)} is {found.dtype} {list(found.shape)}; expected "
            f"{expected.dtype} {list(expected.shape)} as v4jax.json says"
        )


def _read_manifest(directory):
    """Dtype and shape of each tensor, its checksum, and the manifest's text."""
    path = os.path.join(directory, MANIFEST_NAME)
    text = read_regular(path, MAX_BYTES)
    try:
        manifest = Fields(parse_json(text, path), path)
        kind, version = manifest.string("format"), manifest.integer("version")
        if (kind, version) == (FORMAT, VERSION):
            items = manifest.object("items").of_objects()
            tensors = {key: _tensor(item, key) for item in items.values() for key in item}
            found = {key: (dtype, shape) for key, (dtype, shape, _) in tensors.items()}
            return found, {key: checksum for key, (*_, checksum) in tensors.items()}, text
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise InputError(f"{path}: not a manifest of ours ({reason}); get it again") from None
    raise InputError(
        f"{path}: has format {kind[:60]!r}, version {version}; this v4jax reads {FORMAT!r}, "
        f"version {VERSION}, so use the version that wrote it"
    )


def _tensor(item, key):
    tensor = item.object(key)
    if tensor.string("dtype") not in NUMPY_DTYPES:
        raise tensor.refuse("dtype", f"one of {', '.join(NUMPY_DTYPES)}")
    checksum = tensor.integer("crc32", low=0, high=2**32 - 1)
    return tensor["dtype"], tensor.integers("shape"), checksum
