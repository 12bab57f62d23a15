"""Muon for matrices, AdamW for the rest, as the report has them; every parameter in one group.

Which weights are matrices is declared with their shapes, in `v4jax.weights`.

optax.contrib.muon cannot express this one: it corrects a moving average for its bias, so its first
hundred Nesterov directions are other mixtures of momentum and gradient than mu M + G. Momentum,
decay and the split into groups are optax's.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from v4jax.errors import InputError
from v4jax.train.tree_paths import by_path, tree_path
from v4jax.weights import Weight

# Newton-Schulz: eight steps that bring singular values near 1 fast, two that settle them there.
COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The report's optimiser (Flash); rates of the moment come from `schedule.Schedule`.

    Attributes:
      matrices: "muon", or "adamw" for AdamW throughout (the ablation's rival).
      momentum, update_rms: of Muon; an update's root mean square before the learning rate.
      muon_dtype: of the Newton-Schulz products; the report finds bfloat16 fine.
      weight_decay: decoupled, times the learning rate. undecayed: parameters without it, a regular
        expression searched in "/"-joined paths; None for none.
      b1, b2, eps: of AdamW. clip: largest global norm of the gradient, or None.
      frozen: parameters that no stage trains, as `undecayed`; they have no state.
    """

    matrices: str = "muon"
    momentum: float = 0.95
    update_rms: float = 0.18
    muon_dtype: str = "float32"
    weight_decay: float = 0.1
    undecayed: str | None = None
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-20
    clip: float | None = 1.0
    frozen: str | None = None

    def __post_init__(self):
        if self.matrices not in ("muon", "adamw"):
            raise InputError(f"optimizer.matrices is {self.matrices!r}; expected 'muon' or 'adamw'")
        if self.muon_dtype not in ("float32", "bfloat16"):
            raise InputError(
                f"optimizer.muon_dtype is {self.muon_dtype!r}; expected 'float32' or 'bfloat16'"
            )
        for name in ("undecayed", "frozen"):
            check_pattern(f"optimizer.{name}", getattr(self, name))
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"optimizer.clip is {self.clip}; expected a positive number or none")


class Row(NamedTuple):
    """A parameter in the table of groups; `matrices` are those that Muon treats one by one."""

    path: str
    shape: tuple[int, ...]
    group: str
    matrices: int
    decayed: bool


def check_pattern(name: str, pattern: str | None) -> None:
    """Refuses what is no regular expression."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise InputError(f"{name} is {pattern!r}, no regular expression ({error})") from None


def matches(pattern: str | None, path: str) -> bool:
    return pattern is not None and re.search(pattern, path) is not None


def group_of(path: str, declared: Mapping[str, Weight], config: OptimizerConfig) -> str:
    """ "muon", "adamw" or "frozen".

    Args:
      declared: the parameters by path, as `weights.parameters` has them.

    Raises:
      InputError: a parameter that is not declared.
    """
    if matches(config.frozen, path):
        return "frozen"
    if path not in declared:
        raise InputError(f"parameter {path} is of no known kind; declare it in v4jax/weights.py")
    return config.matrices if declared[path].matrices else "adamw"


@jax.custom_jvp
def moved(w: Array, change: Array) -> Array:
    """w + change; what a change of 0 leaves keeps the sign of its zeros, as -0 + 0 would not."""
    return jnp.where(change == 0, w, w + change)


@moved.defjvp
def _moved_jvp(primals, tangents):
    return moved(*primals), tangents[0] + tangents[1]


def table(params: Any, config: OptimizerConfig, declared: Mapping[str, Weight]) -> list[Row]:
    """Every parameter with its group; `declared` as for `group_of`."""
    rows = []
    for name, leaf in by_path(params).items():
        group = group_of(name, declared, config)
        one = declared[name].matrices if group == "muon" else 0
        matrices = math.prod(leaf.shape[:-2]) * one
        decayed = group != "frozen" and not matches(config.undecayed, name)
        rows.append(Row(name, tuple(leaf.shape), group, matrices, decayed))
    return rows


def make_optimizer(
    config: OptimizerConfig, declared: Mapping[str, Weight]
) -> optax.GradientTransformation:
    """Gradients to directions, decay included: new = w - rate * direction.

    Args:
      declared: the parameters by path, as `weights.parameters` has them.
    """
    decay = optax.add_decayed_weights(config.weight_decay, mask=_decayed(config))
    groups = {
        "muon": optax.chain(
            optax.trace(config.momentum, nesterov=True), _orthogonalized(config, declared), decay
        ),
        "adamw": optax.chain(_adam(config), decay),
        "frozen": optax.set_to_zero(),
    }

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: group_of(tree_path(path), declared, config), params
        )

    return optax.partition(groups, labels)


def _decayed(config):
    def mask(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not matches(config.undecayed, tree_path(path)), params
        )

    return mask


def _adam(config):
    """Adam's direction: optax.scale_by_adam, which mixes dtypes that strict promotion refuses."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros, zeros)

    def update(updates, state, params=None):
        count = state.count + 1
        mean = jax.tree.map(lambda m, g: config.b1 * m + (1 - config.b1) * g, state.mu, updates)
        square = jax.tree.map(
            lambda v, g: config.b2 * v + (1 - config.b2) * g * g, state.nu, updates
        )
        first = 1 - config.b1 ** count.astype(jnp.float32)
        second = 1 - config.b2 ** count.astype(jnp.float32)
        directions = jax.tree.map(
            lambda m, v: m / first / (jnp.sqrt(v / second) + config.eps), mean, square
        )
        return directions, optax.ScaleByAdamState(count, mean, square)

    return optax.GradientTransformation(init, update)


