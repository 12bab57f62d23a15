"""All five axes longer than 1 at once: 32 fake devices, hence a run of pytest of its own.

    XLA_FLAGS="--xla_force_host_platform_device_count=32 --xla_backend_optimization_level=0" \
        python -m pytest -m slow tests/sharding/test_five_axes.py
"""

import jax
import pytest

from tests.sharding import test_model
from tests.support import meshes
from v4jax.infer.generate import generate
from v4jax.sharding.rules import DECODE_LONG, PREFILL, TRAIN

SIZES = "data=2,fsdp=2,expert=2,sequence=2,tensor=2"
DEVICES = 32

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        jax.device_count() < DEVICES,
        reason=f"needs {DEVICES} devices: see the command at the top of this file",
    ),
]


def test_outputs_and_gradients():
    test_model.check_training(SIZES, TRAIN, packed=True)


def test_prefill_chunks_and_decode_of_caches_in_parts():
    test_model.check_serving(SIZES, DECODE_LONG)


@pytest.mark.parametrize("copies", [1, 2], ids=["caches_in_parts", "many_rows"])
def test_generated_tokens(copies):
    """Eight prompts are fewer rows than 16 shards; 16 are one on each."""
    model, variables = meshes.on_mesh(SIZES, PREFILL)
    prompts = test_model.prompts(8) * copies
    found = generate(model, variables, prompts, max_new_tokens=24, prefill_chunk=32)
    assert found.tokens == test_model.generated_alone(8) * copies
