"""Checkpoints into a model's variables and back: `load`, `save_official`, `save_orbax`.

Formats: official and transformers safetensors (`source`, `weights`), and our Orbax format, which
is described at the top of `orbax`. One item (a layer) is read at a time, straight into the
stacked arrays that the model scans over.
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, overload

import jax

from v4jax.checkpoints import hub
from v4jax.checkpoints.leaves import aligned, planned, variables_of
from v4jax.checkpoints.orbax import OrbaxSource
from v4jax.checkpoints.shards import ShardedLeaf, fill_leaves, identity
from v4jax.checkpoints.source import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    Announced,
    FolderSource,
    converting,
    planned_items,
)
from v4jax.checkpoints.streamed import StreamedWeights
from v4jax.checkpoints.target import FolderTarget, OrbaxTarget, config_json, copy_item
from v4jax.checkpoints.variables import VariablesSource
from v4jax.config import ModelConfig, Segment, segments
from v4jax.errors import InputError
from v4jax.files.safetensors import INDEX_NAME, SINGLE_NAME
from v4jax.files.threads import run_all
from v4jax.model import sharded
from v4jax.model.transformer import Transformer
from v4jax.sharding import processes
from v4jax.sharding.rules import ONE_DEVICE, Layout
from v4jax.streamed.model import StreamedTransformer

THREADS = 8


@overload
def load(
    path: str | os.PathLike,
    dtype: str | None = None,
    weights: str = "stored",
    numerics: str | None = None,
    shards: Layout = ONE_DEVICE,
    verify: bool = True,
    announced: Announced | None = None,
    stream: Literal[False] = False,
    **options: Any,
) -> tuple[Transformer, dict[str, Any]]: ...


@overload
def load(
    path: str | os.PathLike,
    dtype: str | None = None,
    weights: str = "stored",
    numerics: str | None = None,
    shards: Layout = ONE_DEVICE,
    verify: bool = True,
    announced: Announced | None = None,
    *,
    stream: Literal[True],
    layers: int | None = None,
    **options: Any,
) -> tuple[StreamedTransformer, StreamedWeights]: ...


def load(
    path,
    dtype=None,
    weights="stored",
    numerics=None,
    shards=ONE_DEVICE,
    verify=True,
    announced=None,
    stream=False,
    layers=None,
    **options,
):
    """Builds a model and loads its weights.

    Args:
      path: a directory (official, transformers or our Orbax format); "nano", which comes with
        the package; a snapshot or a `models--org--name` directory of the hub's local cache, or the
        id `org/name` of a model in it.
      dtype: of the activations; None for the checkpoint's own.
      weights: "stored" keeps FP8 and FP4 matrices as they are, as `quant.QTensor`s; "bf16" and
        "float32" expand them.
      numerics: None, or "native" for the official low-precision rounding.
      shards: a mesh and strategy for the model to run on. Each process then reads only the bytes
        that its devices hold; draft blocks that are only passed on are left out.
      verify: in our Orbax format, hold every tensor that is read whole against its checksum, which
        takes 0.3 s for each GB and core.
      announced: what `source.read_announced` found, where the caller has read config.json.
      stream: leave the weights on disk, for a model larger than memory. In place of variables an
        open `StreamedWeights` comes, from which each call of the model reads what it needs; see
        `streamed.model.StreamedTransformer`. One device, no MTP blocks.
      layers: with stream, run the first so many layers only, then norm and head.
      **options: further fields of `Transformer`, such as `min_repeats`.

    Returns:
      The model and its variables. `model.source` is the directory, for a tokenizer beside it.

    Raises:
      InputError: damaged or incomplete files, or tensors that are not those of the config.
    """
    if stream:
        return _stream(path, dtype, weights, numerics, shards, verify, announced, layers, options)
    if layers is not None:
        raise InputError(f"layers is {layers} without stream; expected it with stream=True alone")
    with open_checkpoint(path, verify, announced) as source:
        items = planned_items(source, weights)
        model = Transformer(
            source.config,
            dtype=dtype,
            numerics=numerics,
            sharding=shards,
            source=os.path.abspath(source.path),
            **options,
        )
        model.execution()  # a wrong dtype or numerics shows before gigabytes are read
        if shards.mesh is None:
            return model, _fill(source, items, model.segments())
        sharded.check(model.config, shards)
        if processes.count() > 1:
            processes.agree("the checkpoint", identity(source) | {"weights": weights})
        return model, _fill_mesh(source, items, model)


from_pretrained = load
"""`load`, by the name that people type."""


def _stream(path, dtype, weights, numerics, shards, verify, announced, layers, options):
    """The model and the open checkpoint of `load(..., stream=True)`."""
    if shards.mesh is not None:
        raise InputError("stream=True came with a mesh; expected one device: leave shards out")
    unknown = sorted(options.keys() - {"kernels"})
    if unknown:
        raise InputError(f"stream=True came with {unknown[0]}; expected no option but kernels")
    source = _opened(path, verify, announced)
    try:
        reader = StreamedWeights(source, planned_items(source, weights), layers)
        config = reader.config
        # Unrolled: each layer has programs and a cache of its own.
        options |= {"min_repeats": len(config.layers) + 1, "source": os.path.abspath(source.path)}
        model = Transformer(config, dtype, numerics, **options)
        model.execution()
    except BaseException:
        source.close()
        raise
    return StreamedTransformer(model), reader


def load_variables(
    path: str | os.PathLike, weights: str = "stored", min_repeats: int = 4
) -> tuple[ModelConfig, dict[str, Any]]:
    """The config and the variables of a checkpoint, as `load` makes them, without a model."""
    with open_checkpoint(path) as source:
        items = planned_items(source, weights)
        return source.config, _fill(source, items, segments(source.config.layers, min_repeats))


def load_scales(path: str | os.PathLike, min_repeats: int = 4) -> dict[str, Any]:
    """The scales of a checkpoint's quantised params at the params' paths, without their values.

    Empty where nothing is quantised. Leading axes (layers, experts) are those of the params.
    """
    with open_checkpoint(path) as source:
        items = {
            item: [spec for spec in specs if spec.role == "scale" and spec.path[0] == "params"]
            for item, specs in planned_items(source, "stored").items()
        }
        cut = segments(source.config.layers, min_repeats)
        return _scales_alone(_fill(source, items, cut)["params"])


@contextlib.contextmanager
def open_checkpoint(
    path: str | os.PathLike, verify: bool = True, announced: Announced | None = None
) -> Iterator[FolderSource | OrbaxSource]:
    """Opens a checkpoint of any format for reading; see `source`, and `load` for the arguments."""
    with contextlib.closing(_opened(path, verify, announced)) as source:
        yield source


def _opened(path, verify, announced):
    path = locate(path)
    check_finished(path)
    whole = os.path.exists(os.path.join(path, MANIFEST_NAME))
    return OrbaxSource(path, verify, announced) if whole else FolderSource(path, announced)


def check_finished(path: str | os.PathLike) -> None:
    """Refuses a directory into which a conversion has not ended."""
    if os.path.exists(os.path.join(path, JOURNAL_NAME)):
        raise InputError(
            f"{path}: the conversion into this directory has not ended; run the same v4jax convert "
            "again, and it goes on where it stopped"
        )


def locate(path: str | os.PathLike) -> str:
    """The directory of a checkpoint: where "nano" lies in the package, or as `hub.cached` finds it.

    Raises:
      InputError: the id of a model that is not in the hub's local cache.
    """
    if os.fspath(path) != "nano":
        return hub.cached(os.fspath(path))
    return str(Path(__file__).parents[1] / "data" / "nano")


def save_official(
    path: str | os.PathLike, config: ModelConfig, variables: Mapping[str, Any]
) -> None:
    """Writes variables as an official checkpoint, in the form in which they are.

    Args:
      path: a directory without a checkpoint; made if need be.
      config: the model's; how weights are stored is taken from the variables.
      variables: as `load` returns them, whatever `min_repeats` cut them; control tensors
        (hyper-connections, sinks, biases) are written in float32.

    Raises:
      InputError: a checkpoint is there already, or variables that are not the config's.
    """
    _save(FolderTarget, path, config, variables)


def save_orbax(path: str | os.PathLike, config: ModelConfig, variables: Mapping[str, Any]) -> None:
    """Writes variables in our Orbax format; as `save_official` otherwise."""
    _save(OrbaxTarget, path, config, variables)


def _save(kind, path, config, variables):
    path = os.fspath(path)
    taken = [
        name
        for name in (INDEX_NAME, SINGLE_NAME, MANIFEST_NAME, JOURNAL_NAME)
        if os.path.exists(os.path.join(path, name))
    ]
    if taken:
        raise InputError(f"{path}: holds a checkpoint ({taken[0]}); choose a new directory")
    source = VariablesSource(config, variables)
    target = kind(path, source.items)
    checksums = {}
    try:
        os.makedirs(path, exist_ok=True)
        with ThreadPoolExecutor(THREADS) as pool:
            for item in source.items:
                checksums |= copy_item(source, target, item, pool)
        target.finish(config_json(source.config), "stored", checksums)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def _fill(source, items, cut: tuple[Segment, ...]):
    """Reads all items into the variables' arrays; each goes to the device once it is complete."""
    leaves, places = planned(source.path, items, cut)
    buffers = {where: aligned(*leaf.form()) for where, leaf in leaves.items()}
    done = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for item, specs in items.items():
            _fill_item(source, item, specs, buffers, places, pool)
            for where in {places[spec.key][0] for spec in specs}:
                if leaves[where].specs[-1].item == item:
                    done[where] = _to_device(buffers.pop(where))
    return variables_of(done)


