"""The store of prefixes alone: numpy arrays, hashes, memory, files."""

import os
import shutil
import stat

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from v4jax.engine.prefix_cache import PrefixCache
from v4jax.engine.prefix_files import forget_files, tag_of
from v4jax.errors import InputError

PAGE = 4


def bound(identity="m", **options):
    cache = PrefixCache(**options)
    cache.bind(identity, PAGE)
    return cache


def page(number):
    return {"a": np.full((2, 3), number, np.float32), "b": np.full(4, number, ml_dtypes.bfloat16)}


def put(cache, tokens, salt="", on_grid=True):
    """Stores a prefix whose arrays follow from its tokens."""
    tokens = np.array(tokens, np.int32)
    missing = cache.missing(tokens, salt)
    if missing is not None:
        pages = {i: page(int(tokens[: (i + 1) * PAGE].sum())) for i in missing}
        cache.store(tokens, page(-int(tokens.sum())), pages, on_grid, salt)


def check(hit, tokens):
    """The arrays are those of the prompt's prefix."""
    known = np.array(tokens[: hit.length], np.int32)
    assert len(hit.pages) == hit.length // PAGE
    for i, arrays in enumerate(hit.pages):
        for name, value in page(int(known[: (i + 1) * PAGE].sum())).items():
            np.testing.assert_array_equal(arrays[name], value)
            assert arrays[name].dtype == value.dtype
    np.testing.assert_array_equal(hit.unit["a"], page(-int(known.sum()))["a"])


def find(cache, tokens, **options):
    return cache.lookup(np.array(tokens, np.int32), **options)


def test_the_longest_prefix_that_leaves_a_token():
    cache = bound()
    put(cache, range(4))
    put(cache, range(8))
    for length, found in ((3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (30, 8)):
        hit = find(cache, range(length))
        assert hit.length == found
        if found:
            check(hit, list(range(length)))
    assert find(cache, [0, 1, 2, 3, 9, 9, 9, 9, 9]).length == 4
    assert find(cache, [9, 1, 2, 3, 4]).length == 0


def test_tenants_do_not_meet():
    cache = bound()
    put(cache, range(4), salt="a")
    assert find(cache, range(9), salt="b").length == 0
    assert find(cache, range(9), salt="a").length == 4


def test_exact_takes_units_on_the_grid_only():
    cache = bound()
    put(cache, range(4), on_grid=True)
    put(cache, range(8), on_grid=False)
    assert find(cache, range(20), exact=True).length == 4
    assert find(cache, range(20)).length == 8


def test_a_shared_path_without_a_unit():
    cache = bound()
    put(cache, [*range(8), 1, 1, 1, 1])
    hit = find(cache, [*range(8), 2, 2, 2, 2, 2])
    assert (hit.length, hit.shared) == (0, 8)


def test_units_used_longest_ago_go_first_and_pages_that_none_needs():
    size = 24 + 8
    cache = bound(memory_bytes=4 * size)
    put(cache, range(4))
    put(cache, range(100, 104))
    assert find(cache, range(5)).length == 4  # used: the other one is older now
    put(cache, range(200, 204))
    assert [find(cache, [*range(n, n + 4), 0]).length for n in (0, 100, 200)] == [4, 0, 4]
    assert cache.stats()["memory_bytes"] == 4 * size
    assert cache.stats()["evicted"] == 1


def test_nothing_is_kept_without_memory():
    cache = bound(memory_bytes=0)
    put(cache, range(8))
    assert find(cache, range(9)).length == 0
    assert cache.stats()["memory_bytes"] == 0


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_what_is_found_was_stored(data):
    cache, stored = bound(memory_bytes=data.draw(st.integers(0, 1500))), set()
    for _ in range(data.draw(st.integers(1, 25))):
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=17))
        if data.draw(st.booleans()):
            whole = len(tokens) // PAGE * PAGE
            if whole:
                put(cache, tokens[:whole])
                stored.add(tuple(tokens[:whole]))
        else:
            hit = find(cache, tokens)
            assert hit.length < len(tokens)
            if hit.length:
                assert tuple(tokens[: hit.length]) in stored
                check(hit, tokens)
        assert cache.stats()["memory_bytes"] <= max(cache._limit, 0)


