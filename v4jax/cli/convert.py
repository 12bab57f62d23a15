"""Convert a checkpoint between the official layout, that of transformers, and Orbax.

Progress goes to stderr, one summary line to stdout. Several processes share the work.
"""

from absl import flags

from v4jax.checkpoints.convert import convert
from v4jax.checkpoints.target import TARGETS
from v4jax.cli import process_flags
from v4jax.errors import InputError

FLAGS = flags.FLAGS


def define_flags():
    """Declares the flags of this subcommand."""
    flags.DEFINE_string(
        "source", None, "Checkpoint to convert: official, transformers or Orbax directory, or nano"
    )
    flags.DEFINE_string(
        "target", None, "New directory, or one in which this conversion was interrupted"
    )
    flags.DEFINE_enum("to", None, list(TARGETS), "Layout of the target")
    flags.DEFINE_enum(
        "weights",
        "stored",
        ["stored", "bf16", "float32"],
        "Keep FP8 and FP4, or expand them; --to=transformers always expands them",
    )
    flags.DEFINE_boolean(
        "verify", False, "Compare every tensor with the source; alone if the target is there"
    )
    process_flags.define_flags()


def run() -> int:
    """Converts and prints what was done; the exit status."""
    for name, expected in (("source", "a directory"), ("target", "a directory")):
        if not FLAGS[name].value:
            raise InputError(f"--{name} is missing; expected {expected}")
    if FLAGS.to is None:
        raise InputError("--to is missing; expected official, transformers or orbax")
    with process_flags.joined_by_flags():
        report = convert(FLAGS.source, FLAGS.target, FLAGS.to, FLAGS.weights, FLAGS.verify)
        print(f"{report}: {FLAGS.target}")
    return 0
