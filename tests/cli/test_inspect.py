"""`v4jax inspect` and the command line around it, from the outside."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from v4jax.accounting import count_parameters
from v4jax.cli import inspect
from v4jax.cli.main import SUBCOMMANDS, main
from v4jax.config import DSpark
from v4jax.files.safetensors import NewTensor, SafetensorsFolder, write_index, write_safetensors
from v4jax.hf.config import to_hf
from v4jax.hf.tensors import tensor_table
from v4jax.named_configs import get_config


@pytest.fixture
def run(capsys):
    """Runs the command line: (exit status, stdout, stderr)."""

    def run(*args):
        status = main(["v4jax", *map(str, args)])
        return status, *capsys.readouterr()

    return run


def _write_checkpoint(directory, config, layout="official", more=(), change=lambda key, out: None):
    """A checkpoint of a config, every byte 0x38 (a finite number in every type) and every id 0."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(to_hf(config)))
    table = tensor_table(config, layout)
    tensors = [*(NewTensor(spec.key, spec.dtypes[0], spec.shape) for spec in table), *more]

    def fill(key, out):
        out.reshape(-1).view(np.uint8)[:] = 0 if key.endswith("tid2eid") else 0x38
        change(key, out)

    halves = {"a.safetensors": tensors[::2], "b.safetensors": tensors[1::2]}
    for file, half in halves.items():
        write_safetensors(directory / file, half, fill)
    weight_map = {tensor.key: file for file, half in halves.items() for tensor in half}
    write_index(directory, weight_map, sum(tensor.nbytes for tensor in tensors))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    _write_checkpoint(directory, get_config("flash_tiny"))
    return directory


@pytest.mark.parametrize(
    "name, expected",
    [
        ("flash", ["284.33 B", "13.27 B active", "69,187", "159,609,485,896", "3514.3", "10.1 %"]),
        ("pro", ["1573.0 B", "48.85 B active", "145,116", "864,704,792,696", "5031.4", "26.7 %"]),
    ],
)
def test_released_models(name, expected):
    # Alone, as checking the type of each of 145,116 table entries would take longer than the rest.
    process = _run_alone(
        f"from v4jax.cli.main import main; sys.exit(main(['', 'inspect', {name!r}]))"
    )
    text, error = (stream.decode() for stream in process.communicate())
    assert (process.returncode, error) == (0, "")
    for figure in (*expected, "48068", "mtp 0", "3, 5 .. "):
        assert figure in text
    assert max(map(len, text.splitlines())) <= 110


def test_json_says_the_same(run):
    status, text, _ = run("inspect", "flash_tiny", "--format=json", "--context", "777")
    report = json.loads(text)
    assert status == 0
    assert report["tensors"] == sum(entry["tensors"] for entry in report["stored"].values())
    assert report["bytes"] == sum(entry["bytes"] for entry in report["stored"].values())
    assert [entry["context"] for entry in report["contexts"]] == [777, 4096]
    first = report["contexts"][0]
    assert first["flops"] == sum(first["flops_parts"].values())
    assert first["flops_ratio"] == first["flops"] / first["v32_flops"]
    layers = get_config("flash_tiny").layers
    assert [layer["attention"] for layer in report["layers"]] == [spec.attention for spec in layers]
    assert report["config"] == to_hf(get_config("flash_tiny"))


@pytest.mark.parametrize(
    "name", ["flash_base_tiny", "flash_tiny", "nano", "pro_base_tiny", "pro_tiny"]
)
def test_small_configs(run, name):
    status, text, error = run("inspect", name)
    assert (status, error) == (0, "")
    assert text.startswith(f"{name}: ")


def test_directory(run, checkpoint):
    status, text, _ = run("inspect", checkpoint)
    assert status == 0
    assert f"{checkpoint}: 1.14 M parameters" in text
    assert "in 2 files" in text
    assert "Check" not in text
    status, text, _ = run("inspect", checkpoint, "--check")
    assert status == 0
    assert f"Check: all {len(tensor_table(get_config('flash_tiny'))):,} tensors are there" in text


def test_a_config_without_weights(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_hf(get_config("pro_tiny"))))
    assert run("inspect", tmp_path)[0] == 0
    status, _, error = run("inspect", tmp_path, "--check")
    assert status == 2
    assert "has none" in error


@pytest.mark.parametrize("folder", ["float32", "native"])
def test_golden_checkpoints_are_sound(run, golden, folder):
    status, text, _ = run("inspect", golden / folder, "--check", "--format=json")
    assert (status, json.loads(text)["findings"]) == (0, [])