def test_another_process_finds_them(tmp_path):
    first = bound(directory=tmp_path)
    put(first, range(8), on_grid=False)
    first.flush()
    second = bound(directory=tmp_path)
    hit = find(second, range(12))
    assert (hit.length, hit.on_grid) == (8, False)
    check(hit, list(range(12)))
    assert find(bound("other model", directory=tmp_path), range(12)).length == 0
    assert bound("other model", directory=tmp_path).stats()["disk_foreign"] == 1
    assert all(stat.S_IMODE(each.stat().st_mode) == 0o700 for each in tmp_path.iterdir())


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "foreign", "no_page"])
def test_a_damaged_file_is_no_prefix(tmp_path, harm):
    first = bound(directory=tmp_path)
    put(first, range(4))
    put(first, range(8))
    first.flush()
    files = sorted(tmp_path.glob("*/*.entry"), key=lambda path: path.name)
    units = [path for path in files if path.name.startswith("unit")]
    pages = [path for path in files if path.name.startswith("page")]
    for path in pages if harm == "no_page" else units:
        content = path.read_bytes()
        if harm == "cut":
            path.write_bytes(content[: len(content) // 2])
        elif harm == "flip":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif harm == "empty":
            path.write_bytes(b"")
        elif harm == "foreign":
            shutil.copyfile(pages[0], path)
        else:
            path.unlink()
    second = bound(directory=tmp_path)
    assert find(second, range(12)).length == 0
    put(second, range(8))
    assert find(second, range(12)).length == 8
    second.flush()
    assert find(bound(directory=tmp_path), range(12)).length == 8


@pytest.mark.skipif(os.geteuid() == 0, reason="a superuser may write everywhere")
def test_a_directory_that_cannot_be_written(tmp_path, caplog):
    tmp_path.chmod(0o500)
    _goes_on(tmp_path, caplog)


def test_a_directory_that_is_a_file(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    _goes_on(tmp_path / "file", caplog)


def _goes_on(directory, caplog):
    cache = bound(directory=directory)
    put(cache, range(4))
    put(cache, range(8))
    cache.flush()
    assert find(cache, range(9)).length == 8
    assert cache.stats()["disk_dropped"] == 4
    assert caplog.text.count("cannot be written") == 1


def test_two_engines_on_one_directory(tmp_path):
    """The limit is that of both together; what is left is whole."""
    caches = [bound(directory=tmp_path, disk_bytes=6000) for _ in range(2)]
    for n in range(0, 400, 10):
        put(caches[n // 10 % 2], range(n, n + 4))
    for cache in caches:
        cache.flush()
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*.entry")) <= 6000
    fresh, found = bound(directory=tmp_path), 0
    for n in range(0, 400, 10):
        hit = find(fresh, range(n, n + 5))
        found += hit.length > 0
        if hit.length:
            check(hit, list(range(n, n + 5)))
    assert found


def test_it_belongs_to_one_model():
    cache = bound("a")
    cache.bind("a", PAGE)
    with pytest.raises(InputError, match="in use for another model"):
        cache.bind("b", PAGE)
    with pytest.raises(InputError, match="memory_bytes is -1"):
        PrefixCache(memory_bytes=-1)


def test_a_salt_is_forgotten_in_memory_and_on_disk_and_nothing_else_is(tmp_path):
    cache = bound(directory=tmp_path)
    for salt in ("one", "two", ""):
        put(cache, range(8), salt)
    cache.flush()
    cache.forget(salt="one")
    other = bound(directory=tmp_path)  # another process
    for each in (cache, other):
        assert find(each, range(9), salt="one").length == 0
        assert find(each, range(9), salt="two").length == 8
        assert find(each, range(9)).length == 8
    assert cache.stats()["units"] == 2 and cache.stats()["disk_units"] == 2
    assert forget_files(tmp_path, tag_of("two")) == 3  # two pages and a unit
    assert find(bound(directory=tmp_path), range(9), salt="two").length == 0
    assert find(bound(directory=tmp_path), range(9)).length == 8


def test_prefixes_that_nobody_used_are_forgotten(tmp_path):
    cache = bound(directory=tmp_path)
    put(cache, range(8))
    put(cache, range(50, 58))
    cache.flush()
    for path in tmp_path.glob("*/*.entry"):
        os.utime(path, (1, 1))
    for unit in cache._units.values():
        unit.used = 1.0
    assert find(cache, range(9)).length == 8  # it is used, and so is not old
    find(bound(directory=tmp_path), range(9))
    cache.forget(unused_seconds=3600.0)
    for each in (cache, bound(directory=tmp_path)):
        assert find(each, range(9)).length == 8
        assert find(each, range(50, 59)).length == 0
