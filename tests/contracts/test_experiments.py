"""Every experiment is written up in one form; its pictures come from figures that it stores."""

import datetime
import importlib.util
import re
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
FOLDERS = sorted(folder for folder in EXPERIMENTS.iterdir() if re.match(r"\d{3}_", folder.name))
SECTIONS = ["Method", "What made the difference", "Tried and left", "What it does not say"]
ENTRY = re.compile(r"## (\d{4}-\d\d-\d\d), [0-9a-f]{7}( and [0-9a-f]{7})*: \S")


def headings(text):
    return [line for line in text.splitlines() if line.startswith("## ")]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_readme_has_the_form(folder):
    text = (folder / "README.md").read_text()
    lines = text.splitlines()
    assert 40 <= len(lines) <= 80
    assert lines[0].startswith(f"# {folder.name}: ") and lines[0].endswith("?")
    assert lines[2].startswith("**"), "the answer comes first, in bold"
    assert [heading[3:] for heading in headings(text)] == SECTIONS
    assert "Hardware: " in text and re.search(r"[Cc]ommits?:? ", text)
    for picture in re.findall(r"\((\w+\.png)\)", text + (folder / "LOG.md").read_text()):
        assert (folder / picture).exists(), picture


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_log_has_dated_entries_newest_first(folder):
    entries = headings((folder / "LOG.md").read_text())
    assert entries and all(map(ENTRY.match, entries))
    dates = [datetime.date.fromisoformat(ENTRY.match(entry)[1]) for entry in entries]
    assert dates == sorted(dates, reverse=True)


def test_the_ledger_has_every_experiment():
    ledger = (EXPERIMENTS / "README.md").read_text()
    assert re.findall(r"^\| \[(\w+)\]", ledger, re.MULTILINE) == [f.name for f in FOLDERS]


@pytest.mark.parametrize(
    "script, pictures",
    [
        ("001_cpu_speed/plot.py", ["speed.png"]),
        ("seeds.py", [f"{n}/seeds.png" for n in ("004_compressed_attention", "006_muon")]),
    ],
)
def test_a_picture_is_drawn_from_stored_figures(script, pictures, tmp_path):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("script", EXPERIMENTS / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for source in module.HERE.rglob("*.json*"):
        copy = tmp_path / source.relative_to(module.HERE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    module.HERE = tmp_path
    module.main(*([[]] if script == "seeds.py" else []))
    for picture in pictures:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
