#!/usr/bin/env bash
# The exhaustive sweeps that CI leaves out: full-size checkpoints, every length and chunking, meshes.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -m slow "$@"
# All five axes of a mesh at once take more devices than the other tests', which pay for each.
XLA_FLAGS="--xla_force_host_platform_device_count=32 --xla_backend_optimization_level=0" \
    python -m pytest -m slow tests/sharding/test_five_axes.py
