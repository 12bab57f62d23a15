"""Results that can be made again: whole or not there, whatever happens to their files."""

import os
import subprocess
import sys

import pytest

from v4jax.files.store import SUFFIX, Store

KEY, OTHER = "0" * 64, "1" * 64
CONTENT = bytes(range(256)) * 8


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "a" / "b", 1 << 20)


@pytest.fixture
def file(store, tmp_path):
    """The file of one entry."""
    assert store.write(KEY, CONTENT)
    return tmp_path / "a" / "b" / f"{KEY}{SUFFIX}"


def test_an_entry_is_read_as_it_was_written(store, file):
    assert store.read(KEY) == CONTENT
    assert store.write(KEY, b"") and store.read(KEY) == b""
    assert store.read(OTHER) is None


def test_only_its_owner_can_read_and_write_it(file):
    assert file.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("place", [0, 7, 8, 39, 40, len(CONTENT) // 2, -1])
def test_a_changed_bit_is_noticed_and_mended(store, file, place):
    raw = bytearray(file.read_bytes())
    raw[place] ^= 4
    file.write_bytes(raw)
    assert store.read(KEY) is None
    assert store.write(KEY, CONTENT) and store.read(KEY) == CONTENT


@pytest.mark.parametrize("length", [0, 1, 8, 39, 40, 41, len(CONTENT)])
def test_half_a_file_is_noticed(store, file, length):
    file.write_bytes(file.read_bytes()[:length])
    assert store.read(KEY) is None


def test_an_entry_under_another_name_is_noticed(store, file):
    file.rename(file.with_name(f"{OTHER}{SUFFIX}"))
    assert store.read(OTHER) is None


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646])
def test_what_others_could_have_written_is_not_read(store, file, mode):
    file.chmod(mode)
    assert store.read(KEY) is None


def test_what_another_user_owns_is_not_read(store, file, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert store.read(KEY) is None


def test_links_directories_and_pipes_are_not_read(store, file, tmp_path):
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert store.read(KEY) is None
    file.unlink()
    os.mkfifo(file)
    assert store.read(KEY) is None
    file.unlink()
    file.mkdir()
    assert store.read(KEY) is None
    assert not store.write(KEY, CONTENT)


def test_a_place_that_cannot_be_written_harms_nobody(tmp_path):
    (tmp_path / "file").touch()
    store = Store(tmp_path / "file" / "x", 1 << 20)
    assert not store.write(KEY, CONTENT)
    assert store.read(KEY) is None


def test_the_folder_stays_small_and_keeps_what_is_used(tmp_path):
    store = Store(tmp_path, 4 * 1100)
    for number in range(4):
        assert store.write(str(number), bytes(1000))
        os.utime(tmp_path / f"{number}{SUFFIX}", (number, number))  # long ago, one after another
    assert store.read("0") is not None  # used: now the youngest
    assert store.write("4", bytes(1000))
    assert [store.read(str(number)) is not None for number in range(5)] == [1, 0, 1, 1, 1]
    assert sum(path.stat().st_size for path in tmp_path.glob(f"*{SUFFIX}")) <= 4 * 1100


HAMMER = """
import sys
from v4jax.files.store import Store
store, mine = Store(sys.argv[1], 1 << 22), sys.argv[2].encode() * 50_000
for _ in range(20):
    assert store.write("key", mine)
    found = store.read("key")
    assert found is not None and len(found) == 50_000 and len(set(found)) == 1, found[:9]
"""


def test_processes_may_write_at_once(tmp_path):
    running = [subprocess.Popen([sys.executable, "-c", HAMMER, tmp_path, name]) for name in "abc"]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"key{SUFFIX}", "lock"]
