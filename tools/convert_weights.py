"""Converts a checkpoint; the same as `v4jax convert`.

python tools/convert_weights.py --source DeepSeek-V4-Flash --target flash-orbax --to orbax
"""

import sys

from v4jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["v4jax", "convert", *sys.argv[1:]]))