def _fill_item(source, item, specs, buffers, places, pool):
    with source.open_item(item) as read:
        convert = converting(source, item, read)

        def fetch(spec):
            where, repeat = places[spec.key]
            out = buffers[where]
            out = out if repeat is None else out[repeat]
            convert(spec.key, out if spec.expert is None else out[spec.expert])

        run_all(pool, fetch, specs)


def _fill_mesh(source, items, model):
    """As `_fill`, onto the model's mesh."""
    leaves_of_mesh, where_of = planned(source.path, items, model.segments())
    shardings = sharded.variable_shardings(model)
    leaves, places, last_items = {}, {}, {}
    for where, leaf in leaves_of_mesh.items():
        if where[0] == "carried":
            continue
        quantized = leaf.specs[0].part != "array"
        path = where[:-1] if quantized else where
        sharding = functools.reduce(dict.__getitem__, path, shardings)
        leaves[where] = ShardedLeaf(where, *leaf.form(), sharding, aligned)
        last_items[where] = leaf.specs[-1].item
        for spec in leaf.specs:
            indices = (where_of[spec.key][1], spec.expert)
            places[spec.key] = (where, tuple(i for i in indices if i is not None))
    return variables_of(fill_leaves(source, items, leaves, places, last_items))


def _to_device(array):
    # Without 64-bit types jax would narrow what is only carried along.
    wide = array.dtype.itemsize == 8
    return array if wide else jax.device_put(array)


def _scales_alone(node):
    if not isinstance(node, dict):
        return node
    if node.keys() == {"scales"}:
        return node["scales"]
    return {name: _scales_alone(child) for name, child in node.items()}
