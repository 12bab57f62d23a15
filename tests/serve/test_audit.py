"""The audit log: whole lines, days, disks that are full, and what is forgotten."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from v4jax.cli.main import main
from v4jax.engine.prefix_files import tag_of
from v4jax.errors import InputError
from v4jax.serve import audit as audit_lib
from v4jax.serve.audit import AuditLog, files, read
from v4jax.serve.forget import Watch, forget

NOON = 1_700_000_000.0


def line(request, key="k", when=NOON, **more):
    return {"time": when, "request": request, "key": key} | more


def test_lines_are_whole_and_private(tmp_path):
    log = AuditLog(tmp_path / "audit", clock=lambda: NOON)
    for n in range(5):
        assert log.append(line(f"r{n}", text="é\n\u2028"))
    (path,) = files(tmp_path / "audit")
    assert path.name == "audit-2023-11-14.jsonl"
    assert [each["request"] for each in read(tmp_path / "audit")] == [f"r{n}" for n in range(5)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_prompts_have_a_hash_that_needs_the_secret(tmp_path):
    one, same, other = (AuditLog(tmp_path / name) for name in ("a", "a", "b"))
    assert one.hash_of(b"x") == same.hash_of(b"x") != one.hash_of(b"y")
    assert one.hash_of(b"x") != other.hash_of(b"x")


def test_a_line_on_which_a_process_died_is_cut_off(tmp_path):
    log = AuditLog(tmp_path, clock=lambda: NOON)
    log.append(line("whole"))
    (path,) = files(tmp_path)
    for rest in (b'{"time": 1, "req', b"x" * 200_000):
        with open(path, "ab") as file:
            file.write(rest)
        AuditLog(tmp_path, clock=lambda: NOON).append(line("next"))
        assert {each["request"] for each in read(tmp_path)} == {"whole", "next"}


def test_files_of_old_days_are_deleted(tmp_path):
    now = [NOON]
    log = AuditLog(tmp_path, keep_days=2, clock=lambda: now[0])
    for day in range(6):
        now[0] = NOON + day * 86400
        log.append(line(f"r{day}", when=now[0]))
    assert [each["request"] for each in read(tmp_path)] == ["r3", "r4", "r5"]


@pytest.fixture
def full_disk(monkeypatch):
    """A disk on which nothing fits beyond the reserve, while `full` is set."""
    state = {"full": False, "room": 0}
    write, allocate, unlink = os.write, os.posix_fallocate, os.unlink
    truncate = os.ftruncate

    def limited(file, content):
        if state["full"] and len(content) > state["room"]:
            if not state["room"]:
                raise OSError(errno.ENOSPC, "No space left on device")
            content = bytes(content)[: state["room"]]
        written = write(file, content)
        state["room"] -= written
        return written

    def cut(file, size):
        state["room"] += os.fstat(file).st_size - size
        truncate(file, size)

    def no_room(file, begin, size):
        if state["full"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(file, begin, size)

    def freed(path, *more, **options):
        unlink(path, *more, **options)
        if os.fspath(path).endswith("reserve"):
            state["room"] = 4 << 20

    monkeypatch.setattr(audit_lib.os, "write", limited)
    monkeypatch.setattr(audit_lib.os, "posix_fallocate", no_room)
    monkeypatch.setattr(audit_lib.os, "unlink", freed)
    monkeypatch.setattr(audit_lib.os, "ftruncate", cut)
    monkeypatch.setattr(audit_lib, "_RETRY_SECONDS", 0.0)
    return state


def test_a_full_disk_refuses_new_requests_and_records_those_that_run(tmp_path, full_disk):
    log = AuditLog(tmp_path, full=True, clock=lambda: NOON)
    assert log.writable() and log.append(line("before", prompt="p"))
    full_disk.update(full=True, room=0)
    assert log.writable()  # nothing has failed yet
    assert log.append(line("running", prompt="p"))
    assert not log.writable()
    assert log.append(line("also running", prompt="q"))
    full_disk["room"] = 100
    assert not log.append(line("lost", prompt="p" * 500, more="x" * 500))
    assert not log.writable()
    full_disk.update(full=False)
    assert log.writable() and log.append(line("after"))
    found = [each["request"] for each in read(tmp_path)]
    assert found == ["before", "running", "also running", "after"]


def test_a_text_that_does_not_fit_is_left_out_of_its_line(tmp_path, full_disk):
    log = AuditLog(tmp_path, full=True, clock=lambda: NOON)
    full_disk.update(full=True, room=200)
    assert log.append(line("long", prompt="p" * (5 << 20)))
    (found,) = read(tmp_path)
    assert found["text_lost"] and "prompt" not in found


def test_a_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--audit"):
        AuditLog(tmp_path / "file")


KILLED = """
import itertools, sys
from v4jax.serve.audit import AuditLog
log = AuditLog(sys.argv[1], full=True)
for n in itertools.count():
    log.append({"time": 0.0, "request": str(n), "key": "k", "prompt": "p" * 60_000})
    print(n, flush=True)
