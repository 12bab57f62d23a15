"""Safetensors files: read and written as PyTorch does, and every kind of damage named."""

import json
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from v4jax.errors import InputError
from v4jax.files.atomic import write_atomically
from v4jax.files.safetensors import (
    INDEX_NAME,
    NUMPY_DTYPES,
    SINGLE_NAME,
    NewTensor,
    SafetensorsFile,
    SafetensorsFolder,
    bytes_of,
    write_index,
    write_safetensors,
)

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 3, 4), "empty": (0, 4), "scalar": ()}


def content(key, dtype):
    """Deterministic bytes of a tensor."""
    count = int(np.prod(SHAPES[key])) * NUMPY_DTYPES[dtype].itemsize
    return np.arange(count, dtype=np.uint8) + len(key)


def write(path, dtypes=("F32", "BF16", "F8_E4M3", "F8_E8M0", "I64", "I8"), pool=None):
    new = [NewTensor(f"{k}.{d}", d, s) for k, s in SHAPES.items() for d in dtypes]

    def fill(key, out):
        name, dtype = key.split(".")
        bytes_of(out)[...] = content(name, dtype)

    return write_safetensors(path, new, fill, pool)


def damaged(path, header=None, tail=b"", cut=None):
    """A small file, with another header or more or fewer bytes."""
    fields = {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    text = json.dumps(fields if header is None else header).encode()
    raw = struct.pack("<Q", len(text)) + text + bytes(16) + tail
    path.write_bytes(raw if cut is None else raw[:cut])
    return path


def test_torch_reads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors import safe_open

    write(tmp_path / SINGLE_NAME)
    with safe_open(str(tmp_path / SINGLE_NAME), "pt") as file:
        assert set(file.keys()) == {f"{k}.{d}" for k in SHAPES for d in dtypes_of()}
        for key in file.keys():  # noqa: SIM118 (not a dict)
            name, dtype = key.split(".")
            tensor = file.get_tensor(key)
            assert tuple(tensor.shape) == SHAPES[name]
            if tensor.numel():
                raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                np.testing.assert_array_equal(raw, content(name, dtype))


def dtypes_of():
    return ("F32", "BF16", "F8_E4M3", "F8_E8M0", "I64", "I8")


def test_we_read_what_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    stored = {
        "e4m3": torch.arange(48, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(6, 8),
        "e8m0": torch.arange(1, 9, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "bf16": torch.linspace(-3, 3, 10).bfloat16(),
        "f32": torch.linspace(-3, 3, 11).reshape(1, 11),
        "packed": torch.arange(-8, 8, dtype=torch.int8),
        "ids": torch.arange(6).reshape(2, 3),
    }
    save_file(stored, str(tmp_path / SINGLE_NAME))
    with SafetensorsFile(tmp_path / SINGLE_NAME) as file:
        assert file.entries.keys() == stored.keys()
        for key, tensor in stored.items():
            raw = tensor.reshape(-1).view(torch.uint8).numpy()
            for ours in (file.read(key), file[key]):
                assert ours.shape == tuple(tensor.shape)
                np.testing.assert_array_equal(bytes_of(np.array(ours)), raw)


def test_views_share_the_file_and_outlive_it(tmp_path):
    write(tmp_path / SINGLE_NAME)
    file = SafetensorsFile(tmp_path / SINGLE_NAME)
    view = file["c.F32"]
    assert not view.flags.owndata and not view.flags.writeable
    file.close()
    np.testing.assert_array_equal(bytes_of(np.array(view)), content("c", "F32"))


def test_threads_change_no_byte(tmp_path):
    alone = write(tmp_path / "alone.safetensors")
    with ThreadPoolExecutor(4) as pool:
        together = write(tmp_path / "together.safetensors", pool=pool)
    assert alone == together
    raw = (tmp_path / "alone.safetensors").read_bytes()
    assert raw == (tmp_path / "together.safetensors").read_bytes()


def test_a_failed_write_leaves_nothing(tmp_path):
    def fill(key, out):
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError), ThreadPoolExecutor(2) as pool:
        write_safetensors(tmp_path / SINGLE_NAME, [NewTensor("a", "F32", (4,))], fill, pool)
    assert not list(tmp_path.iterdir())


def test_a_failed_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "x", b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError):
        write_atomically(tmp_path / "x", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def entry(**changes):
    return {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ({"cut": 5}, "has 5 bytes, too few"),
        ({"cut": 30}, "truncated: the header alone needs"),
        ({"cut": -3}, "truncated: its header promises"),
        ({"tail": b"more"}, "corrupt: its header promises"),
        ({"header": [1, 2]}, "corrupt safetensors header"),
        ({"header": {"x": 3}}, "corrupt safetensors header"),
        ({"header": entry(dtype="F33")}, "unknown dtype 'F33'"),
        ({"header": entry(shape=[5])}, "does not take 16 bytes"),
        ({"header": entry(shape=[-2, -2])}, "bad shape"),
        ({"header": entry(data_offsets=[0, 16.0])}, "bad shape"),
        ({"header": entry(data_offsets=[4, 20])}, "x does not start at"),
        ({"header": {**entry(), "y": entry()["x"]}}, "y does not start at"),
    ],
)
def test_damaged_files(tmp_path, damage, sentence):
    path = damaged(tmp_path / SINGLE_NAME, **damage)
    with pytest.raises(InputError, match=sentence) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_header_at_all(tmp_path):
    path = tmp_path / SINGLE_NAME
    path.write_bytes(b"<!DOCTYPE html> the download asked for a password")
    with pytest.raises(InputError, match="not a safetensors file"):
        SafetensorsFile(path)


def test_a_file_cut_short_while_it_is_open(tmp_path):
    file = SafetensorsFile(damaged(tmp_path / SINGLE_NAME))
    with open(tmp_path / SINGLE_NAME, "r+b") as raw:
        raw.truncate((tmp_path / SINGLE_NAME).stat().st_size - 8)
    with pytest.raises(InputError, match="ended while x was read"):
        file.read("x")


def two_files(directory):
    write(directory / "model-1.safetensors", ("F32",))
    write(directory / "model-2.safetensors", ("BF16",))
    weight_map = {f"{k}.F32": "model-1.safetensors" for k in SHAPES}
    weight_map |= {f"{k}.BF16": "model-2.safetensors" for k in SHAPES}
    write_index(directory, weight_map, 1234)
    return weight_map


def test_a_folder_with_an_index(tmp_path):
    weight_map = two_files(tmp_path)
    folder = SafetensorsFolder(tmp_path)
    assert folder.entries.keys() == weight_map.keys()
    np.testing.assert_array_equal(bytes_of(folder.read("a.BF16")), content("a", "BF16"))
    np.testing.assert_array_equal(folder["a.BF16"], folder.read("a.BF16"))
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index == {"metadata": {"total_size": 1234}, "weight_map": weight_map}


def test_a_folder_whose_index_disagrees(tmp_path):
    weight_map = two_files(tmp_path)
    write_index(tmp_path, weight_map | {"extra": "model-1.safetensors"}, 1)
    with pytest.raises(InputError, match="says that extra is in model-1.safetensors"):
        SafetensorsFolder(tmp_path)
    weight_map.pop("a.F32")
    write_index(tmp_path, weight_map, 1)
    with pytest.raises(InputError, match="holds a.F32, which .* does not name"):
        SafetensorsFolder(tmp_path)


def test_a_missing_shard_and_a_tensor_twice(tmp_path):
    weight_map = two_files(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match="1 of 2 files .* missing, first model-2.safetensors"):
        SafetensorsFolder(tmp_path)
    write(tmp_path / "model-2.safetensors", ("F32",))
    with pytest.raises(InputError, match="a.F32 is in more than one file"):
        SafetensorsFolder(tmp_path)
    assert weight_map


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"x": "../y.safetensors"}}',
     '{"weight_map": {"x": 3}}'],
)  # fmt: skip
def test_a_bad_index(tmp_path, text):
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(InputError, match=INDEX_NAME):
        SafetensorsFolder(tmp_path)


def test_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        SafetensorsFolder(tmp_path / "none")
    with pytest.raises(InputError, match="no checkpoint"):
        SafetensorsFolder(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        SafetensorsFile(tmp_path / "none")
