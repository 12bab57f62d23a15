"""Compiled programs on disk: a later process that asks for the same neither traces nor compiles.

JAX's own compilation cache spares the compiler, but it is asked with a traced program, and tracing
a model takes seconds. Here the key is all that a program follows from: this package's sources, the
versions of what compiles, settings, the device, the model and the arguments' types and shapes.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

import v4jax
from v4jax.files.store import Store
from v4jax.model.transformer import Transformer

LIMIT = 256 << 20  # bytes; the three programs of the packaged model take some 4 MB
_PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "V4JAX_BLOCKS")
# Settings that change no program, by their names' beginnings.
_FREE = (
    "jax_compilation_cache",
    "jax_enable_compilation_cache",
    "jax_persistent_cache",
    "jax_platforms",
    "jax_log",
)


class Program(NamedTuple):
    """A jitted function with what it is called with.

    Attributes:
      name: for people, and among the programs of one call of `generate`.
      function, model: the function and its static argument.
      arguments: the others; shapes may stand for arrays.
      like: has the structure of what the function returns.
    """

    name: str
    function: Any
    model: Any
    arguments: tuple[Any, ...]
    like: Any


# Any option has JAX ask the compiler; this one is the compiler's own default.
_ASK: dict[str, str | bool] = {"xla_dump_hlo_as_text": False}


class Executables:
    """The compiled programs of a folder: those of `Transformer`s on one device, no others."""

    def __init__(self, directory: str | os.PathLike):
        self._store = Store(directory, LIMIT)
        self._loaded: dict[str, jax.stages.Compiled] = {}

    def find(self, program: Program) -> jax.stages.Compiled | None:
        """The program, ready to be called with its arguments; None where it was not kept."""
        device = _device(program)
        if device is None:
            return None
        key = _key(program, device)
        if key not in self._loaded:
            content = self._store.read(key)
            loaded = None if content is None else _load(content, program, device)
            if loaded is None:
                return None
            self._loaded[key] = loaded
        return self._loaded[key]

    def keeps(self, program: Program) -> bool:
        """Whether the program is of the kind that is kept."""
        return _device(program) is not None

    def compile(self, program: Program, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Compiles a program and keeps it; to be called inside `asking_the_compiler`."""
        compiled = lowered.compile(compiler_options=_ASK)
        structure: Any = jax.tree.structure(program.like)
        if structure != compiled.out_tree:
            return compiled
        with contextlib.suppress(Exception):  # whatever a backend raises that cannot do it
            content, _, _ = serialize_executable.serialize(compiled)
            self._store.write(_key(program, _device(program)), content)
        return compiled


@contextlib.contextmanager
def asking_the_compiler() -> Iterator[None]:
    """Nothing that its body compiles is read from JAX's own cache.

    XLA:CPU writes a program that it has read without its code: it loads again and cannot run.
    """
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which remembers whether it is in use
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


@functools.cache
def executables_of(directory: str) -> Executables:
    """The compiled programs of a folder; those that were read stay loaded."""
    return Executables(directory)


def _load(content, program, device):
    """The program, or None where JAX cannot read it."""
    in_tree = jax.tree.structure((program.arguments, {}))
    out_tree = jax.tree.structure(program.like)
    try:
        return serialize_executable.deserialize_and_load(
            content, in_tree, out_tree, device.client, [device]
        )
    except Exception:  # JAX and XLA raise whatever another version's bytes lead to
        return None


def _device(program):
    """The one device that the program's arrays are on; None where it is not to be kept."""
    if type(program.model) is not Transformer or program.model.sharding.mesh is not None:
        return None
    if not jax.sharding.get_abstract_mesh().empty:
        return None
    arrays = [leaf for leaf in jax.tree.leaves(program.arguments) if isinstance(leaf, jax.Array)]
    devices = set().union(*(array.devices() for array in arrays))
    return devices.pop() if len(devices) == 1 else None


def _key(program, device):
    """A digest of all that the compiled program follows from."""
    leaves, tree = jax.tree.flatten(program.arguments)
    types = [(str(kind), getattr(kind, "weak_type", None)) for kind in map(jax.typeof, leaves)]
    asked = (
        program.name,
        repr(program.model),
        str(tree),
        types,
        _settings(),
        _machine(device),
        _software(),
    )
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _settings():
    """Whatever may be set that changes a program."""
    # The attribute knows of `with jax.enable_x64(...)` and the like; some settings have none.
    values = {
        name: repr(getattr(jax.config, name, value)) for name, value in jax.config.values.items()
    }
    own = {name: value for name, value in values.items() if not name.startswith(_FREE)}
    environment = {name: os.environ.get(name) for name in _VARIABLES}
    return own | environment | {"blocks": _digest_of(environment["V4JAX_BLOCKS"])}


def _digest_of(path):
    try:
        return path and hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None


def _machine(device):
    """The device; of a CPU also its instructions and how many cores share the work."""
    about = [device.platform, device.device_kind, device.client.platform_version, device.id]
    if device.platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        about += [_instructions(), os.cpu_count(), cores]
    return about


@functools.cache
def _instructions():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kinds = ("flags", "Features", "model name", "CPU part")
    return sorted({line for line in lines if line.startswith(kinds)})


@functools.cache
def _software():
    """Versions, and a digest of this package's sources: they change without a version's change."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    digest = hashlib.sha256()
    root = Path(v4jax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return [v4jax.__version__, sys.version, versions, digest.hexdigest()]
