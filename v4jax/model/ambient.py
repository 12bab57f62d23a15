"""`model.apply` of a model without a mesh of its own, inside somebody else's.

In a `jax.shard_map` that checks over which mesh axes values vary, the arrays of a call are made to
vary alike. Under `jax.set_mesh` with Explicit axes every operation would have to say how its result
is sharded; inside the call these axes are Auto ones, and the compiler finds it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from v4jax.model import auxiliary
from v4jax.ops import varying

_ARRAYS = ("tokens", "cache", "lengths", "segment_ids", "replay")


def run(call: Callable, variables: Any, options: dict[str, Any]) -> Any:
    """`call(variables, **options)`; options are those of `Transformer.apply`, tokens too."""
    arrays = {name: options[name] for name in _ARRAYS if options.get(name) is not None}
    rest = {name: value for name, value in options.items() if name not in arrays}

    def one(variables, arrays):
        return call(variables, **arrays, **rest)

    variables, arrays = varying.alike(variables, arrays)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.explicit_axes:
        return one(variables, arrays)
    arrays |= {"tokens": jnp.asarray(arrays["tokens"])}
    return _with_auto_axes(one, mesh, *jax.tree.map(jnp.asarray, (variables, arrays)))


def _with_auto_axes(one, mesh, variables, arrays):
    """The rows of its output lie where the tokens' do."""
    replicated = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), (variables, arrays)
    )
    spec = jax.typeof(arrays["tokens"]).sharding.spec
    batch = spec[0] if spec else None

    def place(path, leaf):
        names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
        if names[0] == "aux" and "batch" not in auxiliary.TABLE[names[1]].axes:  # summed over it
            return PartitionSpec()
        if names[:2] == ["cache", "layers"]:  # [R,B,...]: repeats of the segment first
            return PartitionSpec(None, batch)
        return PartitionSpec(batch)

    places = jax.tree_util.tree_map_with_path(place, jax.eval_shape(one, *shapes))
    return jax.sharding.auto_axes(one, out_sharding=places)(variables, arrays)