def _orthogonalized(config, declared):
    """The step from momentum to update of every matrix of a leaf."""

    def one(path, m):
        shape = m.shape
        if (matrices := declared[tree_path(path)].matrices) > 1:
            m = m.reshape(*shape[:-2], matrices, -1, shape[-1])
        scale = config.update_rms * max(m.shape[-2:]) ** 0.5
        return scale * orthogonalize(m, config.muon_dtype).reshape(shape)

    def update(updates, state, params=None):
        return jax.tree_util.tree_map_with_path(one, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def orthogonalize(m: Float[Array, "*b r c"], dtype: str = "float32") -> Float[Array, "*b r c"]:
    """The nearest matrix with all singular values about 1, of each matrix of the last two axes.

    Directions whose singular value is under about 1e-5 of the Frobenius norm stay shorter; a zero
    matrix stays zero.
    """
    tall = m.shape[-2] > m.shape[-1]
    x = m.astype(jnp.float32)
    # In two steps, since the square of a small gradient is no float32.
    x = x / jnp.maximum(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True), TINY)
    x = x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)), TINY)
    x = (jnp.swapaxes(x, -2, -1) if tall else x).astype(dtype)

    def step(x, abc):
        a, b, c = abc.astype(dtype)
        gram = jnp.einsum("...ij,...kj->...ik", x, x)
        mix = b * gram + c * jnp.einsum("...ij,...jk->...ik", gram, gram)
        return a * x + jnp.einsum("...ij,...jk->...ik", mix, x), None

    x = jax.lax.scan(step, x, jnp.array(COEFFICIENTS, jnp.float32))[0].astype(jnp.float32)
    return jnp.swapaxes(x, -2, -1) if tall else x


def state_like(optimizer: optax.GradientTransformation, params: Any, like: Any, other: Any):
    """The optimiser's state with each of its arrays replaced by what stands for its parameter.

    Args:
      params: shapes of the parameters. like: a tree as params (shardings). other: for the counts.
    """
    of = by_path(like)

    def one(path, _):
        return of.get(parameter_of(path), other)

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(optimizer.init, params))


def parameter_of(path) -> str:
    """The parameter that a leaf, of params or of the optimiser's state, belongs to.

    Of a state's path the names in dicts count, not the fields of optax's tuples. The first name is
    that of a group; a count has no other.
    """
    names = (str(step.key) for step in path if isinstance(step, jax.tree_util.DictKey))
    return re.sub("^(muon|adamw)/", "", "/".join(names))
