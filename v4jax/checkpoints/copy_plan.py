"""What a conversion writes: the tensors and the config of its target, and what is said of them."""

import json
from typing import NamedTuple

from v4jax.checkpoints.fit import unquantised
from v4jax.checkpoints.source import planned_items
from v4jax.checkpoints.target import config_json
from v4jax.hf.as_transformers import to_transformers
from v4jax.hf.tensors import TensorSpec, expanded_config, stored_form

_WORDS = {"BF16": "bfloat16", "F32": "float32"}


class CopyPlan(NamedTuple):
    """What a conversion writes.

    Attributes:
      items: item -> its tensors, by official keys, each with the one dtype that it gets.
      config_text: the target's config.json.
      notes: a sentence for everything of the source that the target does not have.
    """

    items: dict[str, list[TensorSpec]]
    config_text: bytes
    notes: tuple[str, ...] = ()


def copy_plan(source, to: str, weights: str) -> CopyPlan:
    """The plan for an opened checkpoint, one of `target.TARGETS` and the weights' form.

    Raises:
      InputError: a model that the target has no words for.
    """
    config = expanded_config(source.config, weights)
    if to == "transformers":
        text = json.dumps(to_transformers(config, source.path), indent=2).encode() + b"\n"
        return _unquantised(source, weights, text)
    text = source.config_text if weights == "stored" else None
    return CopyPlan(planned_items(source, weights), text or config_json(config))


def _unquantised(source, weights, config_text):
    """The plan for files without blocks after the layers and without FP8 and FP4."""
    dtype = stored_form(source.config).plain
    items, left_out, expanded = {}, [], []
    for name, specs in planned_items(source, weights).items():
        if name.startswith(("mtp_", "draft_", "carried_")):
            left_out += specs
            continue
        expanded += [spec for spec in specs if spec.part != "array"]
        items[name] = [_plain(spec, dtype) for spec in specs if spec.part != "scales"]
    notes = []
    if expanded:
        notes.append(_expanded_note(expanded, dtype))
    if left_out:
        notes.append(
            f"{len(left_out)} tensors of {_blocks(left_out)} are left out: transformers has no MTP "
            "and no draft blocks"
        )
    return CopyPlan(items, config_text, tuple(notes))


def _plain(spec, dtype):
    return unquantised(spec)._replace(dtypes=(dtype,)) if spec.part == "values" else spec


def _expanded_note(specs, dtype):
    count = sum(spec.part == "values" for spec in specs)
    # Powers of two lose nothing, other scales do.
    rounded = any(spec.dtypes == ("F32",) for spec in specs)
    how = "each number is rounded once" if rounded else "the numbers stay the same"
    return (
        f"{count} FP8 and FP4 matrices are written in {_WORDS[dtype]}, as transformers saves no "
        f"quantised ones: {how}, and the way back does not quantise them again"
    )


def _blocks(specs):
    names = sorted({".".join(spec.key.split(".")[:2]) for spec in specs})
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
