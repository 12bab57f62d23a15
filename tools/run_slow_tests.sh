#!/usr/bin/env bash
# The exhaustive sweeps that CI leaves out: full-size checkpoints, every length and chunking.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -m slow "$@"
