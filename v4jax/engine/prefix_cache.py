"""Prefixes that were read once: pages and units by the hash of their tokens, in memory and on disk.

A page holds the compressed entries of some consecutive tokens, a unit what else a row's state is
after exactly so many pages: window, open blocks, the draft's part (inference.md, 2.6). Here both
are named arrays of numpy. A prefix is found by a chain of hashes, one a page, and its tokens are
compared once more, so that nothing hangs on the hash alone.
"""

import collections
import dataclasses
import hashlib
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from v4jax.engine.prefix_files import FORMAT, Arrays, PrefixFiles, bytes_of, file_name, tag_of
from v4jax.errors import InputError


class Hit(NamedTuple):
    """What is known of a prompt.

    Attributes:
      length: tokens that need not be read; 0 for none.
      pages, unit: their arrays; None without a hit.
      on_grid: whether a cold reading would have made them bit for bit.
      shared: tokens whose pages are there, which another request has read too.
    """

    length: int = 0
    pages: list[Arrays] | None = None
    unit: Arrays | None = None
    on_grid: bool = True
    shared: int = 0


@dataclasses.dataclass
class _Page:
    arrays: Arrays
    tokens: bytes
    users: int = 0  # units that need it


@dataclasses.dataclass
class _Unit:
    arrays: Arrays
    chain: tuple[bytes, ...]
    on_grid: bool
    tag: str  # of the salt
    used: float  # when, in seconds since the epoch


