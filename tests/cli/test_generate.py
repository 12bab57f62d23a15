import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.infer.test_tokenizer import byte_level
from tests.support.checkpoints import small_config, synthetic
from tests.support.toy_model import ToyModel, toy_config
from v4jax.checkpoints import load as checkpoint
from v4jax.checkpoints.convert import convert
from v4jax.checkpoints.source import read_announced
from v4jax.cli import generate as cli_generate
from v4jax.cli.main import INTERRUPTED, main
from v4jax.config import WINDOW
from v4jax.hf.config import to_hf
from v4jax.infer.generate import generate
from v4jax.infer.tokenizer import Tokenizer
from v4jax.sharding.rules import ONE_DEVICE

MODEL = ToyModel(toy_config(vocab_size=258))
PARAMS = jax.jit(MODEL.init)(jax.random.key(4))
MAX_LENGTH = 32


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A checkpoint directory with a tokenizer; whatever is loaded is the toy model."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(to_hf(MODEL.config)))
    monkeypatch.setattr(checkpoint, "load", lambda path, **options: (MODEL, PARAMS))
    return tmp_path


@pytest.fixture
def run(directory, capsys):
    """Runs the subcommand on that directory: status, stdout, stderr."""

    def call(*args):
        # One length of cache for all tests, so that each compiles nothing of its own.
        options = (f"--checkpoint={directory}", f"--max_length={MAX_LENGTH}")
        status = main(["v4jax", "generate", *options, *args])
        return (status, *capsys.readouterr())

    return call


def continuation(tokenizer, prompt, **options):
    return directly(tokenizer.encode(prompt), **options).tokens[0]


def directly(prompts, **options):
    return generate(MODEL, PARAMS, prompts, max_length=MAX_LENGTH, **options)


def test_one_prompt_and_its_continuation_go_to_stdout(run, directory):
    tokenizer = Tokenizer(directory)
    status, out, err = run("--prompt", "héllo", "--max_new_tokens=9")
    tokens = continuation(tokenizer, "héllo", max_new_tokens=9)
    assert status == 0
    assert out == "héllo" + tokenizer.decode(tokens) + "\n"
    loaded, summary = err.splitlines()  # what is being compiled is told to terminals only
    assert loaded.startswith(f"{directory}: ")
    assert "11 layers, stored as float32 in" in loaded
    assert summary.startswith("6 prompt tokens, 9 new tokens, first token after ")
    # What a person waited is compiling and reading the prompt together.
    waited, compiled, read = map(float, re.findall(r"(\d+\.\d+) s", summary))
    assert waited == pytest.approx(compiled + read, abs=0.02)
    assert summary.endswith(" tokens/s, finished: length")


