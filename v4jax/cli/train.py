"""Train a model: from a config file to checkpoints, metrics and a model in the official layout."""

import re

from absl import flags

from v4jax.cli import compilation_cache, process_flags
from v4jax.errors import InputError
from v4jax.files.writing import writable_directory

FLAGS = flags.FLAGS
TERMINATED = 143  # 128 + SIGTERM, as shells report it

_overrides: dict[str, str] = {}


def define_flags():
    """Declares the flags of this subcommand."""
    flags.DEFINE_string(
        "config",
        None,
        "Python file whose get_config() gives the run or a model, or a name such as train_tiny",
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "Directory of the run; running again goes on in it, with the config that it was begun with",
    )
    flags.DEFINE_boolean(
        "change",
        False,
        "Go on with the given schedule.*, evaluate_rows, and steps and learning_rate of the last "
        "stage, not with those that the run was begun with. What changes no number (mesh, remat, "
        "a stage's parts, keep, checkpoint_every, log_every, evaluate_every) needs no flag",
    )
    flags.DEFINE_integer("steps", None, "Stop at this step; default: the config's", lower_bound=1)
    process_flags.define_flags()
    compilation_cache.define_flag()


def prepare(args: list[str]) -> list[str]:
    """Takes out --config.KEY=VALUE, which absl cannot know beforehand."""
    _overrides.clear()
    rest = []
    for arg in args:
        match = re.match(r"--config\.([\w.]+)=(.*)$", arg, re.DOTALL)
        if match:
            _overrides[match[1]] = match[2]
        elif arg.startswith("--config."):
            raise InputError(f"{arg} has no value; expected --config.KEY=VALUE")
        else:
            rest.append(arg)
    return rest


def run() -> int:
    """Trains and says where it ended; the exit status."""
    for name, expected in (("config", "a Python file"), ("workdir", "a directory")):
        if not getattr(FLAGS, name):
            raise InputError(f"--{name} is missing; expected {expected}")
    with process_flags.joined_by_flags():
        compilation_cache.begin()
        return _train()


def _train():
    from v4jax.train import config_file

    config = config_file.read(FLAGS.config, _overrides)
    writable_directory(FLAGS.workdir, "--workdir")
    from v4jax.train import loop

    result = loop.train(config, FLAGS.workdir, FLAGS.steps, FLAGS.change, _overrides)
    loss = _loss(result.last)
    how = "stopped" if result.stopped else "trained"
    print(f"v4jax train: {how} at step {result.step}{loss}: {FLAGS.workdir}")
    return TERMINATED if result.stopped else 0


def _loss(line):
    if not line:
        return ", nothing left to do"
    loss = ", no targets" if line["loss"] is None else f", loss {line['loss']:.4f}"
    held_out = line.get("held_out")
    return loss if held_out is None else f"{loss}, held-out loss {held_out:.4f}"
