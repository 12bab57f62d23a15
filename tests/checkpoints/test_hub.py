"""Checkpoints in the hub's local cache; nothing is ever downloaded."""

import os
import re

import pytest

import v4jax
from v4jax.checkpoints.load import locate
from v4jax.errors import InputError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with one model of two snapshots, files being links as the hub's tools make them."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "hub" / "models--some--nano"
    (model / "blobs").mkdir(parents=True)
    (model / "refs").mkdir()
    nano = locate("nano")
    for revision in ("aaa", "bbb"):
        snapshot = model / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for name in os.listdir(nano):
            blob = model / "blobs" / f"blob-{name}"
            if not blob.exists():
                blob.symlink_to(os.path.join(nano, name))
            (snapshot / name).symlink_to(os.path.join("..", "..", "blobs", f"blob-{name}"))
        os.utime(snapshot, (len(revision), 2 if revision == "aaa" else 1))
    (model / "refs" / "main").write_text("bbb\n")
    return model


def test_where_a_model_is_found(cache):
    expected = str(cache / "snapshots" / "bbb")
    assert locate("some/nano") == locate(cache) == locate(expected) == expected
    (cache / "refs" / "main").write_text("../../elsewhere")
    assert locate("some/nano") == str(cache / "snapshots" / "aaa")  # the newest


def test_it_loads(cache):
    model, params = v4jax.from_pretrained("some/nano")
    assert model.source == str(cache / "snapshots" / "bbb")
    other, _ = v4jax.load("nano")
    assert other == model and hash(other) == hash(model) and repr(other) == repr(model)
    assert v4jax.from_pretrained is v4jax.load
    assert v4jax.Tokenizer("some/nano").encode("a")


def test_an_id_that_is_not_there(cache):
    with pytest.raises(InputError, match=r"no model of that id in .*hf download some/other$"):
        v4jax.load("some/other")
    (cache.parent / "models--some--empty").mkdir()
    with pytest.raises(InputError, match=r"has no snapshot.*hf download some/empty"):
        locate("some/empty")


@pytest.mark.parametrize("path", ["../x/y", "a/b/c", "a/", "/a/b", "a b/c", "x"])
def test_other_paths_are_paths(cache, path):
    assert locate(path) == path


def test_a_directory_of_that_name_comes_first(cache, tmp_path):
    (tmp_path / "some" / "nano").mkdir(parents=True)
    assert locate("some/nano") == "some/nano"


def test_where_the_cache_is(monkeypatch):
    from v4jax.checkpoints.hub import cache_directory

    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert re.search(r"/\.cache/huggingface/hub$", str(cache_directory()))
    monkeypatch.setenv("HF_HOME", "/data/hf")
    assert str(cache_directory()) == "/data/hf/hub"
