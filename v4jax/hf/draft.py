"""The keys of a config.json that describe a DSpark draft.

All of them make a draft that runs. With some missing, draft blocks are carried along.
"""

from collections.abc import Mapping
from typing import Any

from v4jax.config import DSpark
from v4jax.errors import InputError
from v4jax.hf.values import integer, short

DRAFT_PREFIX = "dspark_"
_SIZES = ("block_size", "markov_rank", "noise_token_id")
_TARGETS = f"{DRAFT_PREFIX}target_layer_ids"
DRAFT_KEYS = (*(DRAFT_PREFIX + name for name in _SIZES), _TARGETS)
_MOST = 1024  # tokens of a block, whose heads are unrolled, and layers that it reads


def read_draft(keys: Mapping[str, Any], stages: int) -> DSpark | None:
    """The draft's sizes; None where there are no stages, or not all of its keys.

    Raises:
      InputError: a key of another type, or beyond what any draft has.
    """
    if not stages or any(keys.get(name) is None for name in DRAFT_KEYS):
        return None
    ids = keys[_TARGETS]
    if not isinstance(ids, list | tuple) or len(ids) > _MOST:
        raise InputError(f"{_TARGETS} is {short(ids)}; expected a list of layers")
    sizes = {name: integer(keys, DRAFT_PREFIX + name) for name in _SIZES}
    if sizes["block_size"] > _MOST:
        name = f"{DRAFT_PREFIX}block_size"
        raise InputError(f"{name} is {sizes['block_size']}; expected 1 to {_MOST}")
    return DSpark(**sizes, target_layer_ids=tuple(integer({_TARGETS: i}, _TARGETS) for i in ids))


def write_draft(draft: DSpark | None) -> dict[str, Any]:
    """The keys of a draft's sizes."""
    if draft is None:
        return {}
    sizes = {DRAFT_PREFIX + name: getattr(draft, name) for name in _SIZES}
    return sizes | {_TARGETS: list(draft.target_layer_ids)}
