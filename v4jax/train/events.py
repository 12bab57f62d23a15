"""TensorBoard's event files, written by hand: records of a length, a protobuf and their CRCs."""

import functools
import struct
import time
from pathlib import Path
from typing import Any

from v4jax.files.writing import append, writing


class EventFile:
    """Scalars by step, for TensorBoard: each record holds a protobuf `Event`.

    Every package that writes these brings TensorFlow, torch or a server along; the format of a
    scalar is thirty lines.

    Raises:
      InputError: the file cannot be made.
    """

    def __init__(self, path: Path):
        with writing(path):
            self._file = path.open("ab", buffering=0)
            self._record(_field(1, 1, struct.pack("<d", time.time())) + _bytes(3, b"brain.Event:2"))

    def write(self, step: int, values: dict[str, Any]) -> None:
        scalars = {k: v for k, v in values.items() if isinstance(v, int | float)}
        summary = b"".join(
            _bytes(1, _bytes(1, name.encode()) + _field(2, 5, struct.pack("<f", value)))
            for name, value in scalars.items()
        )
        event = _field(1, 1, struct.pack("<d", time.time())) + _field(2, 0, _varint(step))
        self._record(event + _bytes(5, summary))

    def close(self) -> None:
        self._file.close()

    def _record(self, data):
        length = struct.pack("<Q", len(data))
        append(self._file, length + _masked_crc(length) + data + _masked_crc(data))


def _field(number, kind, payload):
    return _varint(number << 3 | kind) + payload


def _bytes(number, payload):
    return _field(number, 2, _varint(len(payload)) + payload)


def _varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _masked_crc(data):
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(data: bytes) -> int:
    """The Castagnoli CRC."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _crc_table()[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


@functools.cache
def _crc_table():
    table = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    return table
