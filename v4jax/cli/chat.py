"""Talk to a model in the terminal.

Answers go to stdout; the reasoning, calls of tools and everything else go to stderr, so that
`echo "What is 2 + 2?" | v4jax chat > answer` has the answer alone. Ctrl-C stops an answer, Ctrl-D
or /exit the program.
"""

import contextlib
import os
import sys
from pathlib import Path

from absl import flags

from v4jax.chat.format import PROFILES, ChatFormat
from v4jax.chat.session import CONTENT, REASONING, Session
from v4jax.checkpoints import load as checkpoint
from v4jax.cli import compilation_cache, draft_flags
from v4jax.cli.generate import tell_compiling
from v4jax.engine.engine import Engine
from v4jax.engine.prefix_cache import PrefixCache
from v4jax.errors import InputError
from v4jax.files.json_reader import read_json
from v4jax.hf.config import read_config

FLAGS = flags.FLAGS

MOST_TOKENS = 16_384  # of a conversation, where --max_length says nothing
EFFORTS = ("on", "off", "low", "high", "max")
HELP = """\
/think on|off|low|high|max   let the model reason before it answers; without a word: turn it over
/tools FILE                  tools that it may call, a JSON list as Chat Completions has; - for none
/system TEXT                 what it is told first
/save FILE                   write the conversation as JSON
/new                         begin anew
/help, /exit
Results of tools are asked for line by line. Ctrl-C stops an answer."""


def define_flags():
    """Declares the flags of this subcommand."""
    flags.DEFINE_string("checkpoint", "nano", "Checkpoint directory, or the name of a packaged one")
    flags.DEFINE_string("system", None, "What the model is told first")
    flags.DEFINE_enum("think", "on", EFFORTS, "Whether and how hard it reasons first")
    flags.DEFINE_string("tools", None, "JSON file with a list of tools as Chat Completions has")
    flags.DEFINE_enum(
        "profile", PROFILES[0], PROFILES, "v4-preview: the chat format of April's checkpoints"
    )
    flags.DEFINE_integer("max_new_tokens", None, "Tokens of an answer (default: all that fit)")
    flags.DEFINE_float("temperature", None, "Default: 1, the format's own")
    flags.DEFINE_float("top_p", None, "Default: the format's own")
    flags.DEFINE_integer("seed", 0, "The same seed draws the same answers")
    flags.DEFINE_integer(
        "max_length", None, f"Tokens of a conversation (default: {MOST_TOKENS}, or the model's)"
    )
    flags.DEFINE_string("prefix_cache", None, "Directory for prefixes (default: in memory)")
    draft_flags.define_flags()
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Activations (default: the model's)")
    flags.DEFINE_enum(
        "weights", "stored", ["stored", "bf16", "float32"], "How weights are kept in memory"
    )
    compilation_cache.define_flag()


def run() -> int:
    """Talks until the input ends; the exit status."""
    compilation_cache.begin()
    name, session, engine = _session()
    with engine:
        engine.start()  # so that an interrupt reaches the terminal's thread alone
        if FLAGS.tools:
            _tools(session, FLAGS.tools)
        if sys.stdin.isatty():
            _say(f"{name}: /help for commands, Ctrl-D to end")
        while (line := _line("> ")) is not None:
            try:
                if line.startswith("/"):
                    if not _command(session, line):
                        break
                elif line.strip():
                    _talk(session, line)
            except (InputError, OSError) as error:
                _say(str(error))
    return 0


def _session():
    directory = checkpoint.locate(FLAGS.checkpoint)
    checkpoint.check_finished(directory)
    # Whatever can be wrong without the weights is said before they are read.
    limit = read_config(os.path.join(directory, "config.json")).max_position_embeddings
    length = min(limit, MOST_TOKENS) if FLAGS.max_length is None else FLAGS.max_length
    name = Path(os.path.abspath(directory)).name
    chat = ChatFormat(directory, name, FLAGS.profile, max_length=length)
    model, params = checkpoint.load(directory, dtype=FLAGS.dtype, weights=FLAGS.weights)
    engine = Engine(
        model,
        params,
        slots=1,
        max_length=length,
        draft=draft_flags.draft(),
        prefix_cache=PrefixCache(directory=FLAGS.prefix_cache),
        seed=FLAGS.seed,
        tokenizer=chat.tokenizer,
        programs=compilation_cache.programs(),
        on_compile=tell_compiling,
    )
    names = ("max_new_tokens", "temperature", "top_p")
    sampling = {key: getattr(FLAGS, key) for key in names if getattr(FLAGS, key) is not None}
    return name, Session(engine, chat, FLAGS.system, _effort(FLAGS.think), **sampling), engine


def _effort(word):
    return {"on": None, "off": "none"}.get(word, word)


def _talk(session, line):
    """One message, its answer, and the results of tools that the answer asks for."""
    answer = session.ask(line)
    while _show(answer) and (calls := session.open_calls()):
        results = []
        for call in calls:
            result = _line(f"result of {call['function']['name']}> ")
            if result is None:
                raise InputError("the input ended before the tool's result; the call stays open")
            results.append(result)
        answer = session.give(results)


def _show(answer) -> bool:
    """Prints an answer as it comes; whether it was not interrupted."""
    kind = None
    try:
        for piece in answer:
            if piece.kind != kind and kind is not None:
                _end_line(kind)
            kind = piece.kind
            _write(piece)
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):
            answer.close()
        _say(" (stopped)")
        return False
    finally:
        if kind == CONTENT:
            _end_line(kind)
        elif kind == REASONING:
            _say("")
    return True