def test_a_terminal_is_told_what_is_compiled_and_for_how_long(run, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    run("--prompt=abc", "--max_new_tokens=3")
    told = terminal.getvalue().splitlines()[1]
    names = "prefill of 16 tokens, choice of a token, decode step"
    assert re.fullmatch(rf"compiling {names} \.\.\. \d+\.\d s", told)


def test_texts_may_stand_without_a_flag(run):
    bare = run("abc", "--max-new-tokens", "4")
    assert bare[0] == 0 and bare[1] == run("--prompt=abc", "--max_new_tokens=4")[1]
    two = run("abc", "--prompt=x", "--max_new_tokens=4")[1]
    assert two == run("--prompt=abc", "--prompt=x", "--max_new_tokens=4")[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--temperature=-1"], "temperature is -1.0; expected 0"),
        (["--prompt="], "prompt 0 is empty"),
        (["--prompt_ids="], "prompt 0 is empty"),
        (["--prompt_ids=5,999"], "token 1 of prompt 0 is 999; expected 0 to 257"),
        (["--max_new_tokens=0"], "max_new_tokens is 0; expected a whole number, 1 or more"),
        (["--max_length=3", "--prompt=abcdef"], "prompt 0 has 6 tokens"),
        (["--seed=-1"], "seed is -1"),
        (["--stop_ids=300"], "a stop id is 300; expected a whole number, 0 to 257"),
        (["--top_p=0"], "top_p is 0.0"),
        (["--mesh=expert=--8"], "mesh"),
        (["--mesh=expert=3"], "mesh"),
        (["text", "--prompt_ids=1"], "a text and --prompt_ids are both given"),
    ],
)
def test_what_is_wrong_is_said_before_weights_are_read(
    directory, words, sentence, monkeypatch, capsys
):
    def load(path, **options):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(checkpoint, "load", load)
    assert main(["v4jax", "generate", f"--checkpoint={directory}", *words]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


@pytest.mark.parametrize("form", ["official", "orbax"])
def test_config_json_is_read_once(tmp_path, form, monkeypatch):
    source = synthetic(tmp_path / "official", small_config(layers=(WINDOW,), mtp_layers=()))
    if form == "orbax":
        convert(source, tmp_path / "orbax", to="orbax")
        source = tmp_path / "orbax"
    opened = []
    real = os.open

    def counted(path, *args, **options):
        opened.append(os.path.basename(os.fspath(path)))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", counted)
    monkeypatch.setattr(cli_generate, "generate", interrupted)
    command = ["v4jax", "generate", f"--checkpoint={source}", "--prompt_ids=1,2"]
    assert main(command) == INTERRUPTED
    assert opened.count("config.json") == 1


def interrupted(*args, **options):
    raise KeyboardInterrupt


def test_the_default_prompt_is_python(run, directory):
    # The toy tokenizer takes a token for every byte, so the cache is longer than for other tests.
    status, out, _ = run("--max_new_tokens=3", "--max_length=256")
    assert status == 0
    assert out.startswith("class Reader:\n    def __init__(self")


def test_the_settings_reach_the_sampler(run, directory):
    tokenizer = Tokenizer(directory)
    settings = {"temperature": 1.3, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 5}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    _, out, _ = run("--prompt=a", "--max_new_tokens=9", *flags)
    tokens = continuation(tokenizer, "a", max_new_tokens=9, **settings)
    assert out == "a" + tokenizer.decode(tokens) + "\n"
    assert tokens != continuation(tokenizer, "a", max_new_tokens=9)


def test_the_loader_gets_its_settings(run, directory, monkeypatch):
    seen, short = {}, ("--prompt=a", "--max_new_tokens=1")
    monkeypatch.setattr(
        checkpoint, "load", lambda path, **options: seen.update(options) or (MODEL, PARAMS)
    )
    run("--dtype=bfloat16", "--weights=float32", "--numerics=native", *short)
    same = {"shards": ONE_DEVICE, "announced": read_announced(directory)}
    asked = {"dtype": "bfloat16", "weights": "float32", "numerics": "native"}
    assert seen == asked | same | {"verify": True}
    run("--noverify", *short)
    asked = {"dtype": None, "weights": "stored", "numerics": None}
    assert seen == asked | same | {"verify": False}
    run("--mesh=expert=4,sequence=2", *short)
    assert seen["shards"].mesh.shape["expert"] == 4 and seen["shards"].size("sequence") == 8


def test_ids_serve_where_there_is_no_tokenizer(run, directory):
    (directory / "tokenizer.json").unlink()
    status, out, _ = run("--prompt_ids=5,6,7", "--max_new_tokens=4")
    tokens = directly([5, 6, 7], max_new_tokens=4).tokens[0]
    assert status == 0
    assert out == ",".join(map(str, [5, 6, 7, *tokens])) + "\n"
    # What was printed is itself a prompt.
    assert run(f"--prompt_ids={out.strip()}", "--max_new_tokens=1")[1].startswith(out.strip())


def test_ids_are_shown_as_text_where_there_is_a_tokenizer(run, directory):
    tokenizer = Tokenizer(directory)
    ids = ",".join(map(str, tokenizer.encode("xyz")))
    by_ids = run("--prompt_ids", ids, "--max_new_tokens=4")
    assert by_ids[:2] == run("--prompt=xyz", "--max_new_tokens=4")[:2]


def test_several_prompts_are_printed_under_headers(run, directory):
    tokenizer = Tokenizer(directory)
    status, out, err = run("--prompt=one", "--prompt=number two", "--max_new_tokens=5")
    ids = [tokenizer.encode("one"), tokenizer.encode("number two")]
    expected = directly(ids, max_new_tokens=5).tokens
    blocks = [
        f"--- prompt {row} (length) ---\n{prompt}{tokenizer.decode(expected[row])}\n"
        for row, prompt in enumerate(["one", "number two"])
    ]
    assert (status, out) == (0, "".join(blocks))
    assert "13 prompt tokens, 10 new tokens" in err
    assert err.endswith("finished: length, length\n")


def test_json_is_one_object(run, directory):
    tokenizer = Tokenizer(directory)
    status, out, err = run("--format=json", "--prompt=ab", "--prompt=abcdé", "--max_new_tokens=5")
    found = json.loads(out)
    ids = [tokenizer.encode("ab"), tokenizer.encode("abcdé")]
    expected = directly(ids, max_new_tokens=5)
    assert status == 0
    assert out.count("\n") == 1
    assert found["checkpoint"] == str(directory)
    assert found["prompts"] == ["ab", "abcdé"]
    assert found["prompt_ids"] == ids
    assert found["tokens"] == expected.tokens
    assert found["text"] == [tokenizer.decode(tokens) for tokens in expected.tokens]
    assert found["finish_reason"] == ["length", "length"]
    assert (found["prompt_tokens"], found["new_tokens"]) == ([2, 6], [5, 5])
    assert found["time_to_first_token"] > 0
    assert found["tokens_per_second"] > 0
    assert "tokens/s" in err


def test_json_without_a_tokenizer_has_no_text(run, directory):
    (directory / "tokenizer.json").unlink()
    found = json.loads(run("--format=json", "--prompt_ids=5", "--max_new_tokens=2")[1])
    assert (found["prompts"], found["text"]) == ([None], [None])
    assert len(found["tokens"][0]) == 2


def test_the_models_end_token_stops_unless_told_otherwise(run, directory, monkeypatch):
    tokens = continuation(Tokenizer(directory), "ab", max_new_tokens=6)
    at = tokens.index(tokens[3])
    model = ToyModel(toy_config(vocab_size=258, eos_token_id=(257, tokens[3])))
    monkeypatch.setattr(checkpoint, "load", lambda path, **options: (model, PARAMS))
    (directory / "config.json").write_text(json.dumps(to_hf(model.config)))
    command = ["--format=json", "--prompt=ab", "--max_new_tokens=6"]
    found = json.loads(run(*command)[1])
    assert (found["tokens"], found["finish_reason"]) == ([tokens[:at]], ["stop"])
    assert json.loads(run(*command, "--stop_ids=")[1])["tokens"] == [tokens]
    found = json.loads(run(*command, f"--stop_ids={tokens[0]},3")[1])
    assert (found["tokens"], found["finish_reason"]) == ([[]], ["stop"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt=a", "--prompt_ids=1"], "a text and --prompt_ids are both given"),
        (["--prompt_ids=1,x"], "--prompt_ids is '1,x'; expected whole numbers between commas"),
        (["--prompt_ids=1,,2"], "--prompt_ids is '1,,2'"),
        (["--prompt_ids="], "prompt 0 is empty"),
        (["--prompt="], "prompt 0 is empty"),
        (["--prompt_ids=1,258"], "token 1 of prompt 0 is 258; expected 0 to 257"),
        (["--stop_ids=1;2"], "--stop_ids is '1;2'"),
        (["--max_new_tokens=0"], "max_new_tokens is 0"),
        (["--max_new_tokens=many"], "--max_new_tokens is 'many'; expected a"),
        (["--temperature=-1"], "temperature is -1.0"),
        (["--top_p=1.5"], "top_p is 1.5"),
        (["--max_length=8", "--prompt=abc"], "prompt 0 has 3 tokens"),
        (["--format=yaml"], "--format is 'yaml'; expected text or json"),
        (["--checkpoint=nowhere"], "--checkpoint is 'nowhere', and there is no directory nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_2(args, message, run):
    status, out, err = run(*args)
    assert status == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert out == ""


def test_half_a_conversion_is_named_before_anything_that_it_lacks(run, directory):
    (directory / "tokenizer.json").unlink()
    (directory / ".incomplete").touch()
    status, out, err = run("--prompt", "a")
    assert status == 2 and out == ""
    assert "has not ended; run the same v4jax convert again" in err


def test_text_needs_a_tokenizer(run, directory):
    (directory / "tokenizer.json").unlink()
    status, out, err = run("--prompt=a")
    assert (status, out) == (2, "")
    assert "there is no tokenizer at" in err
    assert "--prompt_ids" in err


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_interrupt_leaves_what_there_is(form, run, monkeypatch):
    def interrupted(*args, on_token, **options):
        for token in b"xyz":
            on_token(0, token)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_generate, "generate", interrupted)
    status, out, err = run("--prompt_ids=1,2", "--max_new_tokens=8", f"--format={form}")
    assert status == 130
    assert "2 prompt tokens, 3 new tokens" in err
    assert err.endswith("finished: interrupted\n")
    if form == "json":
        assert json.loads(out)["tokens"] == [list(b"xyz")]
    else:
        assert out.endswith("\n")


def test_an_interrupt_before_the_first_token(run, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_generate, "generate", interrupted)
    status, _, err = run("--prompt=a", "--max_new_tokens=8")
    assert status == 130
    assert "1 prompt tokens, 0 new tokens" in err


def test_a_closed_pipe_ends_it_quietly(directory):
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "from tests.cli.test_generate import MODEL, PARAMS\n"
        "from v4jax.checkpoints import load as checkpoint\n"
        "from v4jax.cli.main import main\n"
        "checkpoint.load = lambda path, **options: (MODEL, PARAMS)\n"
        "sys.exit(main(sys.argv))\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parents[2]), "generate"]
    process = subprocess.Popen(
        [*command, f"--checkpoint={directory}", "--max_new_tokens=8"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 141
    assert "Traceback" not in err
    assert "Exception ignored" not in err


def test_help_names_every_flag(capsys):
    assert main(["v4jax", "generate", "--help"]) == 0
    out = capsys.readouterr().out
    for flag in ("prompt_ids", "max_new_tokens", "temperature", "min_p", "stop_ids", "format"):
        assert f"--{flag}" in out


@pytest.mark.parametrize("encoding", ["ascii", "ascii:surrogateescape", "latin-1", "utf-8"])
@pytest.mark.parametrize("format", ["text", "json"])
def test_a_terminal_of_another_encoding_gets_escapes(run, monkeypatch, encoding, format):
    name, _, errors = encoding.partition(":")
    raw, wrong = io.BytesIO(), io.BytesIO()
    for stream, into in (("stdout", raw), ("stderr", wrong)):
        wrapper = io.TextIOWrapper(into, name, errors or "strict")
        monkeypatch.setattr(sys, stream, wrapper)
    assert run("--prompt", "h\u00e9 \u65e5", "--max_new_tokens=2", f"--format={format}")[0] == 0
    sys.stdout.flush()
    shown = raw.getvalue().decode(name)
    if format == "text":
        expected = "h\u00e9 \u65e5".encode(name, "backslashreplace").decode(name)
        assert shown.startswith(expected)
    else:
        assert json.loads(shown)["prompts"] == ["h\u00e9 \u65e5"]


def test_special_tokens_of_a_prompt_are_text_unless_asked(run, directory):
    prompt = "a<eos>b"
    rows = [
        json.loads(run("--prompt", prompt, "--max_new_tokens=1", "--format=json", *how)[1])
        for how in ((), ("--special_tokens",))
    ]
    ids = [row["prompt_ids"][0] for row in rows]
    assert 257 not in ids[0] and Tokenizer(directory).decode(ids[0]) == prompt
    assert ids[1] == [64, 257, 65]