class PrefixCache:
    """Stored prefixes; may be shared by engines of one model.

    Args:
      memory_bytes: arrays that are kept in memory; the units that were used longest ago go first.
      directory: where prefixes are kept for other processes too; None for nowhere. They hold what
        was said to the model: the directory is made for this user alone.
      disk_bytes: bytes of all files in it; the files that were used longest ago go first.
    """

    def __init__(
        self,
        memory_bytes: int = 1 << 30,
        directory: str | os.PathLike | None = None,
        disk_bytes: int = 16 << 30,
    ):
        for name, value in (("memory_bytes", memory_bytes), ("disk_bytes", disk_bytes)):
            if value < 0:
                raise InputError(f"{name} is {value}; expected 0 or more bytes")
        self._limit = memory_bytes
        self._pages: dict[bytes, _Page] = {}
        self._units: collections.OrderedDict[bytes, _Unit] = collections.OrderedDict()
        self._bytes = 0
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._lock = threading.RLock()
        self._disk = None if directory is None else PrefixFiles(Path(directory), disk_bytes)
        self._identity: str | None = None
        self._page = 0

    def bind(self, identity: str, page: int) -> None:
        """Says whose prefixes these are, before anything else.

        Args:
          identity: text of all that a stored number depends on. page: tokens of a page.

        Raises:
          InputError: another engine has bound it to another model.
        """
        with self._lock:
            if self._identity not in (None, identity):
                raise InputError(
                    "the prefix cache is in use for another model or other settings; give each "
                    "engine its own PrefixCache, or engines of the same model and settings one"
                )
            if self._identity is None:
                self._identity, self._page = identity, page
                if self._disk is not None:
                    self._disk.open(hashlib.sha256(f"{FORMAT}\n{identity}".encode()).hexdigest())

    def lookup(self, tokens: np.ndarray, salt: str = "", exact: bool = False) -> Hit:
        """The longest stored prefix of a prompt that leaves at least one token to read.

        Args:
          tokens: int32 [N]. exact: only units that a cold reading would have made bit for bit.
        """
        with self._lock:
            chain = self._chain(tokens[: len(tokens) - 1], salt)
            there, tag = 0, tag_of(salt)
            while there < len(chain) and self._find_page(chain, there, tokens, tag) is not None:
                there += 1
            for count in range(there, 0, -1):
                unit = self._find_unit(chain[:count], tag)
                if unit is not None and (unit.on_grid or not exact):
                    self._counts["hits"] += 1
                    pages = [self._pages[each].arrays for each in chain[:count]]
                    length, shared = count * self._page, there * self._page
                    hit = Hit(length, pages, unit.arrays, unit.on_grid, shared)
                    break
            else:
                self._counts["misses"] += 1
                hit = Hit(shared=there * self._page)
            self._drop_unused(chain)
            self._evict()
            return hit

    def missing(self, tokens: np.ndarray, salt: str = "") -> list[int] | None:
        """Numbers of a prefix's pages that are not stored; None where all of it is, a unit too."""
        with self._lock:
            chain = self._chain(tokens, salt)
            if chain and chain[-1] in self._units:
                return None
            return [place for place, each in enumerate(chain) if each not in self._pages]

    def store(
        self, tokens: np.ndarray, unit: Arrays, pages: Mapping[int, Arrays], on_grid, salt=""
    ) -> None:
        """Keeps a prefix of whole pages; pages: at least those that were `missing`."""
        with self._lock:
            chain, tag = tuple(self._chain(tokens, salt)), tag_of(salt)
            for place, each in enumerate(chain):
                if each not in self._pages and place not in pages:
                    return  # it was evicted in between
            for place, each in enumerate(chain):
                if each not in self._pages:
                    arrays = dict(pages[place])
                    self._add_page(each, _Page(arrays, self._slice(tokens, place)))
                    name = file_name("page", tag, each)
                    self._write(name, arrays, tokens=self._slice(tokens, place))
                self._pages[each].users += 1
            old = self._units.pop(chain[-1], None)
            if old is not None:
                self._release(old)
            self._units[chain[-1]] = _Unit(dict(unit), chain, bool(on_grid), tag, time.time())
            self._bytes += bytes_of(unit)
            self._counts["stored"] += 1
            self._write(file_name("unit", tag, chain[-1]), unit, on_grid=on_grid)
            self._evict()

    def forget(self, salt: str | None = None, unused_seconds: float | None = None) -> None:
        """Removes prefixes from memory and disk; what a request reads or waits for is not touched.

        Args:
          salt: only those of this salt. unused_seconds: only those that nobody used for so long.
        """
        tag, now = None if salt is None else tag_of(salt), time.time()
        with self._lock:
            for digest, unit in list(self._units.items()):
                old = unused_seconds is None or now - unit.used > unused_seconds
                if old and tag in (None, unit.tag):
                    del self._units[digest]
                    self._release(unit)
        if self._disk is not None:
            self._disk.forget(tag, unused_seconds)

    def stats(self) -> dict[str, int]:
        """Counters, units and bytes in memory, files that were not read or not written."""
        with self._lock:
            disk = {} if self._disk is None else self._disk.stats()
            return self._counts | {"units": len(self._units), "memory_bytes": self._bytes} | disk

    def flush(self) -> None:
        """Waits until what was stored is on disk, or was dropped."""
        if self._disk is not None:
            self._disk.flush()

    def _chain(self, tokens, salt):
        """A digest for each whole page: of it, of all before it, of whose they are."""
        if self._identity is None:
            raise InputError("the prefix cache belongs to no engine yet; give it to one first")
        start = f"{FORMAT}\n{self._identity}\n{salt}".encode()
        digest, chain = hashlib.sha256(start).digest(), []
        for place in range(len(tokens) // self._page):
            digest = hashlib.sha256(digest + self._slice(tokens, place)).digest()
            chain.append(digest)
        return chain

    def _slice(self, tokens, place) -> bytes:
        part = tokens[place * self._page : (place + 1) * self._page]
        return np.ascontiguousarray(part, "<i4").tobytes()

    def _find_page(self, chain, place, tokens, tag):
        page = self._pages.get(chain[place])
        if page is None and self._disk is not None:
            found = self._disk.read(file_name("page", tag, chain[place]))
            if found is not None:
                arrays, about = found
                page = _Page(arrays, bytes.fromhex(about["tokens"]))
                self._add_page(chain[place], page)
        if page is None or page.tokens != self._slice(tokens, place):
            return None
        return page

    def _find_unit(self, chain, tag):
        """The unit at the end of a chain whose pages are all in memory."""
        unit = self._units.get(chain[-1])
        if unit is None and self._disk is not None:
            found = self._disk.read(file_name("unit", tag, chain[-1]))
            if found is not None:
                arrays, about = found
                on_grid = about["on_grid"] == "True"
                unit = _Unit(arrays, tuple(chain), on_grid, tag, time.time())
                self._units[chain[-1]] = unit
                self._bytes += bytes_of(arrays)
                for each in chain:
                    self._pages[each].users += 1
        if unit is not None:
            unit.used = time.time()
            self._units.move_to_end(chain[-1])
        return unit

    def _add_page(self, digest, page):
        self._pages[digest] = page
        self._bytes += bytes_of(page.arrays)

    def _evict(self):
        while self._bytes > self._limit and self._units:
            _, unit = self._units.popitem(last=False)
            self._counts["evicted"] += 1
            self._release(unit)

    def _release(self, unit):
        self._bytes -= bytes_of(unit.arrays)
        for each in unit.chain:
            self._pages[each].users -= 1
        self._drop_unused(unit.chain)

    def _drop_unused(self, digests):
        """Pages that no unit needs, such as those that a look-up has read from disk in vain."""
        for each in digests:
            page = self._pages.get(each)
            if page is not None and page.users == 0:
                self._bytes -= bytes_of(page.arrays)
                del self._pages[each]

    def _write(self, name, arrays, **about):
        if self._disk is not None:
            self._disk.write(name, arrays, about)


_COUNTS = ("hits", "misses", "stored", "evicted")
