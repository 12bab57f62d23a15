"""What of its config a run that goes on may change, and what it keeps from its beginning.

Three kinds of fields, by their dotted names:

* FREE ones change no number that is trained: the config that is given counts.
* CHANGEABLE ones decide numbers still to come. The run keeps those that it was begun with, and says
  so; it takes others only where it is told to (`v4jax train --change`).
* All others are what the run is (model, data, seed, losses, optimiser, stages that are done, and
  `min_repeats`, by which the arrays of its checkpoints are named). Another value is refused.
"""

import re
from collections.abc import Collection
from typing import Any

from v4jax.errors import InputError
from v4jax.train.config import TrainConfig, as_json, override

# As regular expressions. A mesh and a stage's parts change the order of sums, so the last digits;
# a checkpoint to start from is not read again, and data at another path must be the same data.
FREE = (
    r"checkpoint_every",
    r"keep",
    r"log_every",
    r"evaluate_every",
    r"remat",
    r"mesh",
    r"stages\.\d+\.parts",
    r"start",
    r"data\.path",
)
# LAST is the number of the last stage: what it does to a stage that is over would be a lie.
CHANGEABLE = (
    r"schedule\..*",
    r"evaluate_rows",
    r"stages\.LAST\.steps",
    r"stages\.LAST\.learning_rate",
)


def kind_of(name: str, config: TrainConfig) -> str:
    """Of a field of the config: "free", "changeable" or "fixed"."""
    last = str(len(config.stages) - 1)
    for kind, patterns in (("free", FREE), ("changeable", CHANGEABLE)):
        if any(re.fullmatch(pattern.replace("LAST", last), name) for pattern in patterns):
            return kind
    return "fixed"


def differences(config: TrainConfig, stored: dict[str, Any], kind: str) -> list[str]:
    """Names of the fields of a kind in which a config is not the stored one (`as_json`)."""
    now = as_json(config)
    return [
        name
        for name in sorted(now.keys() | stored.keys())
        if now.get(name) != stored.get(name) and kind_of(name, config) == kind
    ]


def settle(
    config: TrainConfig,
    stored: dict[str, Any],
    workdir: Any,
    change: bool = False,
    given: Collection[str] = (),
) -> tuple[TrainConfig, str | None]:
    """The config that a run goes on with, and a sentence of what it keeps or changes.

    Args:
      stored: the config, as `as_json`, of the checkpoint that it goes on from.
      change: whether changeable fields are taken from `config`.
      given: names that the user has set by hand: such a wish is not passed over, but refused.

    Raises:
      InputError: another run's config, or a change that was given without `change`.
    """
    fixed = differences(config, stored, "fixed")
    if fixed:
        said = "; ".join(_said(name, config, stored, "and was") for name in fixed)
        raise InputError(
            f"{workdir}: holds a run of another config: {said}; give the same, or another --workdir"
        )
    changed = differences(config, stored, "changeable")
    if not changed:
        return config, None
    said = "; ".join(_said(name, config, stored, "and the run was begun with") for name in changed)
    if change:
        return config, f"changed from here on: {said}"
    if set(changed) & set(given):
        raise InputError(
            f"{workdir}: {said}; add --change to go on with it, or leave it out to keep the old"
        )
    begun = override(config, {name: str(stored.get(name)) for name in changed})
    return begun, f"keeps what the run was begun with: {said}; --change would take the new"


def _said(name, config, stored, was):
    return f"{name} is {_short(as_json(config).get(name))} {was} {_short(stored.get(name))}"


def _short(value):
    return repr(value)[:200]
