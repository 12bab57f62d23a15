"""Converts checkpoints, one layer in memory at a time; killed, it goes on where it stopped.

From official, transformers or our Orbax format to any of the three, with the weights as stored or
expanded to bf16 or float32; `copy_plan` says what a target holds of its source. The target looks
whole only when all of it has been written, read back and compared: until then it holds a journal,
and neither index nor manifest.

Several processes (`sharding.processes`) share the items of a conversion among them and write into
one directory on a disk that all can reach; process 0 begins and finishes it. The bytes of the
target are the same.
"""

import dataclasses
import functools
import os
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from v4jax.checkpoints.copy_plan import copy_plan
from v4jax.checkpoints.journal import Journal
from v4jax.checkpoints.load import THREADS, locate, open_checkpoint
from v4jax.checkpoints.source import JOURNAL_NAME, MANIFEST_NAME, converting, say_notes
from v4jax.checkpoints.target import TARGETS, copy_item, target_of
from v4jax.errors import InputError
from v4jax.files.atomic import write_atomically
from v4jax.files.json_reader import quote
from v4jax.files.regular import read_regular
from v4jax.files.safetensors import INDEX_NAME, SINGLE_NAME, bytes_of
from v4jax.files.threads import run_all
from v4jax.files.writing import possible_directory
from v4jax.hf.config import to_hf
from v4jax.sharding import processes

