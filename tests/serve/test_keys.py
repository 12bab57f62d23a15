"""Keys: what the file holds, who may change it, and what each key may ask."""

import base64
import concurrent.futures
import hashlib
import json
import os
import stat

import pytest

from v4jax.cli.main import main
from v4jax.errors import InputError
from v4jax.serve.errors import Refused
from v4jax.serve.keys import DEFAULT_ENDPOINTS, KeyFile, create, read_keys, revoke
from v4jax.serve.limits import Limits, Rate


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


def test_a_key_is_32_random_bytes_and_the_file_has_its_hash(path):
    secret, key = create(path, "alice", requests_per_minute=3)
    other, _ = create(path, "bob")
    assert len(base64.urlsafe_b64decode(secret.removeprefix("v4jax-") + "=")) == 32
    assert key.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert secret not in path.read_text() and other not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys = KeyFile(path)
    assert keys.find(secret) == key and keys.find(other).name == "bob"
    assert keys.find(secret + "x") is keys.find("") is keys.find("\udcff\u1234") is None


def test_the_file_is_read_again_when_it_changes(path):
    secret, key = create(path, "alice")
    keys = KeyFile(path)
    late, _ = create(path, "late")
    assert keys.find(late).name == "late"
    revoke(path, key.id)
    assert keys.find(secret) is None and keys.find(late) is not None
    with pytest.raises(InputError, match="no key with the id or name"):
        revoke(path, key.id)


def test_keys_made_at_the_same_time_are_all_there(path):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: create(path, f"n{n}"), range(24)))
    assert len(read_keys(path)) == 24


@pytest.mark.parametrize("mode", [0o602, 0o666, 0o777])
def test_a_file_that_everybody_can_write_is_refused(path, mode):
    secret, _ = create(path, "alice")
    keys = KeyFile(path)
    os.chmod(path, mode)
    with pytest.raises(InputError, match="every user can write it"):
        keys.find(secret)
    with pytest.raises(InputError, match="chmod 600"):
        KeyFile(path)
    os.chmod(path, 0o640)
    assert keys.find(secret) is not None


def test_a_file_that_cannot_be_read_is_refused(path, tmp_path):
    for what in (path, tmp_path, tmp_path / "a" / "b", "nul\0"):
        with pytest.raises(InputError, match="cannot be read"):
            KeyFile(what)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="cannot be read"):
        KeyFile(tmp_path / "pipe")


GOOD = {"id": "i", "sha256": "0" * 64, "name": "n"}


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "3", "null", '{"keys": 3}', '{"keys": [3]}', "[" * 100_000),
        json.dumps({"keys": [GOOD | {"sha256": "0"}]}),
        json.dumps({"keys": [GOOD | {"models": [3]}]}),
        json.dumps({"keys": [GOOD | {"endpoints": ["everything"]}]}),
        json.dumps({"keys": [GOOD | {"concurrent": True}]}),
        json.dumps({"keys": [GOOD | {"requests_per_minute": 0}]}),
        json.dumps({"keys": [GOOD | {"expires": "soon"}]}),
        json.dumps({"keys": [GOOD | {"rights": "all"}]}),
        json.dumps({"keys": [GOOD, GOOD]}),
    ],
)
def test_a_damaged_file_is_refused_in_a_sentence(path, content):
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(InputError, match="keys.json: "):
        KeyFile(path)


def test_the_command(path, capsys):
    file = f"--file={path}"
    words = ["create", file, "--name=alice", "--endpoints=chat,metrics", "--concurrent=2"]
    assert main(["v4jax", "keys", *words, "--expires_days=1"]) == 0
    secret = capsys.readouterr().out.strip()
    key = KeyFile(path).find(secret)
    assert key.endpoints == ("chat", "metrics") and key.concurrent == 2
    assert not key.expired(key.created) and key.expired(key.created + 2 * 86400)
    assert main(["v4jax", "keys", "list", file, "--format=json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["keys"]
    assert listed["id"] == key.id and "sha256" not in listed
    assert main(["v4jax", "keys", "list", file]) == 0
    assert "concurrent 2" in capsys.readouterr().out
    for wrong in (["create", file], ["revoke", file], ["drop", file], ["list"]):
        assert main(["v4jax", "keys", *wrong]) == 2
    assert main(["v4jax", "keys", "create", file, "--name=x", "--endpoints=all"]) == 2
    assert main(["v4jax", "keys", "create", f"--file={path}/x/y", "--name=x"]) == 2
    assert main(["v4jax", "keys", "revoke", file, "--name=alice"]) == 0
    assert KeyFile(path).find(secret) is None
    assert DEFAULT_ENDPOINTS[-1] == "tokenize"


def test_limits_of_a_key(path):
    limits_of = {"requests_per_minute": 3, "concurrent": 2, "tokens_per_minute": 100}
    _, key = create(path, "a", **limits_of)
    now = [0.0]
    limits = Limits(lambda: now[0])
    for _ in range(2):
        limits.begin(key)
    with pytest.raises(Refused, match="2 requests at a time"):
        limits.begin(key)
    limits.end(key)
    limits.begin(key)
    limits.end(key)
    now[0] = 20.0
    with pytest.raises(Refused, match="3 requests a minute") as refused:
        limits.begin(key)
    assert (refused.value.status, refused.value.retry_after) == (429, 40.0)
    now[0] = 61.0
    limits.begin(key)


def test_tokens_are_reserved_and_settled(path):
    _, key = create(path, "a", tokens_per_minute=100)
    now = [0.0]
    limits = Limits(lambda: now[0])
    first = limits.reserve(key, 80)
    now[0] = 10.0
    limits.reserve(key, 20)
    with pytest.raises(Refused) as refused:
        limits.reserve(key, 30)
    assert (refused.value.status, refused.value.retry_after) == (429, 50.0)
    limits.settle(first, 10)  # it was shorter than it might have been
    limits.reserve(key, 70)
    with pytest.raises(Refused) as refused:
        limits.reserve(key, 101)
    assert refused.value.status == 400


def test_a_rate():
    now = [0.0]
    rate = Rate(2, lambda: now[0])
    assert [rate.allows() for _ in range(3)] == [True, True, False]
    now[0] = 61.0
    assert rate.allows()
