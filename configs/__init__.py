"""One model a file: `get_config()` returns its `ModelConfig`, and `v4jax.get_config(name)` calls it.

Every big config has a tiny twin on the same code path: the same kinds of layers in the same order,
the same ways to store weights, small enough for a laptop.
"""