@pytest.mark.parametrize(
    "key, code, dtype, message",
    [
        ("layers.3.attn.wq_a.weight", 0x7F, np.uint8, "1 NaN of 2,048 F8_E4M3 values"),
        ("layers.3.attn.wq_a.weight", 0xFF, np.uint8, "1 NaN of 2,048 F8_E4M3 values"),
        ("layers.4.ffn.experts.7.w2.scale", 0xFF, np.uint8, "1 NaN of 64 F8_E8M0 values"),
        ("layers.2.attn_norm.weight", 0x7FC0, np.uint16, "1 NaN of 64 BF16 values"),
        ("layers.2.attn_norm.weight", 0xFF80, np.uint16, "1 infinite of 64 BF16 values"),
        ("mtp.0.hc_attn_fn", 0x7F800001, np.uint32, "1 NaN of 6,144 F32 values"),
        ("hc_head_fn", 0x7F800000, np.uint32, "1 infinite of 1,024 F32 values"),
        ("layers.0.ffn.gate.tid2eid", 8, np.uint64, "1 of 1,536 expert ids are outside 0 to 7"),
    ],
)
def test_check_names_the_tensor(run, checkpoint, tmp_path, key, code, dtype, message):
    directory = tmp_path / "damaged"
    shutil.copytree(checkpoint, directory)
    folder = SafetensorsFolder(directory)
    entry = folder.entries[key]
    path = next(file.path for file in folder.files.values() if key in file.entries)
    place = 3
    with open(path, "r+b") as file:
        file.seek(entry.start + place * np.dtype(dtype).itemsize)
        file.write(np.array(code, dtype).tobytes())
    status, text, _ = run("inspect", directory, "--check")
    assert status == 1
    where = [int(i) for i in np.unravel_index(place, entry.shape)]
    assert f"{key}: {message}, first" in text
    assert f"at {where}" in text


def test_codes_that_look_like_nan_elsewhere_are_fine(run, tmp_path):
    # FP4 has no NaN, the largest E4M3 and E8M0 codes are numbers, and so is minus zero.
    def change(key, out):
        codes = out.reshape(-1).view(np.uint8)
        if out.dtype == np.int8:
            codes[:] = 0xFF
        elif key.endswith(".scale"):
            codes[:] = 0xFE
        elif "wq_b" in key:
            codes[:] = 0x7E
        elif "wo_b" in key:
            codes[:] = 0x80

    _write_checkpoint(tmp_path, get_config("flash_tiny"), change=change)
    assert run("inspect", tmp_path, "--check")[0] == 0


def test_check_names_tensors_as_the_files_do(run, tmp_path):
    def change(key, out):
        if key.endswith("layers.1.attn.norm.weight"):
            out[:2] = np.nan, -np.inf

    plain = dataclasses.replace(
        get_config("flash_tiny"),
        mtp_layers=(),
        dtype="float32",
        quantization=None,
        expert_dtype=None,
    )
    _write_checkpoint(tmp_path, plain, "transformers", change=change)
    status, text, _ = run("inspect", tmp_path, "--check")
    assert status == 1
    assert (
        "Check: 1 found\n  model.layers.1.attn.norm.weight: 1 NaN and 1 infinite of 32 F32" in text
    )


def test_orbax_directories(run, checkpoint, tmp_path):
    target = tmp_path / "orbax"
    convert = ("convert", "--source", checkpoint, "--target", target, "--to", "orbax")
    assert run(*convert)[0] == 0
    theirs = json.loads(run("inspect", checkpoint, "--check", "--format=json")[1])
    ours = json.loads(run("inspect", target, "--check", "--format=json")[1])
    assert (theirs.pop("name"), theirs.pop("files")) == (str(checkpoint), 2)
    assert (ours.pop("name"), ours.pop("files")) == (str(target), 0)
    assert ours == theirs
    (target / ".incomplete").touch()
    assert "has not ended" in run("inspect", target)[2]


def test_draft_blocks_are_shown_and_checked(run, tmp_path):
    config = dataclasses.replace(get_config("flash_tiny"), mtp_layers=(), draft_layers=3)
    drafts = [NewTensor(f"mtp.{k}.main_norm.weight", "BF16", (64,)) for k in range(3)]

    def change(key, out):
        if key == "mtp.2.main_norm.weight":
            out[5] = np.nan

    _write_checkpoint(tmp_path, config, more=drafts, change=change)
    status, text, _ = run("inspect", tmp_path, "--check")
    assert status == 1
    assert "drafts       carried along, never run" in text
    assert "mtp.2.main_norm.weight: 1 NaN of 64 BF16 values, first at [5]" in text


def test_the_stages_of_a_draft_are_shown(run, tmp_path):
    sizes = DSpark(markov_rank=8, noise_token_id=9, target_layer_ids=(3,))
    config = dataclasses.replace(get_config("flash_tiny"), mtp_layers=(), draft_layers=2)
    config = dataclasses.replace(config, dspark=sizes)
    _write_checkpoint(tmp_path, config)
    status, text, _ = run("inspect", tmp_path)
    assert status == 0 and "draft 0" in text and "draft 1" in text and "carried" not in text
    report = json.loads(run("inspect", tmp_path, "--format=json")[1])
    assert report["parameters"]["draft"] == list(count_parameters(config).draft_stages)
    # The last has the norm, the streams' collapse and the heads; the first the context's matrix.
    first, last = report["parameters"]["draft"]
    assert last - first == 64 + (4 * 256 + 4 + 1) + 2 * 512 * 8 + (64 + 8) - (64 * 64 + 64)