def _write(piece):
    if piece.kind == CONTENT:
        print(piece.text, end="", flush=True)
    else:
        end = "" if piece.kind == REASONING else "\n"
        print(_dim(piece.text), end=end, file=sys.stderr, flush=True)


def _end_line(kind):
    """Ends the line of what was printed so far, notes have ended theirs."""
    if kind == CONTENT:
        print(flush=True)
    elif kind == REASONING:
        print(file=sys.stderr, flush=True)


def _dim(text):
    """Faint on a terminal that takes it."""
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\033[2m{text}\033[0m"


def _command(session, line) -> bool:
    """Does what a line with a slash says; whether to go on."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name in ("/exit", "/quit"):
        return False
    if name == "/help":
        _say(HELP)
    elif name == "/new":
        session.forget()
    elif name == "/system":
        session.system = rest or None
    elif name == "/think":
        _think(session, rest)
    elif name == "/tools":
        _tools(session, rest)
    elif name == "/save":
        _save(session, rest)
    else:
        raise InputError(f"there is no {name[:40]}; /help names what there is")
    return True


def _think(session, word):
    if word and word not in EFFORTS:
        raise InputError(f"/think {word[:40]}: expected one of {', '.join(EFFORTS)}")
    word = word or ("on" if session.effort == "none" else "off")
    session.effort = _effort(word)
    _say(f"thinking is {word}")


def _tools(session, path):
    if not path:
        raise InputError("/tools needs a file, a JSON list of tools; - takes all away")
    session.use_tools([] if path == "-" else read_json(path, 1 << 20))
    _say(f"{len(session.tools)} tools")


def _save(session, path):
    if not path:
        raise InputError("/save needs the name of a file")
    Path(path).write_text(session.saved(), encoding="utf-8")
    _say(f"saved {len(session.messages)} messages to {path}")


def _line(prompt) -> str | None:
    """The next line; None at the end of the input. An interrupt takes the line back."""
    while True:
        try:
            if sys.stdin.isatty():
                with contextlib.suppress(ImportError):
                    import readline  # noqa: F401  (gives input its history)
                return input(prompt)
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        except EOFError:
            return None
        except KeyboardInterrupt:
            _say("")


def _say(line):
    print(line, file=sys.stderr, flush=True)