"""


def test_killed_while_it_writes(tmp_path):
    """Each line that was promised is there; none is broken once the log is opened again."""
    for _ in range(3):
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(30):
            last = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        last = (process.stdout.read().strip() or last).split()[-1]
        process.stdout.close()
        AuditLog(tmp_path)
        found = [each["request"] for each in read(tmp_path)]
        assert last in found
        assert found[:1] == ["0"]


@pytest.fixture
def kept(tmp_path):
    """A log and a prefix cache of two keys."""
    log = AuditLog(tmp_path / "audit")
    now = time.time()
    for n, key in enumerate(("one", "two", "one", None)):
        log.append(line(f"r{n}", key, now - 86400 * n))
    folder = tmp_path / "prefixes" / "model"
    folder.mkdir(parents=True)
    for key in ("one", "two"):
        for kind in ("page", "unit"):
            (folder / f"{kind}-{tag_of(key)}-00ff.entry").touch()
    (folder / "unit-00ff.entry").touch()
    os.utime(folder / "unit-00ff.entry", (now - 86400 * 9,) * 2)
    return tmp_path


def left(kept):
    lines = [each["request"] for each in read(kept / "audit")]
    return lines, len(list((kept / "prefixes" / "model").iterdir()))


def test_forgetting_a_key(kept, capsys):
    words = [f"--audit={kept}/audit", f"--prefix_cache={kept}/prefixes"]
    watch = Watch(kept / "audit")
    assert main(["v4jax", "forget", *words, "--key=one"]) == 0
    assert "2 lines of the audit log and 2 files" in capsys.readouterr().out
    assert left(kept) == (["r1", "r3"], 3)
    assert [each["salts"] for each in watch.news()] == [["one"]] and watch.news() == []


def test_forgetting_a_request_forgets_the_prefixes_of_its_key(kept):
    watch = Watch(kept / "audit")
    assert forget(kept / "audit", kept / "prefixes", request="r1") == (1, 2)
    assert left(kept) == (["r0", "r2", "r3"], 3)
    assert forget(kept / "audit", kept / "prefixes", request="r3") == (1, 1)
    assert [each["salts"] for each in watch.news()] == [["two"], [""]]
    with pytest.raises(InputError, match="no request 'r3'"):
        forget(kept / "audit", None, request="r3")


def test_forgetting_what_is_old(kept):
    assert forget(kept / "audit", kept / "prefixes", older_than_days=1.5) == (2, 1)
    assert left(kept) == (["r0", "r1"], 4)


def test_what_forget_is_not_told(kept, capsys):
    where = f"--audit={kept}/audit"
    for words in (
        [where],
        [where, "--key=a", "--request=b"],
        ["--key=a"],
        ["--audit=/x", "--key=a"],
    ):
        assert main(["v4jax", "forget", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with open(kept / "audit" / "lock") as lock, open(kept / "audit" / "secret", "rb") as secret:
        assert lock.read() == "" and len(secret.read()) == 32
    assert json.loads(json.dumps(list(read(kept / "audit"))))