# Files that belong to a checkpoint next to its weights and config.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "LICENSE",
)
# What headers, manifest and the file system's blocks take beyond the tensors' bytes.
_SPARE = 1 << 20
_SPARE_PER_TENSOR = 4096


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion or comparison did.

    Attributes:
      done: "converted" or "compared". tensors, nbytes: of the target. seconds: wall time.
      resumed: items that an earlier run had finished.
    """

    done: str
    tensors: int
    nbytes: int
    seconds: float
    resumed: int = 0

    def __str__(self):
        rate = self.nbytes / max(self.seconds, 1e-9) / 1e6
        earlier = f", {self.resumed} items from an earlier run" if self.resumed else ""
        return (
            f"{self.done} {self.tensors:,} tensors, {self.nbytes:,} bytes in {self.seconds:.1f} s "
            f"({rate:.0f} MB/s{earlier})"
        )


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str,
    weights: str = "stored",
    verify: bool = False,
    progress: bool = True,
) -> Report:
    """Converts a checkpoint, or compares two.

    Args:
      source: official, transformers or Orbax directory, or "nano".
      target: a new or empty directory, or one in which the same conversion was interrupted.
      to: "official", "transformers" or "orbax".
      weights: "stored", "bf16" or "float32". Stored FP8 and FP4 become numbers of the config's
        dtype in transformers' form, which has neither.
      verify: compare every tensor of the two checkpoints, and convert only if the target is not
        there yet. (A conversion always reads its target back and compares checksums.)
      progress: a bar with bytes and time left, on stderr.

    Raises:
      InputError: a damaged source, a target that cannot be used, a model that transformers cannot
        run, a full disk, or a difference.
    """
    if to not in TARGETS:
        raise InputError(f"to is {to!r}; expected one of {', '.join(TARGETS)}")
    source, target = locate(source), os.fspath(target)
    _check_apart(source, target)
    task = _Task(source, target, to, weights, progress)
    started = time.monotonic()
    try:
        with open_checkpoint(source) as opened:
            processes.agree(
                "the conversion", {"config": to_hf(opened.config), "to": to, "weights": weights}
            )
            conversion, report = _Conversion(opened, task), None
            if processes.index() == 0:
                say_notes(target, conversion.plan.notes)
            if not (verify and _is_whole(target)):
                report = conversion.run()
            if verify:
                compared = _compare(opened, task, conversion.items)
                report = report or compared
    except OSError as error:
        raise InputError(
            f"{target}: {error.strerror}; mend this and run the same command again: it goes on "
            "where it stopped"
        ) from error
    return dataclasses.replace(report, seconds=time.monotonic() - started)


@dataclasses.dataclass(frozen=True)
class _Task:
    """What `convert` was asked for."""

    source: str
    target: str
    to: str
    weights: str
    progress: bool


class _Conversion:
    """One run, from the first check of the target to its last file."""

    def __init__(self, source, task):
        self.source, self.path, self.weights = source, task.target, task.weights
        self.task = task
        self.plan = copy_plan(source, task.to, task.weights)
        self.items = self.plan.items
        self.target = target_of(task.to, task.target, self.items)
        self.purpose = {
            "source": os.path.realpath(source.path),
            "to": task.to,
            "weights": task.weights,
            "content": source.fingerprint,
        }

    def run(self) -> Report:
        process, count = processes.index(), processes.count()
        journal = self._begin() if process == 0 else None
        # Process 0 knows what an earlier run has finished, and which of it is still there.
        resumed = processes.gathered(self._resumed(journal))[0]
        if count == 1:
            self.work(journal, resumed, (0, 1))
        else:
            # Orbax lets process 0 of a joined program write alone, so each writes from outside.
            task = dataclasses.replace(self.task, progress=self.task.progress and process == 0)
            processes.run_outside(_convert_part, task, resumed, (process, count))
        processes.barrier("items written")
        if process == 0:
            journal.take_in()
            self._finish({k: v for name in self.items for k, v in journal.done[name].items()})
            journal.close()
        processes.barrier("conversion finished")
        nbytes = self._bytes(self.items)
        tensors = sum(len(specs) for specs in self.items.values())
        return Report("converted", tensors, nbytes, 0.0, len(resumed))

    def work(self, journal, resumed, part):
        """Writes and reads back a part of the items: every n-th from the i-th, for (i, n)."""
        missing = _share([name for name in self.items if name not in resumed], part)
        done = {name: resumed[name] for name in _share(resumed, part)}
        with ThreadPoolExecutor(THREADS) as pool:
            self._write(pool, journal, missing, done)
            self._read_back(pool, done | {name: journal.done[name] for name in missing})

    def _begin(self):
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise InputError(f"{self.path}: is a file; expected a new directory for the target")
        possible_directory(self.path, "target")
        # Before the journal is made, so that a full disk leaves nothing behind.
        if not os.path.exists(os.path.join(self.path, JOURNAL_NAME)):
            self._check_space(self.items)
        journal = Journal(self.path, self.purpose)
        self._check_journal(journal.done)
        self._check_space([name for name in self.items if name not in journal.done])
        return journal

    def _check_journal(self, done):
        """Refuses what no earlier run of this conversion has noted down."""
        for name, checksums in done.items():
            expected = {spec.key for spec in self.items.get(name, ())}
            if not expected or checksums.keys() != expected:
                raise InputError(
                    f"{self.path}: {JOURNAL_NAME} names other tensors of {quote(name)} than this "
                    "conversion writes; remove the directory and start the conversion again"
                )

    def _resumed(self, journal):
        """Checksums of the items that an earlier run has written."""
        done = {} if journal is None else journal.done
        return {name: done[name] for name in done if self.target.has_item(name)}

    def _write(self, pool, journal, names, done):
        with self._bar("writing", [*names, *done], self._bytes(done)) as bar:
            for name in names:
                bar.set_postfix_str(name)
                self._check_space([name])  # others may have filled the disk meanwhile
                journal.add(name, copy_item(self.source, self.target, name, pool, bar.update))

    def _read_back(self, pool, written):
        """Compares what is on disk with what was written."""
        with self._bar("verifying", written) as bar:
            for name, checksums in written.items():
                bar.set_postfix_str(name)
                self._read_back_item(name, pool, checksums, bar)

    def _read_back_item(self, name, pool, checksums, bar):
        with self.target.open_item(name) as read:
            check = functools.partial(_check_bytes, self.path, read, checksums, bar)
            run_all(pool, check, self.items[name])

    def _finish(self, checksums):
        for name in COMPANIONS:
            path = os.path.join(self.source.path, name)
            if os.path.exists(path):
                write_atomically(os.path.join(self.path, name), read_regular(path))
        self.target.finish(self.plan.config_text, self.weights, checksums)

    def _check_space(self, names):
        count = sum(len(self.items[name]) for name in names)
        needed = self._bytes(names) + _SPARE + _SPARE_PER_TENSOR * count
        folder = os.path.abspath(self.path)
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise InputError(
                f"{self.path}: the conversion needs {needed:,} bytes and {free:,} are free there; "
                "free some space or choose another disk"
            )

    def _bytes(self, names):
        return sum(spec.nbytes for name in names for spec in self.items[name])

    def _bar(self, what, names, initial=0):
        return _bar(what, self._bytes(names), initial, self.task.progress)


def _convert_part(task, resumed, part):
    """One process's part of the items; its journal is next to that of the whole."""
    with open_checkpoint(task.source) as opened:
        conversion = _Conversion(opened, task)
        journal = Journal(task.target, conversion.purpose, 1 + part[0])
        conversion.work(journal, resumed, part)


