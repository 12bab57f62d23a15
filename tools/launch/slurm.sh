#!/usr/bin/env bash
# v4jax on GPU nodes of a SLURM cluster, one process a GPU; JAX finds the other processes itself.
#
#   sbatch --nodes=4 tools/launch/slurm.sh convert --source /data/flash --target /data/out --to orbax
#
#SBATCH --job-name=v4jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
set -euo pipefail

# Fill in: a Python environment with v4jax and its extra cuda, on a disk that all nodes see.
VENV="${V4JAX_VENV:-}"

if [[ -z "$VENV" ]]; then
  echo "slurm.sh: VENV is empty; set it in this file (or V4JAX_VENV) to an environment with v4jax" >&2
  exit 2
fi
if (($# == 0)); then
  echo "slurm.sh: no command; expected one of v4jax's, such as: train --config FILE --workdir DIR" >&2
  exit 2
fi
# If one process ends, SLURM ends the others: sooner than they would find out by themselves.
exec srun --kill-on-bad-exit=1 --unbuffered "$VENV/bin/v4jax" "$@"
