"""The flags of commands that many processes can run."""

import contextlib

from absl import flags

from v4jax.sharding import processes

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares the flags of a subcommand that many processes can run."""
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where all processes meet (default: found)"
    )
    flags.DEFINE_integer("num_processes", None, "How many processes there are (default: found)")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 (default: found)")


def joined_by_flags() -> contextlib.AbstractContextManager[None]:
    """`processes.joined` as the flags say."""
    return processes.joined(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
