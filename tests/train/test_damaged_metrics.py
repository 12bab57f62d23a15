"""Whatever a disk makes of metrics.jsonl, a run goes on, with the lines that are still whole."""

import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax.cli.main import main
from v4jax.errors import InputError
from v4jax.train import curves, metrics

STEPS = 12


def line(step):
    loss = 4.5 - step / 8 if step % 5 else None  # None: of a batch without targets
    figures = {"loss": loss, "tokens_per_second": 1e4, "seconds": 0.25, "length": 128}
    return {"step": step, **figures}


LINES = [json.dumps(line(step)).encode() for step in range(1, STEPS + 1)]
WHOLE = b"".join(each + b"\n" for each in LINES)
# JSON that is no object, objects that are no line, and bytes that are no JSON.
WRONG = [
    b"7",
    b"null",
    b'"step"',
    b"[1, 2]",
    b"{}",
    b'{"loss": 1.0}',
    b'{"step": "3", "loss": 1.0}',
    b'{"step": 3.5, "loss": 1.0}',
    b'{"step": true, "loss": 1.0}',
    b'{"step": -1, "loss": 1.0}',
    b'{"step": null, "loss": 1.0}',
    b'{"step": 3, "loss": [1.0]}',
    b'{"step": 3, "loss": %s}' % (b"9" * 400),
    b'{"step": %s}' % (b"9" * 5000),
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\xff\xfe\x00\x01",
    b'{"step": 3, "lo\xc3\x28ss": 1.0}',
    b"\x00" * 64,
    "\u2028\x85".encode(),
    b"NaN",
    b'{"step": 3, ',
]


def damage(kind, seed):
    """The file with one damage, somewhere."""
    rng = random.Random(seed)
    content, at = bytearray(WHOLE), rng.randrange(len(WHOLE))
    size = rng.randrange(1, 200)
    if kind == "bit":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        content[at : at + size] = rng.randbytes(size)
    elif kind == "zeros":
        content[at : at + size] = bytes(size)
    elif kind == "lost":
        del content[at : at + size]
    elif kind == "twice":
        content[at:at] = content[at : at + size]
    elif kind == "end":
        del content[at:]
    else:
        lines = LINES[:]
        lines.insert(rng.randrange(STEPS), WRONG[seed % len(WRONG)])
        content = b"\n".join(lines) + b"\n"
    return bytes(content)


KINDS = ("bit", "bytes", "zeros", "lost", "twice", "end")
DAMAGES = [(kind, seed) for kind in KINDS for seed in range(11)]
DAMAGES += [("line", seed) for seed in range(len(WRONG))]
assert len(DAMAGES) == 88


def goes_on(folder, content, step=8):
    """What a run that goes on from a step makes of the file."""
    folder.mkdir(exist_ok=True)
    (folder / metrics.FILE).write_bytes(content)
    log = metrics.Metrics(folder, step)
    log.write(line(step + 1))
    log.close()
    found = metrics.read(folder)
    assert found[-1] == line(step + 1) and max(each["step"] for each in found) == step + 1
    whole = content.split(b"\n")
    for each in LINES[:step]:
        assert (json.loads(each) in found) or each not in whole
    assert curves.summary(curves.lines_of(folder))["step"] == step + 1
    text = (folder / metrics.FILE).read_bytes()
    assert text.endswith(b"\n") and text.count(b"\n") == len(found)
    return log.damaged


@pytest.mark.parametrize("kind, seed", DAMAGES)
def test_damages(tmp_path, kind, seed):
    damaged = goes_on(tmp_path / "run", damage(kind, seed))
    assert kind != "line" or damaged == 1


def test_what_is_whole_is_left_as_it_is(tmp_path):
    assert goes_on(tmp_path / "run", WHOLE, STEPS) == 0
    assert goes_on(tmp_path / "run", WHOLE + LINES[0][:20]) == 0  # cut off by a kill


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(LINES),
            st.binary(max_size=40),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x),
            ).map(lambda value: json.dumps(value).encode()),
        ),
        max_size=12,
    ),
    st.binary(max_size=3),
)
def test_drawn_lines(tmp_path_factory, lines, end):
    goes_on(tmp_path_factory.mktemp("run"), b"\n".join(lines) + end)


def test_drawing_what_is_damaged(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    good, odd = tmp_path / "good", tmp_path / "odd"
    for folder, content in ((good, damage("line", 16)), (odd, b'{"step": 3}\n')):
        folder.mkdir()
        (folder / metrics.FILE).write_bytes(content)
    out = tmp_path / "curves.png"
    assert main(["v4jax", "plot", str(good), str(odd), "--out", str(out)]) == 0
    assert main(["v4jax", "plot", str(odd), "--out", str(out)]) == 2
    assert "has figures to draw" in capsys.readouterr().err


def test_metrics_that_are_no_file(tmp_path, capsys):
    (tmp_path / "folder" / metrics.FILE).mkdir(parents=True)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / metrics.FILE)
    (tmp_path / "memory").mkdir()
    os.symlink("/proc/self/mem", tmp_path / "memory" / metrics.FILE)
    (tmp_path / "loop").mkdir()
    os.symlink(metrics.FILE, tmp_path / "loop" / metrics.FILE)
    for name, sentence in {
        "folder": "is no regular file",
        "pipe": "is no regular file",
        "memory": "cannot be read (Input/output error)",
        "loop": "holds no metrics.jsonl of a run",
        "folder/metrics.jsonl": "holds no metrics.jsonl of a run",
        "x" * 5000: "cannot be read (File name too long)",
    }.items():
        assert main(["v4jax", "plot", str(tmp_path / name), f"--out={tmp_path}/x.png"]) == 2
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1 and len(said) < 600, said
    with pytest.raises(InputError, match="is no regular file"):
        metrics.Metrics(tmp_path / "pipe", 0)
