"""What the compilers for absent chips need in the environment, before jax is imported."""

import os

# Planning runs nothing, so it needs no device of this machine and leaves a TPU here to others.
_SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second planner dies on libtpu's lock file
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # any: it stops a search for this machine's own
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def prepare() -> None:
    """Sets the environment for ahead-of-time compilation; silent compilers, no device."""
    os.environ.update(_SETTINGS)
