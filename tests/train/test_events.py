"""TensorBoard files, read back by hand."""

import struct

from v4jax.train import events


def test_the_known_value_of_crc32c():
    assert events.crc32c(b"123456789") == 0xE3069283


def records(content):
    """The payloads of an event file, lengths and CRCs checked."""
    at = 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        head, data = content[at : at + 8], content[at + 12 : at + 12 + length]
        assert content[at + 8 : at + 12] == events._masked_crc(head)
        assert content[at + 12 + length : at + 16 + length] == events._masked_crc(data)
        yield data
        at += 16 + length


def test_event_file(tmp_path):
    file = events.EventFile(tmp_path / "events")
    file.write(300, {"loss": 0.25, "note": "no number"})
    file.close()
    version, event = records((tmp_path / "events").read_bytes())
    assert version.endswith(b"brain.Event:2")
    # wall time (field 1, double), step 300 (field 2, varint), summary (field 5): tag, simple value.
    value = b"\x0a\x04loss\x15" + struct.pack("<f", 0.25)
    summary = b"\x0a" + bytes([len(value)]) + value
    assert event[9:] == b"\x10\xac\x02\x2a" + bytes([len(summary)]) + summary
