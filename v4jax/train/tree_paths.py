"""Key paths of JAX's trees as text."""

from typing import Any

import jax


def tree_path(path: tuple, separator: str = "/") -> str:
    """A key path as "layers_0/block_0/attn/wq_a/weight"."""
    return jax.tree_util.keystr(path, simple=True, separator=separator)


def by_path(tree: Any, separator: str = "/") -> dict[str, Any]:
    """The leaves by their paths, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tree_path(path, separator): leaf for path, leaf in leaves}
