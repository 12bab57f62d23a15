"""What `model.apply` refuses: arguments of another shape, type or range, in one sentence each.

Shapes and types are checked in every call, values where they are concrete: outside `jax.jit`, and
on this process's devices. Inside a program nothing is added to it.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.errors import InputError
from v4jax.model.auxiliary import ASKABLE
from v4jax.model.cache import Cache, check_store
from v4jax.model.context import check_packed

REPLAYS = ("router_experts", "chosen")


LOGITS = ("all", "last", "none", "normed")


def check(model, tokens, *, cache, lengths, segment_ids, logits, mtp, aux, replay, dense) -> None:
    """Refuses arguments of `Transformer.apply` that contradict the model or each other.

    Raises:
      InputError: naming the argument, what was expected and what was found.
    """
    config = model.config
    shape = _check_tokens(tokens, config.vocab_size)
    if cache is not None:
        _check_cache(model, cache)
    if lengths is not None:
        _check_array("lengths", lengths, shape[:1], "[batch], a number for each row")
        _check_range("lengths", lengths, 0, shape[1], "the tokens of a row in this call")
    if segment_ids is not None:
        _check_array("segment_ids", segment_ids, shape, "the shape of the tokens")
    _check_outputs(logits, aux)
    if "features" in aux and config.dspark is None:
        raise InputError(
            "aux names features and the model has no DSpark draft to read them; leave them out, or "
            "load a checkpoint whose config.json has the dspark_ keys"
        )
    check_packed(segment_ids, cache, lengths)
    if replay is not None:
        seen = shape[1] if cache is None else cache.max_length
        _check_replay(config, replay, shape, seen)
    if cache is not None:
        _check_room(shape, cache, lengths, mtp)


@contextlib.contextmanager
def derivatives_explained():
    """Says how to get a derivative that gradients written by hand do not have."""
    try:
        yield
    except TypeError as error:
        if "custom_vjp function" not in str(error):
            raise
        raise InputError(
            f"the model with these kernels has gradients and no other derivatives ({error}); build "
            "it with kernels='reference' for jax.jvp, jax.linearize and second derivatives"
        ) from error


def _check_outputs(logits, aux):
    if logits not in LOGITS:
        raise InputError(f"logits is {logits!r}; expected 'all', 'last', 'none' or 'normed'")
    if isinstance(aux, str):
        raise InputError(f"aux is {aux[:200]!r}; expected a tuple of names, ({aux[:80]!r},)")
    unknown = sorted(set(aux) - set(ASKABLE))
    if unknown:
        raise InputError(f"aux names {unknown} are unknown; expected some of {ASKABLE}")


def _check_room(shape, cache, lengths, mtp):
    """Refuses a call that a cache has no room or no meaning for."""
    batch, length = shape
    if mtp:
        raise InputError("mtp=True came with a cache; MTP logits need the whole row in one call")
    if cache.lengths.shape[0] != batch:
        raise InputError(
            f"tokens have {batch} rows and the cache {cache.lengths.shape[0]}; they must agree"
        )
    used = jnp.full((batch,), length, jnp.int32) if lengths is None else jnp.asarray(lengths)
    if isinstance(cache.lengths, jax.core.Tracer) or isinstance(used, jax.core.Tracer):
        longest = 0 if lengths is not None else length
    else:
        longest = int(jnp.max(cache.lengths + used))
    if longest > cache.max_length:
        raise InputError(
            f"the call brings a row to {longest} tokens and the cache has room for "
            f"{cache.max_length}; make a longer one with init_cache"
        )


def _check_tokens(tokens, vocab_size):
    found = _shape_and_type("tokens", tokens)
    if len(found[0]) != 2:
        hint = "; a single row is tokens[None]" if len(found[0]) == 1 else ""
        raise InputError(f"tokens has shape {_sizes(found[0])}; expected [batch, length]{hint}")
    _check_integers("tokens", found[1], "token ids")
    if found[0][0] == 0:
        raise InputError("tokens has no rows; expected at least one")
    if found[0][1] == 0:
        raise InputError("tokens has no columns; expected at least one token a row")
    _check_range("tokens", tokens, 0, vocab_size - 1, "the model's vocabulary")
    return found[0]


def _check_cache(model, cache):
    if not isinstance(cache, Cache):
        raise InputError(
            f"cache has type {type(cache).__name__}; expected what model.init_cache made or the "
            "`cache` of an earlier output"
        )
    names = [segment.name for segment in model.segments()]
    if sorted(cache.layers) != sorted(names):
        raise InputError(
            f"the cache has layers {', '.join(sorted(cache.layers))[:200]} and the model "
            f"{', '.join(names)[:200]}; expected a cache from this model's init_cache"
        )
    check_store(cache.store, model.execution().native)


def _check_replay(config, replay, shape, seen):
    if not isinstance(replay, dict) or not set(replay) <= set(REPLAYS):
        found = sorted(map(str, replay)) if isinstance(replay, dict) else type(replay).__name__
        raise InputError(
            f"replay is of {str(found)[:200]}; expected a dict with some of {REPLAYS}, each a dict "
            "of layer: [batch, length, choices]"
        )
    layers = (*config.layers, *config.mtp_layers)
    for name, given in replay.items():
        if not isinstance(given, dict):
            raise InputError(
                f"replay of {name} has type {type(given).__name__}; expected a dict of layer: "
                "[batch, length, choices], as `aux` of an output has them"
            )
        able = [i for i, x in enumerate(layers) if name != "chosen" or x.attention == "csa"]
        for layer, choice in given.items():
            _check_choice(config, layers, name, layer, able, choice, shape, seen)


def _check_choice(config, layers, name, layer, able, choice, shape, seen):
    if layer not in able:
        raise InputError(
            f"replay of {name} names layer {str(layer)[:50]!s}; the model's layers that choose so "
            f"are {str(able)[:200]}"
        )
    where = f"replay of {name} in layer {layer}"
    found, kind = _shape_and_type(where, choice)
    if len(found) != 3 or found[:2] != shape or found[2] == 0:
        raise InputError(
            f"{where} has shape {_sizes(found)}; expected {_sizes((*shape, 'choices'))}, those of "
            "every token"
        )
    _check_integers(where, kind, "indices")
    if name == "router_experts":
        _check_range(where, choice, 0, config.n_routed_experts - 1, "the experts")
    else:
        # A block that is still open has no entry.
        entries = seen // layers[layer].ratio
        _check_range(where, choice, -1, entries - 1, "the entries that there are, -1 for none")


def _check_array(name, value, expected, meaning):
    found, kind = _shape_and_type(name, value)
    if found != expected:
        raise InputError(
            f"{name} has shape {_sizes(found)}; expected {_sizes(expected)}, {meaning}"
        )
    _check_integers(name, kind, "numbers")


def _check_integers(name, dtype, what):
    if not np.issubdtype(dtype, np.integer):
        raise InputError(f"{name} has type {dtype}; expected whole {what}")


def _check_range(name, value, lowest, highest, meaning):
    """Of values that are known and that this process has."""
    if isinstance(value, jax.core.Tracer) or not getattr(value, "is_fully_addressable", True):
        return
    if isinstance(value, jax.ShapeDtypeStruct):
        return
    value = np.asarray(jax.device_get(value))
    wrong = np.argwhere((value < lowest) | (value > highest))
    if len(wrong):
        place = tuple(int(i) for i in wrong[0])
        raise InputError(
            f"{name}{list(place)} is {value[place]}; expected {lowest} to {highest}, {meaning}"
        )


def _shape_and_type(name, value):
    """Of an array, traced or not, or of nested lists."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return tuple(value.shape), value.dtype
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    if array.dtype == object:
        raise InputError(
            f"{name} is a {type(value).__name__} that makes no array; expected whole numbers in "
            "rows of one length: pad them and give `lengths`"
        )
    return array.shape, array.dtype


def _sizes(shape):
    return "[" + ", ".join(map(str, shape)) + "]"
