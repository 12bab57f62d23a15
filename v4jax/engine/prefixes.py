"""Prefixes of an engine's rows: restored before a prompt is read, stored while it is and after.

Where a unit is taken the model has run exactly so many whole pages: chunks end there, and rounds
of drafts do not run past there.
"""

import dataclasses
import json
from typing import Any

import jax
import numpy as np

from v4jax.engine import slots
from v4jax.engine.functions import Row
from v4jax.engine.prefix_cache import Hit, PrefixCache
from v4jax.engine.processes import Leader
from v4jax.engine.programs import Programs
from v4jax.engine.speculate import Lane
from v4jax.infer.cache_file import identity

EVERY = 32  # pages between units of a long prompt; from FAR tokens on eight times as many
FAR = 65536


@dataclasses.dataclass
class Taken:
    """A unit that was taken: its arrays may still be on their way from the device."""

    tokens: np.ndarray
    rest: Any
    pages: dict[int, Any]
    on_grid: bool
    salt: str


class Prefixes:
    """What of an engine's rows is stored where.

    Args:
      cache: where; it is bound to this model and these settings.
      programs, chunk, exact: the engine's. draft: its kind, or None.
      weights: the fingerprint of the model's variables.

    Raises:
      InputError: the cache is bound to another model.
    """

    def __init__(
        self,
        cache: PrefixCache,
        programs: Programs | Leader,
        model,
        weights,
        chunk,
        exact,
        draft,
    ):
        self._cache, self._programs, self._exact = cache, programs, exact
        self._chunk, self.page = chunk, slots.page_tokens(model.config)
        page, rest = programs.described
        self._page_tree, self._rest_tree = jax.tree.structure(page), jax.tree.structure(rest)
        self._page_names, self._rest_names = _names(page), _names(rest)
        about = {
            "model": identity(model),
            "weights": weights,
            "kernels": model.kernels,
            "min_repeats": model.min_repeats,
            "page": [str(x) for x in jax.tree.leaves(page)],
            "chunk": chunk,
            "backend": jax.default_backend(),
            "draft": draft,
        }
        self._cache.bind(json.dumps(about, sort_keys=True), self.page)
        self._due: list[Taken] = []

    def restore(self, tokens, salt, row: Row) -> tuple[Row, Hit]:
        """The row with the longest stored prefix, and what was found."""
        hit = self._cache.lookup(tokens, salt, self._exact)
        if hit.length:
            for number, arrays in enumerate(hit.pages):
                page = _tree(self._page_tree, self._page_names, arrays)
                row = self._programs.write_page(row, number, page)
            rest = _tree(self._rest_tree, self._rest_names, hit.unit)
            row = self._programs.write_rest(row, rest, hit.length)
        return row, hit

    def places(self, length: int, begin: int, shared: int, wanted) -> frozenset[int]:
        """Where units of a prompt are taken, behind `begin`.

        Args:
          length: tokens of the prompt. shared: see `Hit`. wanted: places of the request's own.
        """
        last = (length - 1) // self.page
        step = EVERY * self.page
        found = {last * self.page, shared, *(n // self.page * self.page for n in wanted)}
        found |= {b for b in range(step, length, step) if b <= FAR or not b % (8 * step)}
        return frozenset(b for b in found if begin < b < length)

    def take(self, state: Row | Lane, slot: int, tokens, salt: str, on_grid: bool) -> Taken | None:
        """A unit of a slot that holds exactly these tokens, whole pages; None: it is stored.

        on_grid: whether it was read in whole chunks only, each at its place.
        """
        missing = self._cache.missing(tokens, salt)
        if missing is None:
            return None
        pages = {number: self._programs.read_page(state, slot, number) for number in missing}
        rest = self._programs.read_rest(state, slot)
        # Waited for in a later step.
        jax.tree.map(lambda x: x.copy_to_host_async(), (pages, rest))
        return Taken(np.asarray(tokens), rest, pages, self._exact or on_grid, salt)

    def add(self, taken: Taken | None) -> None:
        """Has a unit stored in a later step."""
        if taken is not None:
            self._due.append(taken)

    def store_due(self) -> None:
        """Stores what was taken before."""
        due, self._due = self._due, []
        for taken in due:
            pages = {
                number: _arrays(self._page_names, page) for number, page in taken.pages.items()
            }
            unit = _arrays(self._rest_names, taken.rest)
            self._cache.store(taken.tokens, unit, pages, taken.on_grid, taken.salt)

    def close(self) -> None:
        """Stores what is due, and waits until it is on disk."""
        self.store_due()
        self._cache.flush()

    def stats(self) -> dict[str, int]:
        return {f"prefix_{name}": value for name, value in self._cache.stats().items()}


def _names(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _arrays(names, tree):
    return dict(zip(names, map(np.asarray, jax.tree.leaves(tree)), strict=True))


def _tree(structure, names, arrays):
    return jax.tree.unflatten(structure, [arrays[name] for name in names])
