#!/usr/bin/env bash
# v4jax on all hosts of a TPU pod slice, one process a host; JAX finds the other processes itself.
# Run it in a checkout, with gcloud set up for the slice's project and zone.
#
#   tools/launch/tpu_pod.sh install          # once: copies this checkout to all hosts
#   tools/launch/tpu_pod.sh train --config configs/train_tiny.py --workdir /mnt/shared/run
#
set -euo pipefail

# Fill in: the slice's name, as `gcloud compute tpus tpu-vm list` shows it.
TPU="${V4JAX_TPU:-}"

if [[ -z "$TPU" ]]; then
  echo "tpu_pod.sh: TPU is empty; set it in this file (or V4JAX_TPU) to the name of a slice" >&2
  exit 2
fi
if (($# == 0)); then
  echo "tpu_pod.sh: no command; expected install, or one of v4jax's, such as: generate" >&2
  exit 2
fi

everywhere() {
  gcloud compute tpus tpu-vm ssh "$TPU" --worker=all --command="$1"
}

if [[ "$1" == install ]]; then
  archive="$(mktemp -d)/v4jax.tar.gz"
  git archive --format=tar.gz --output="$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$TPU:" --worker=all
  everywhere "mkdir -p v4jax && tar -xzf v4jax.tar.gz -C v4jax && python3 -m venv v4jax-venv \
    && v4jax-venv/bin/pip install --quiet './v4jax[tpu]'"
  exit
fi
# Quoted once more for the shell of the hosts.
everywhere "cd v4jax && exec ../v4jax-venv/bin/v4jax$(printf ' %q' "$@")"
