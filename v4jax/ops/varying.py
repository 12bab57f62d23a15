"""Over which mesh axes values vary, inside a `jax.shard_map` that checks it (`check_vma`).

Elsewhere nothing varies, and these functions change nothing.
"""

from typing import Any

import jax


def axes(x: Any) -> frozenset[str]:
    """The mesh axes over which an array varies."""
    return _axes_of(jax.typeof(x))


def checked() -> bool:
    """Whether this is inside a `jax.shard_map` that checks.

    Asked of an array that varies by nature, since those at hand may not say it: Flax traces the
    body of a scan once with shapes alone.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not manual:
        return False
    # In a program of its own: nothing is added to the one that is traced.
    return bool(_axes_of(jax.make_jaxpr(lambda: jax.lax.axis_index(manual[0]))().out_avals[0]))


def _axes_of(kind):
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
