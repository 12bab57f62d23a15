"""`v4jax serve` with an engine without a model: python -m tests.support.echo_server FLAGS."""

import sys

from tests.support import servers
from tests.support.echo_engine import EchoEngine
from v4jax.cli.main import main
from v4jax.serve import build as build_lib


def build(path, settings, **options):
    """The parts of a server of echoes, of the settings that the flags say."""
    return servers.parts_of(EchoEngine(path, pace=0.005), path, settings)


if __name__ == "__main__":
    build_lib.build = build
    sys.exit(main(["v4jax", "serve", *sys.argv[1:]]))