def _share(names, part):
    return list(names)[part[0] :: part[1]]


def _compare(source, task, expected) -> Report:
    """Reads both checkpoints and compares every tensor, bit by bit."""
    process, count = processes.index(), processes.count()
    if count == 1:
        _compare_part(source, task, expected, (0, 1))
    else:
        task = dataclasses.replace(task, progress=task.progress and process == 0)
        processes.run_outside(_reopen_and_compare, task, (process, count))
    processes.barrier("compared")
    total = sum(spec.nbytes for specs in expected.values() for spec in specs)
    return Report("compared", sum(len(specs) for specs in expected.values()), total, 0.0)


def _reopen_and_compare(task, part):
    with open_checkpoint(task.source) as source:
        _compare_part(source, task, copy_plan(source, task.to, task.weights).items, part)


def _compare_part(source, task, expected, part):
    with open_checkpoint(task.target, verify=False) as other:  # compared bit by bit
        _check_same_tensors(expected, other.items, source.path, task.target, task.weights)
        names = _share(expected, part)
        total = sum(spec.nbytes for name in names for spec in expected[name])
        with (
            ThreadPoolExecutor(THREADS) as pool,
            _bar("comparing", total, 0, task.progress) as bar,
        ):
            for name in names:
                bar.set_postfix_str(name)
                _compare_item(source, other, name, expected[name], pool, bar)


def _compare_item(source, other, name, specs, pool, bar):
    with source.open_item(name) as ours, other.open_item(name) as theirs:
        convert = converting(source, name, ours)
        run_all(pool, functools.partial(_compare_one, other.path, convert, theirs, bar), specs)


def _check_bytes(path, read, checksums, bar, spec):
    out = np.empty(spec.shape, spec.dtype)
    read(spec.key, out)
    if zlib.crc32(bytes_of(out)) != checksums[spec.key]:
        raise InputError(
            f"{path}: {spec.key} does not read back as it was written; the disk is unreliable, so "
            "remove the directory and convert to another one"
        )
    bar.update(out.nbytes)


def _compare_one(target, ours, theirs, bar, spec):
    left, right = np.empty(spec.shape, spec.dtype), np.empty(spec.shape, spec.dtype)
    ours(spec.key, left)
    theirs(spec.key, right)
    if not np.array_equal(bytes_of(left), bytes_of(right)):
        differing = int(np.count_nonzero(bytes_of(left) != bytes_of(right)))
        raise InputError(
            f"{target}: {spec.key} differs from the source in {differing} of {left.nbytes} bytes; "
            "remove the directory and convert again"
        )
    bar.update(left.nbytes)


def _check_same_tensors(expected, found, source, target, weights):
    left = {spec.key: (spec.dtypes, spec.shape) for specs in expected.values() for spec in specs}
    right = {spec.key: (spec.dtypes, spec.shape) for specs in found.values() for spec in specs}
    for key in sorted(left.keys() | right.keys()):
        if left.get(key) != right.get(key):
            raise InputError(
                f"{target}: {key} is {_words(right.get(key))}; expected {_words(left.get(key))}, "
                f"as {source} has it with --weights={weights}"
            )


def _words(tensor):
    return "missing" if tensor is None else f"{tensor[0][0]} {list(tensor[1])}"


def _check_apart(source, target):
    paths = [os.path.realpath(source), os.path.realpath(target)]
    if paths[0] == paths[1]:
        raise InputError(f"{target}: is source and target; choose another directory to convert to")
    if os.path.commonpath(paths) == paths[0]:
        raise InputError(f"{target}: lies inside the source; choose a directory outside it")
    if os.path.commonpath(paths) == paths[1]:
        raise InputError(f"{target}: the source lies inside it; choose another directory")


def _is_whole(target):
    names = os.listdir(target) if os.path.isdir(target) else ()
    whole = {INDEX_NAME, SINGLE_NAME, MANIFEST_NAME} & set(names)
    return bool(whole) and JOURNAL_NAME not in names


def _bar(what, total, initial, shown):
    return tqdm(
        desc=what,
        total=total,
        initial=initial,
        unit="B",
        unit_scale=True,
        disable=None if shown else True,  # None: not into pipes
        mininterval=0.5,
    )
