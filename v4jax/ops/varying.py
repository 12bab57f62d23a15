"""Over which mesh axes values vary, inside a `jax.shard_map` that checks it (`check_vma`).

Elsewhere nothing varies, and these functions change nothing.
"""

from typing import Any

import jax


def axes(x: Any) -> frozenset[str]:
    """The mesh axes over which an array varies."""
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):  # since JAX 0.10
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", frozenset())


def with_axes_of(x: Any, *others: Any) -> Any:
    """x varying over all axes over which it or any of the others varies: a loop's first carry."""
    return alike(x, *others)[0]


def alike(*trees: Any) -> tuple[Any, ...]:
    """The trees with every array varying over all axes over which any of them varies.

    Arrays that are the same on all shards, weights above all, are marked here once: gradients with
    respect to them are summed over the shards here, and a loop's carry, which begins with zeros,
    has one kind from its first step on.
    """
    all_axes = frozenset().union(*map(axes, jax.tree.leaves(trees)))
    if not all_axes:
        return trees

    def mark(x):
        missing = tuple(sorted(all_axes - axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, trees)
