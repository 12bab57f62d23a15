"""One model a file: its `get_config()` returns a `ModelConfig`; `v4jax.get_config(name)` calls it.

Every big config has a tiny twin on the same code path: the same kinds of layers in the same order,
the same ways to store weights, small enough for a laptop.
"""
