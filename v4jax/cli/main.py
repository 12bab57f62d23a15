"""The command `v4jax`: `v4jax SUBCOMMAND [flags]`, one module of this folder a subcommand.

A subcommand's module has `define_flags()` and `run(*arguments) -> exit status`. It is imported when
it is called, so that help and mistakes answer at once.
"""

import contextlib
import dataclasses
import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence

from absl import flags

import v4jax
from v4jax import lifeline, platforms
from v4jax.cli import cpu_settings
from v4jax.errors import InputError
from v4jax.files.json_reader import QUOTED

FLAGS = flags.FLAGS

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE


@dataclasses.dataclass(frozen=True)
class Subcommand:
    """What help says of a subcommand; `arguments` are those that are not flags.

    An argument in brackets may be left out, and one that ends in dots be repeated.
    huge_pages: it runs a model's programs, which are quicker with them on a CPU.
    trains: some of those are training steps.
    """

    module: str
    summary: str
    example: str
    arguments: tuple[str, ...] = ()
    huge_pages: bool = False
    trains: bool = False


SUBCOMMANDS = {
    "generate": Subcommand(
        "v4jax.cli.generate",
        "Continue a prompt with a checkpoint's model.",
        'v4jax generate "def main():" --max_new_tokens 100',
        ("[TEXT...]",),
        huge_pages=True,
    ),
    "chat": Subcommand(
        "v4jax.cli.chat",
        "Talk to a model in the terminal.",
        "v4jax chat --checkpoint DIR --system 'Answer briefly.'",
        huge_pages=True,
    ),
    "serve": Subcommand(
        "v4jax.cli.serve",
        "Serve a checkpoint's model over HTTP, with the APIs of OpenAI.",
        "v4jax serve --checkpoint nano --port 8000",
        huge_pages=True,
    ),
    "keys": Subcommand(
        "v4jax.cli.keys",
        "Make, list and revoke the keys of a server.",
        "v4jax keys create --file keys.json --name alice --requests_per_minute 60",
        ("create|list|revoke",),
    ),
    "forget": Subcommand(
        "v4jax.cli.forget",
        "Delete what a server has kept: of a key, of a request, or from before so many days.",
        "v4jax forget --audit audit --prefix_cache prefixes --key 0123456789abcdef",
    ),
    "bench": Subcommand(
        "v4jax.cli.bench",
        "Measure the engine on a described load: tokens per second and both waits.",
        "v4jax bench --concurrency 8 --requests 64 --prompt_tokens 512 --new_tokens 128",
        huge_pages=True,
    ),
    "eval": Subcommand(
        "v4jax.cli.eval",
        "Evaluate a checkpoint or endpoint: long context, tools, latency, cost, data controls.",
        "v4jax eval needle --checkpoint nano --lengths 512,1024,4096 --samples 40 --out needles",
        ("SUITE", "[DIR...]"),
        huge_pages=True,
    ),
    "tiers": Subcommand(
        "v4jax.cli.tiers",
        "A cheap worker drafts, a strong reviewer judges: cost per completed task, by share.",
        "v4jax tiers --worker nano --reviewer DIR --lengths 1024 --samples 20 --out tiers",
        huge_pages=True,
    ),
    "inspect": Subcommand(
        "v4jax.cli.inspect",
        "Show a model's layers, parameters, bytes, KV cache and FLOPs; check a checkpoint.",
        "v4jax inspect flash --context 131072",
        ("DIR|NAME",),
    ),
    "convert": Subcommand(
        "v4jax.cli.convert",
        "Convert a checkpoint between the official layout, that of transformers, and Orbax.",
        "v4jax convert --source DeepSeek-V4-Flash --target flash-orbax --to orbax --verify",
    ),
    "plan": Subcommand(
        "v4jax.cli.plan",
        "Compile a step for a slice that is not here: memory, exchanges, time of each device.",
        "v4jax plan --config flash --mode decode --context 1048576 --topology v5p --search",
    ),
    "tune": Subcommand(
        "v4jax.cli.tune",
        "Measure block sizes of the Pallas kernels on this TPU or GPU.",
        "v4jax tune --out blocks.json && V4JAX_BLOCKS=blocks.json v4jax generate",
    ),
    "train": Subcommand(
        "v4jax.cli.train",
        "Train a model; run again, it goes on. --config.KEY=VALUE sets any field of the config.",
        "v4jax train --config train_tiny --workdir run --config.schedule.peak=3e-3",
        huge_pages=True,
        trains=True,
    ),
    "plot": Subcommand(
        "v4jax.cli.plot",
        "Draw the curves of one or several runs.",
        "v4jax plot run another_run --out curves.png",
        ("DIR...",),
    ),
    "sweep": Subcommand(
        "v4jax.cli.sweep",
        "Run an experiment's list of changed configs, each resumable; one table and one plot.",
        "v4jax sweep experiments/007_indexer_loss",
        ("DIR",),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; `argv` starts with the program's name."""
    _print_anything()
    name, *args = list(sys.argv if argv is None else argv)[1:] or [""]
    program = f"v4jax {name}" if name in SUBCOMMANDS else "v4jax"
    try:
        if name in SUBCOMMANDS:
            if argv is None:
                _prepare_process(SUBCOMMANDS[name])
            status = _run(name, args)
        else:
            status = _say_about_us(name, args)
        _flush()  # here a closed pipe can still be told from a mistake of ours
        return status
    except InputError as error:
        return _complain(program, str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return BROKEN_PIPE
    except OSError as error:
        return _complain(program, _system_error(error))


def _prepare_process(command):
    platforms.settle_command()
    if command.trains:
        cpu_settings.compile_for_training()
    if command.huge_pages:
        cpu_settings.start_again_with_huge_pages()
    lifeline.watch()


def _say_about_us(name, args):
    """Help, the version, and what to say where no command is named."""
    if name in ("--version", "version"):
        print(f"v4jax {v4jax.__version__}")
        return 0
    if name in ("--help", "-h", "help"):
        if args and args[0] in SUBCOMMANDS:
            return _run(args[0], ["--help"])
        print(_help())
        return 0
    if not name:
        print(_help(), file=sys.stderr)
        return BAD_INPUT
    near = difflib.get_close_matches(name[:QUOTED], SUBCOMMANDS, n=1)
    raise InputError(
        f"there is no command {name[:QUOTED]!r}{f', maybe {near[0]}' if near else ''}; "
        f"expected one of {', '.join(SUBCOMMANDS)}"
    )


def _flush():
    if sys.stdout is not None:  # it is None where the shell has closed it
        sys.stdout.flush()


def _drop_stdout():
    """Keeps the interpreter from flushing stdout once more when it exits, and complaining again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _system_error(error):
    """What the system refused, where nothing closer to it made a sentence of it."""
    try:
        _flush()
    except OSError:
        _drop_stdout()
    reason = error.strerror or str(error)[:QUOTED]
    return reason if error.filename is None else f"{str(error.filename)[:QUOTED]}: {reason}"


def _print_anything():
    """Has the streams escape characters that their encoding lacks, which would end the command."""
    for stream in (sys.stdout, sys.stderr):
        strict = getattr(stream, "errors", None) in ("strict", "surrogateescape")
        if strict and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _run(name, args):
    command = SUBCOMMANDS[name]
    program = f"v4jax {name}"
    module = importlib.import_module(command.module)
    with _flags_of(module) as own_flags:
        if _asks_for_help(args):
            print(_command_help(name, own_flags))
            return 0
        if hasattr(module, "prepare"):  # flags that cannot be declared
            args = module.prepare(args)
        try:
            arguments = FLAGS([program, *_underscored(args)])[1:]
            _check_count(command.arguments, arguments)
        except (flags.Error, ValueError) as error:  # ValueError: --noswitch=true
            raise InputError(f"{_flag_error(error)}; see {program} --help") from error
        return module.run(*arguments)


def _asks_for_help(args):
    before = args[: args.index("--")] if "--" in args else args
    return bool({"--help", "-h"} & set(before))


@contextlib.contextmanager
def _flags_of(module):
    """Declares a subcommand's flags for as long as it runs; yields their names in order."""
    others = set(FLAGS)
    FLAGS.set_gnu_getopt(True)  # flags may follow arguments
    module.define_flags()
    own = [name for name in FLAGS if name not in others]
    try:
        yield own
    finally:
        for name in own:
            delattr(FLAGS, name)


def _underscored(args):
    """The arguments with declared flags in their own spelling: --max-new-tokens is fine too."""
    spelt, value_follows = [], False
    for number, arg in enumerate(args):
        if arg == "--" and not value_follows:
            return spelt + args[number:]
        match = re.match(r"--?([A-Za-z][\w-]*)(=.*)?$", arg, re.DOTALL)
        name = match[1].replace("-", "_") if match and not value_follows else ""
        declared = name in FLAGS
        if arg.startswith("-") and not value_follows and len(arg.partition("=")[0]) > QUOTED:
            # absl would look for names like it, letter by letter, each a call within the other.
            raise flags.Error(f"Unknown command line flag '{arg.lstrip('-')}'")
        if declared or name.removeprefix("no") in FLAGS:
            arg = f"--{name}{match[2] or ''}"
        spelt.append(arg)
        value_follows = declared and match[2] is None and not FLAGS[name].boolean
    return spelt


def _check_count(expected, found):
    needed = [name for name in expected if not name.startswith("[")]
    if len(found) < len(needed):
        raise flags.Error(f"{needed[len(found)]} is missing")
    if len(found) > len(expected) and not (expected and "..." in expected[-1]):
        raise flags.Error(f"there is an argument too many, {found[len(expected)][:QUOTED]!r}")


def _flag_error(error):
    """absl's error as the house writes them: what, found, expected."""
    text = " ".join(str(error).split())
    if match := re.match(r"Unknown command line flag '(.*)'", text):
        return _unknown_flag(match[1], re.search(r"Did you mean: (\w+)", text))
    if match := re.match(r"Missing value for flag -*(\S+)", text):
        return f"--{match[1]} has no value; expected {_expected(FLAGS[match[1]])}"
    # Python's reason has a colon too, and so may the value: the reason begins with known words.
    reason = r"invalid literal for int|could not convert string|value should be one of|\S+ is not "
    match = re.match(rf"flag --(\w+)=(.*?): (?:{reason})", text)
    if match := match or re.match(r"flag --(\w+)=(.*): ", text):
        found = "is missing" if match[2] == "None" else f"is {match[2][:QUOTED]!r}"
        return f"--{match[1]} {found}; expected {_expected(FLAGS[match[1]])}"
    return text[: 2 * QUOTED]


def _unknown_flag(name, near):
    if near:
        return f"there is no flag --{name[:QUOTED]}, maybe --{near[1]}"
    # A text to continue may begin with a dash, and so may a file's name.
    return f"there is no flag --{name[:QUOTED]}; an argument that begins with a dash follows --"


def _expected(flag):
    values = getattr(flag.parser, "enum_values", None)
    if values:
        return " or ".join(values)
    if flag.boolean:
        return "true or false"
    text = flag.parser.syntactic_help.replace("an integer", "a whole number")
    return text.replace("integer", "whole number") or "a value"


def _complain(program, sentence):
    print(f"{program}: {sentence}", file=sys.stderr)
    return BAD_INPUT


def _help():
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "Usage: v4jax COMMAND [flags]",
            "",
            "DeepSeek-V4 in JAX.",
            "",
            "Commands:",
            *lines,
            "",
            "v4jax COMMAND --help says more, v4jax --version which version this is.",
        ]
    )


def _command_help(name, own_flags):
    command = SUBCOMMANDS[name]
    words = ["v4jax", name, *command.arguments]
    heads = [_flag_head(FLAGS[flag]) for flag in own_flags]
    width = max(map(len, heads), default=0)
    lines = [
        f"  {head:{width}}  {_flag_help(FLAGS[flag])}"
        for head, flag in zip(heads, own_flags, strict=True)
    ]
    return "\n".join(
        [
            f"Usage: {' '.join(words)} [flags]",
            "",
            command.summary,
            "",
            "Flags:",
            *lines,
            "",
            "Example:",
            f"  {command.example}",
        ]
    )


def _flag_head(flag):
    values = getattr(flag.parser, "enum_values", None)
    kind = "|".join(values) if values else {"int": "N", "float": "X"}.get(_type(flag), "TEXT")
    return f"--{flag.name}" if flag.boolean else f"--{flag.name} {kind}"


def _flag_help(flag):
    # absl repeats the values of an enum, and says at length that a flag may be repeated.
    text = re.sub(r"^<[^>]*>: ", "", " ".join(flag.help.split()))
    text = re.sub(r"repeat this option to specify a list of values$", "may be repeated", text)
    shown = flag.default is not None and flag.default is not False and flag.default != []
    return f"{text} (default: {flag.default})" if shown and "default" not in text else text


def _type(flag):
    return flag.flag_type().removeprefix("multi ")


if __name__ == "__main__":
    sys.exit(main())
