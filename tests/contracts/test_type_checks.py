"""In tests, annotations of v4jax are checked: those of shapes, of types, of methods, of fields."""

import jax.numpy as jnp
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from v4jax import named_configs, weights
from v4jax.model.transformer import Transformer
from v4jax.train import optimizer


@pytest.mark.parametrize(
    "call",
    [
        lambda: optimizer.orthogonalize(jnp.ones(3)),
        lambda: optimizer.orthogonalize(jnp.ones((3, 4), jnp.int32)),
    ],
)
def test_shapes_and_types_of_arrays(call):
    with pytest.raises(TypeCheckError):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: named_configs.get_config(7),
        lambda: weights.variables(named_configs.get_config("nano"), "4"),
        lambda: Transformer(named_configs.get_config("nano"), min_repeats="4"),
    ],
)
def test_other_types(call):
    with pytest.raises((BeartypeCallHintViolation, TypeCheckError)):
        call()
