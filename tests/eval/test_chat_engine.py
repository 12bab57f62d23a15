"""A small model that can chat, by the command: here and by two workers, the same answers."""

import json

import pytest

from tests.support.chats import chat_directory
from tests.support.checkpoints import small_config, synthetic
from v4jax.cli.main import main
from v4jax.config import CSA, WINDOW, with_hash_routing
from v4jax.eval.records import read_records

pytestmark = pytest.mark.slow  # compiles an engine three times


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    synthetic(directory, small_config(layers=with_hash_routing((WINDOW, CSA), 1), mtp_layers=()))
    return str(chat_directory(directory))


def records(out):
    found = read_records(out)
    for record in found:
        for name in ("seconds", "first_token_seconds", "cached_tokens"):
            record.pop(name, None)
    return sorted(found, key=lambda each: (each["task"], each["length"], each["sample"]))


def test_workers_and_this_process_make_the_same_records(checkpoint, tmp_path, capsys):
    command = ["v4jax", "eval", "needle", f"--checkpoint={checkpoint}", "--lengths=768"]
    command += ["--samples=4", "--format=json", "--dtype=float32"]
    flags = {"local": [], "processes": ["--executor=processes", "--workers=2"]}
    for name, more in flags.items():
        assert main([*command, f"--out={tmp_path / name}", *more]) == 0
    here = records(tmp_path / "local")
    assert len(here) == 4 and all(each["output_tokens"] for each in here)
    assert records(tmp_path / "processes") == here
    assert json.loads((tmp_path / "local" / "run.json").read_text())["style"] == "chat"


def test_the_form_of_a_call_is_measured(checkpoint, tmp_path):
    command = ["v4jax", "eval", "probes", f"--checkpoint={checkpoint}", "--lengths=2560"]
    command += ["--tasks=tool_structure", "--samples=2", f"--out={tmp_path}", "--dtype=float32"]
    assert main(command) == 0
    for record in records(tmp_path):
        assert 0 <= record["score"] <= 1 and record["form_tokens"] > 50  # a token a byte