def _edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / "b.safetensors").unlink(), "missing, first b.safetensors"),
        (lambda d: os.truncate(d / "a.safetensors", 5000), "a.safetensors: truncated"),
        (lambda d: _edit_config(d, moe_intermediate_size=64), "layers.0.ffn.experts.0.w1.weight"),
        (lambda d: _edit_config(d, num_hash_layers=4), "layers.3.ffn.gate.tid2eid is missing"),
        (lambda d: _edit_config(d, o_groups=3), "num_attention_heads is 4, not divisible"),
        (lambda d: (d / "config.json").unlink(), "config.json"),
    ],
)
def test_damaged_checkpoints_are_refused(run, checkpoint, tmp_path, damage, message):
    directory = tmp_path / "damaged"
    shutil.copytree(checkpoint, directory)
    damage(directory)
    status, text, error = run("inspect", directory)
    assert (status, text) == (2, "")
    assert error.startswith("v4jax inspect: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    "args, message",
    [
        (["inspect"], "v4jax inspect: DIR|NAME is missing"),
        (["inspect", "flash", "pro"], "an argument too many, 'pro'"),
        (["inspect", "nowhere"], "'nowhere' is neither a directory nor a config; .* flash, "),
        (["inspect", "flash_tiny", "--check"], "--check reads a checkpoint's tensors"),
        (["inspect", "flash", "--context=abc"], "--context is 'abc'; expected a positive whole"),
        (["inspect", "flash", "--context=0"], "--context is '0'; expected a positive whole"),
        (["inspect", "flash", "--context"], "--context has no value"),
        (["inspect", "flash", "--format=xml"], "--format is 'xml'; expected text or json"),
        (["inspect", "flash", "--check=maybe"], "--check is 'maybe'; expected true or false"),
        (["inspect", "flash", "--chek"], "there is no flag --chek, maybe --check"),
        (
            ["inspekt"],
            "v4jax: there is no command 'inspekt', maybe inspect; expected one of generate, "
            "chat, serve",
        ),
        (["--versions"], "there is no command '--versions'"),
    ],
)
def test_mistakes_get_one_sentence(run, args, message):
    status, text, error = run(*args)
    assert (status, text, error.count("\n")) == (2, "", 1)
    assert re.search(message.replace("|", r"\|"), error)


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_lists_the_commands(run, flag):
    status, text, error = run(flag)
    assert (status, error) == (0, "")
    for name, command in SUBCOMMANDS.items():
        assert f"{name} " in text and command.summary in text


def test_no_command_is_help_and_an_error(run):
    status, text, error = run()
    assert (status, text) == (2, "")
    assert "Usage: v4jax COMMAND" in error


def test_help_of_a_command_shows_its_own_flags(run):
    status, text, error = run("inspect", "--help")
    assert (status, error) == (0, "")
    assert "Usage: v4jax inspect DIR|NAME [flags]" in text
    flags = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert flags == ["--context", "--check", "--format"]
    assert f"Example:\n  {SUBCOMMANDS['inspect'].example}" in text


def test_flags_of_one_run_do_not_stay(run):
    assert run("inspect", "flash_tiny", "--format=json")[1].startswith("{")
    assert run("inspect", "flash_tiny")[1].startswith("flash_tiny")


def test_interruption(run, monkeypatch):
    def interrupt(source):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "run", interrupt)
    assert run("inspect", "flash")[0] == 130


def _run_alone(code):
    """Runs code in a new interpreter where `v4jax` is a bare package, its __init__ left out."""
    root = Path(__file__).resolve().parents[2]
    bare = (
        f"import sys, types; v = types.ModuleType('v4jax'); v.__path__ = [{str(root / 'v4jax')!r}];"
    )
    command = [sys.executable, "-c", f"{bare} sys.modules['v4jax'] = v\n{code}"]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_help_and_names_need_no_jax():
    process = _run_alone(
        "from v4jax.cli.main import main\n"
        "main(['v4jax', '--help'])\n"
        "assert 'numpy' not in sys.modules\n"
        "status = main(['v4jax', 'inspect', 'nano'])\n"
        "assert 'jax' not in sys.modules\n"
        "sys.exit(status)"
    )
    _, error = process.communicate()
    assert (process.returncode, error) == (0, b"")


def test_a_closed_pipe_is_no_error():
    process = _run_alone(
        "from v4jax.cli.main import main\n"
        "import time; time.sleep(0.5)\n"
        "sys.exit(main(['v4jax', 'inspect', 'nano']))"
    )
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_summaries_are_those_of_the_modules():
    folder = Path(main.__code__.co_filename).parent
    for name, command in SUBCOMMANDS.items():
        path = folder / f"{name}.py"
        if path.is_file():
            first_line = path.read_text(encoding="utf-8").splitlines()[0]
            assert command.summary in first_line, name
