"""A checkpoint being written, item after item; it looks whole only once `finish` has run.

Both kinds offer the same: `items`, `write_item`, `open_item` to read one back, and `finish`.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from v4jax.checkpoints import orbax as orbax_io
from v4jax.checkpoints.fit import refuse_mixed
from v4jax.checkpoints.source import CONFIG_NAME, Read, converting
from v4jax.config import ModelConfig
from v4jax.files.atomic import write_atomically
from v4jax.files.safetensors import NewTensor, SafetensorsFile, write_index, write_safetensors
from v4jax.hf.config import to_hf
from v4jax.hf.tensors import TensorSpec, transformers_key

TARGETS = ("official", "transformers", "orbax")


class FolderTarget:
    """A folder of safetensors files: one for each item, an index and config.json at the end.

    Args:
      file_key: what the files call the tensor that officially has a key.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        items: dict[str, list[TensorSpec]],
        file_key: Callable[[str], str] = str,
    ):
        self.path = os.fspath(path)
        self.items = items
        self.file_key = file_key
        count = len(items)
        self.files = {
            name: f"model-{i:05d}-of-{count:05d}.safetensors" for i, name in enumerate(items, 1)
        }

    def write_item(
        self,
        name: str,
        read: Read,
        pool: ThreadPoolExecutor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, int]:
        """Writes one file, or nothing; returns the CRC-32 of each tensor's bytes."""
        specs = {self.file_key(spec.key): spec for spec in self.items[name]}
        tensors = [NewTensor(key, spec.dtypes[0], spec.shape) for key, spec in specs.items()]

        def fill(key, out):
            read(specs[key].key, out.view(specs[key].dtype))

        written = write_safetensors(self._file(name), tensors, fill, pool, progress)
        return {specs[key].key: checksum for key, checksum in written.items()}

    def has_item(self, name: str) -> bool:
        return os.path.isfile(self._file(name))

    @contextlib.contextmanager
    def open_item(self, name: str) -> Iterator[Read]:
        with SafetensorsFile(self._file(name)) as file:
            yield lambda key, out: file.read_into(self.file_key(key), out)

    def finish(self, config_text: bytes, weights: str, checksums: dict[str, int]) -> None:
        """Writes what makes the directory a checkpoint."""
        specs = [(name, spec) for name, specs in self.items.items() for spec in specs]
        write_atomically(os.path.join(self.path, CONFIG_NAME), config_text)
        write_index(
            self.path,
            {self.file_key(spec.key): self.files[name] for name, spec in specs},
            sum(spec.nbytes for _, spec in specs),
        )

    def _file(self, name):
        return os.path.join(self.path, self.files[name])


class OrbaxTarget:
    """Our Orbax format, described in `orbax`."""

    def __init__(self, path: str | os.PathLike, items: dict[str, list[TensorSpec]]):
        self.path = os.fspath(path)
        self.items = items
        for specs in items.values():
            leaves = {}
            for spec in specs:
                part = () if spec.part == "array" else (spec.part,)
                leaves.setdefault((*spec.path, *part), []).append(spec)
            cure = "write official files (--to=official), or expand them (--weights=bf16)"
            refuse_mixed(leaves, self.path, cure)

    def write_item(
        self,
        name: str,
        read: Read,
        pool: ThreadPoolExecutor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, int]:
        """Writes one item, or nothing; returns the CRC-32 of each tensor's bytes."""
        return orbax_io.save_item(self.path, name, self.items[name], read, pool, progress)

    def has_item(self, name: str) -> bool:
        return os.path.isdir(orbax_io.item_path(self.path, name))

    @contextlib.contextmanager
    def open_item(self, name: str) -> Iterator[Read]:
        specs = self.items[name]
        yield orbax_io.reader(orbax_io.load_item(self.path, name, specs), specs)

    def finish(self, config_text: bytes, weights: str, checksums: dict[str, int]) -> None:
        """Writes what makes the directory a checkpoint."""
        write_atomically(os.path.join(self.path, CONFIG_NAME), config_text)
        orbax_io.write_manifest(self.path, self.items, weights, checksums)


def target_of(
    to: str, path: str | os.PathLike, items: dict[str, list[TensorSpec]]
) -> FolderTarget | OrbaxTarget:
    """A target of one of the `TARGETS`."""
    if to == "orbax":
        return OrbaxTarget(path, items)
    return FolderTarget(path, items, transformers_key if to == "transformers" else str)


def copy_item(
    source,
    target: FolderTarget | OrbaxTarget,
    name: str,
    pool: ThreadPoolExecutor | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Writes one item of a source in the target's form; nothing of it stays in memory."""
    with source.open_item(name) as read:
        return target.write_item(name, converting(source, name, read), pool, progress)


def config_json(config: ModelConfig) -> bytes:
    """The text of an official config.json."""
    return json.dumps(to_hf(config), indent=2).encode() + b"\n"
