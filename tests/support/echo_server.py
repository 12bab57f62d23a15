"""`v4jax serve` with an engine without a model: python -m tests.support.echo_server FLAGS."""

import os
import sys
import time

from tests.support import servers
from tests.support.echo_engine import EchoEngine
from v4jax.cli.main import main
from v4jax.serve import build as build_lib

COLD = "V4JAX_TEST_COLD"  # set in the environment: the server never gets ready


class Cold(EchoEngine):
    """Takes longer to warm up than anybody waits."""

    def warm_up(self):
        time.sleep(3600)


def build(path, settings, **options):
    """The parts of a server of echoes, of the settings that the flags say."""
    kind = Cold if os.environ.get(COLD) else EchoEngine
    return servers.parts_of(kind(path, pace=0.005), path, settings)


if __name__ == "__main__":
    build_lib.build = build
    sys.exit(main(["v4jax", "serve", *sys.argv[1:]]))
