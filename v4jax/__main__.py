"""`python -m v4jax` is the command `v4jax`."""

import sys

from v4jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
