"""The launch scripts, with stand-ins for srun and gcloud; JAX finds the processes by itself."""

import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import synthetic

LAUNCH = Path(__file__).resolve().parents[2] / "tools" / "launch"

SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
export SLURM_JOB_ID={job} SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" > "{folder}/out.$i" 2> "{folder}/err.$i" &
  ids+=($!)
done
for id in "${{ids[@]}}"; do wait "$id" || exit 1; done
"""
GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$@" >> "{folder}/calls"
"""


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def launch(script, tmp_path, *arguments, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "V4JAX_"))}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **variables}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    return subprocess.run(
        [str(LAUNCH / script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )


def test_slurm_runs_one_conversion(tmp_path):
    job = random.randrange(1, 10**6)  # JAX takes the coordinator's port from it
    program(tmp_path / "bin" / "srun", SRUN.format(job=job, folder=tmp_path))
    main = f'#!/bin/sh\nexec {sys.executable} -m v4jax.cli.main "$@"\n'
    program(tmp_path / "venv" / "bin" / "v4jax", main)
    source = synthetic(tmp_path / "source")
    flags = ["--source", source, "--target", str(tmp_path / "target"), "--to", "orbax"]
    venv = str(tmp_path / "venv")
    done = launch("slurm.sh", tmp_path, "convert", *flags, V4JAX_VENV=venv)
    assert done.returncode == 0, (tmp_path / "err.0").read_text() + (tmp_path / "err.1").read_text()
    assert (tmp_path / "out.0").read_text().startswith("converted ")
    assert (tmp_path / "out.1").read_text() == ""
    assert (tmp_path / "target" / "v4jax.json").is_file()


def test_tpu_pod_quotes_for_the_hosts(tmp_path):
    program(tmp_path / "bin" / "gcloud", GCLOUD.format(folder=tmp_path))
    done = launch("tpu_pod.sh", tmp_path, "generate", "--prompt", "a 'b' $c", V4JAX_TPU="slice-1")
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls.startswith("compute\ntpus\ntpu-vm\nssh\nslice-1\n--worker=all\n")
    command = calls.partition("--command=")[2].strip()
    shown = command.replace("exec ../v4jax-venv/bin/v4jax", "printf '%s|'").removeprefix(
        "cd v4jax &&"
    )
    words = subprocess.run(["bash", "-c", shown], capture_output=True, text=True).stdout
    assert words == "generate|--prompt|a 'b' $c|"


@pytest.mark.parametrize("script, variable", [("slurm.sh", "VENV"), ("tpu_pod.sh", "TPU")])
def test_what_is_to_be_filled_in(script, variable, tmp_path):
    done = launch(script, tmp_path, "generate")
    assert done.returncode == 2 and f"{variable} is empty; set it in this file" in done.stderr
