"""Draw the curves of one or several runs as a PNG."""

from pathlib import Path

from absl import flags

from v4jax.errors import InputError
from v4jax.files.writing import writable_file

FLAGS = flags.FLAGS


def define_flags():
    """Declares the flags of this subcommand."""
    flags.DEFINE_string("out", None, "PNG file to write")


def run(*directories: str) -> int:
    """Draws and says where; the exit status."""
    if not FLAGS.out:
        raise InputError("--out is missing; expected a PNG file")
    writable_file(FLAGS.out, "--out", ".png")
    from v4jax.train import curves

    runs = {name: [curves.lines_of(Path(name))] for name in directories}
    curves.draw(runs, Path(FLAGS.out))
    print(f"v4jax plot: {len(runs)} runs: {FLAGS.out}")
    return 0
