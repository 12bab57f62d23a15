"""What every test runs under: CPU, strict promotion, warnings as errors in our own code."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden():
    """The folder of golden numbers; a checkout without it skips those tests."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden numbers at {GOLDEN.parent.name}/{GOLDEN.name} beside the checkout")
    return GOLDEN
