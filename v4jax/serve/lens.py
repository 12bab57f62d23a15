"""What the model looks at while it reads one token: the figures behind the page's lens.

The tokens are run again: all but the last few as a prompt into a fresh cache, then one call with
auxiliary outputs on the rest, of which the token is the last. Any split of a sequence into calls
gives the same entries and choices, so this is what the token saw when it was served.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import config as config_lib
from v4jax.errors import InputError
from v4jax.infer.arguments import read_prompt, whole_number

ASKED = (
    *("attention", "chosen", "index_scores"),
    *("router_experts", "router_weights", "router_scores", "mhc"),
)
# Of these the token's row is wanted and nothing else.
_ROWS = (
    *("chosen", "index_scores", "router_experts", "router_weights", "router_scores"),
    *("mhc_attn", "mhc_ffn"),
)
_LEAST_ROOM = 512  # tokens of a cache
_DIGITS = 6  # decimals of a weight: what a picture can show, in a third of the bytes


class Looked(NamedTuple):
    """What the device computes of one token.

    Attributes:
      logprobs_2V: of the token's own place and of the next.
      rows: auxiliary outputs of the token, by name and layer.
      window: scaled scores [N,S] of the call's rows, by layer. entries: those [N,K] of the entries
        in "chosen", or [N,C] of all. sinks: [N], by layer.
    """

    logprobs_2V: Any
    rows: dict[str, dict[int, Any]]
    window: dict[int, Any]
    entries: dict[int, Any]
    sinks: dict[int, Any]


class Lens:
    """Makes the figures of single tokens; compiles two programs for each power of two of tokens.

    Args:
      model, params: as `v4jax.load` returns them.
      chunk: tokens that are read at a time. top: how many alternatives to name.

    Raises:
      InputError: a model on a mesh, or one whose weights stay on disk.
    """

    def __init__(self, model, params, *, chunk: int = 512, top: int = 10):
        if not hasattr(model, "sharding") or model.sharding.mesh is not None:
            where = "on a mesh" if hasattr(model, "sharding") else "with its weights on disk"
            raise InputError(
                f"the model is {where}, where the lens does not run; load it on one device, or "
                "leave the lens out"
            )
        self._model = model
        variables = {name: tree for name, tree in params.items() if name != "carried"}
        self._variables = jax.tree.map(jnp.asarray, variables)
        self._chunk = whole_number("chunk", chunk, 1)
        self._top = min(whole_number("top", top, 1), model.config.vocab_size)
        self._width = max(model.config.sliding_window, 2)
        self._read = jax.jit(functools.partial(_read, model))
        self._look = jax.jit(functools.partial(_look, model))

    def figures(self, tokens: Sequence[int], position: int) -> dict[str, Any]:
        """What the model did at `position`, as plain values for JSON.

        Args:
          tokens: ids of prompt and answer; those behind the position do not count.
          position: the token to look at, from 0.

        Returns:
          "position", "token"; "layers", see `_layer`; "before": how likely the token was, given
          those before it, and what else was likely (None at 0); "next": what is likely behind it.
          Weights are shares of attention, means over the heads; log-probabilities are natural.

        Raises:
          InputError: a position that no token has, or ids that the model does not know.
        """
        config = self._model.config
        tokens = read_prompt(0, tokens, config.vocab_size)
        position = whole_number("position", position, 0, len(tokens) - 1)
        looked = jax.tree.map(np.asarray, self._run(tokens[: position + 1]))
        token, (own, behind) = int(tokens[position]), looked.logprobs_2V
        return {
            "position": position,
            "token": token,
            "layers": [
                _layer(config, number, looked, position, self._width)
                for number in range(config.num_hidden_layers)
            ],
            "before": self._likely(own, token) if position else None,
            "next": self._likely(behind),
        }

    def _run(self, tokens) -> Looked:
        last = min(len(tokens), self._width)
        first = len(tokens) - last
        # Room for a chunk's padding too; a power of two, so that few programs are compiled.
        room = 1 << (first + max(self._chunk, self._width) - 1).bit_length()
        room = max(room, _LEAST_ROOM)
        cache = self._model.init_cache(1, room)
        for start in range(0, first, self._chunk):
            part = tokens[start : min(start + self._chunk, first)]
            cache = self._read(self._variables, *_padded(part, self._chunk), cache)
        return self._look(self._variables, *_padded(tokens[first:], self._width), cache)

    def _likely(self, logprobs_V, token=None):
        best = np.argsort(-logprobs_V, kind="stable")[: self._top]
        entropy = -float(np.sum(np.exp(logprobs_V) * logprobs_V))
        found = {
            "entropy": round(entropy, _DIGITS),
            "top": [{"token": int(i), "logprob": _number(logprobs_V[i])} for i in best],
        }
        if token is not None:
            found["logprob"] = _number(logprobs_V[token])
            found["rank"] = int(np.sum(logprobs_V > logprobs_V[token])) + 1
        return found


def _read(model, variables, tokens_1T, count_1, cache):
    """The cache with more tokens in it."""
    out = model.apply(variables, tokens_1T, cache=cache, lengths=count_1, logits="last")
    return out.cache


def _look(model, variables, tokens_1T, count_1, cache) -> Looked:
    """Runs the last tokens; of the last one what `Looked` holds."""
    out = model.apply(variables, tokens_1T, cache=cache, lengths=count_1, aux=ASKED)
    at = count_1[0] - 1

    def row(x):
        return jax.lax.dynamic_index_in_dim(x[0], at, keepdims=False)

    rows = {
        name: {layer: row(x) for layer, x in out.aux[name].items()}
        for name in _ROWS
        if name in out.aux
    }
    scale, window, entries, sinks = model.config.head_dim**-0.5, {}, {}, {}
    for layer, q in out.aux["q"].items():
        q_NH = row(q)
        window[layer] = _scores(q_NH, out.aux["kv"][layer][0], scale)
        if layer in out.aux.get("entries", {}):
            entries_CH = out.aux["entries"][layer][0]
            if layer in rows.get("chosen", {}):
                entries_CH = entries_CH[jnp.maximum(rows["chosen"][layer], 0)]
            entries[layer] = _scores(q_NH, entries_CH, scale)
        sinks[layer] = _sink(model, variables, layer)
    two = jnp.stack([jnp.maximum(at - 1, 0), at])
    return Looked(jax.nn.log_softmax(out.logits[0][two], axis=-1), rows, window, entries, sinks)


def _scores(q_NH, keys_SH, scale):
    q_NH, keys_SH = q_NH.astype(jnp.float32), keys_SH.astype(jnp.float32)
    return jnp.einsum("nh,sh->ns", q_NH, keys_SH, precision="highest") * scale


def _sink(model, variables, layer):
    segment, place, repeat = config_lib.layer_place(model.segments(), layer)
    name, block = segment.path(place)
    sink = variables["params"][name][block]["attn"]["attn_sink"]
    return (sink[repeat] if segment.repeats > 1 else sink).astype(jnp.float32)


def _padded(tokens, width):
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(tokens)] = tokens
    return padded, np.array([len(tokens)], np.int32)


def _layer(config, number, looked: Looked, position, width) -> dict[str, Any]:
    """One layer's part of the figures.

    Returns:
      "kind", "routing"; "window": {"first": token, "weight": one a token from there on};
      "entries": {"ratio", "overlap", "visible": how many could be seen, "index", "weight"}, and in
      CSA layers "score", the indexer's, of each, and "best_left_out", the largest that was not
      chosen; "heads": how much of each head's attention went to window, entries and sink;
      "experts": {"index", "weight", "scores" of all}; "mhc": {"attention", "experts"}, the mixing
      of streams [from][to] before either. What a layer does not have is None.
    """
    spec = config.layers[number]
    weights = _attention(config, spec, number, looked, position, width)
    return {
        "layer": number,
        "kind": spec.attention,
        "routing": spec.routing,
        **weights,
        "experts": {
            "index": looked.rows["router_experts"][number].tolist(),
            "weight": _numbers(looked.rows["router_weights"][number]),
            "scores": _numbers(looked.rows["router_scores"][number]),
        },
        "mhc": None
        if "mhc_attn" not in looked.rows
        else {
            "attention": [_numbers(x) for x in looked.rows["mhc_attn"][number]],
            "experts": [_numbers(x) for x in looked.rows["mhc_ffn"][number]],
        },
    }


def _attention(config, spec, number, looked: Looked, position, width):
    """The softmax over window, entries and sink, in float64."""
    own = min(position, width - 1)  # the token's row among those of the last call
    seen = 0 if spec.attention == "full" else min(position + 1, config.sliding_window)
    parts = [looked.window[number][:, own + 1 - seen : own + 1]]
    index, visible = np.zeros(0, int), (position + 1) // max(spec.ratio, 1)
    if number in looked.entries:
        scores, index = looked.entries[number], np.arange(visible)
        if number in looked.rows.get("chosen", {}):
            chosen = looked.rows["chosen"][number]
            index, scores = chosen[chosen >= 0], scores[:, chosen >= 0]
            order = np.argsort(index)
            index, scores = index[order], scores[:, order]
        parts.append(scores[:, : len(index)])
    parts.append(looked.sinks[number][:, None])
    logits = np.concatenate(parts, axis=1).astype(np.float64)
    weight = np.exp(logits - logits.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    by_window, by_entries = weight[:, :seen], weight[:, seen:-1]
    entries = None
    if number in looked.entries:
        entries = {
            "ratio": max(spec.ratio, 1),
            "overlap": spec.overlap,
            "visible": int(visible),
            "index": index.tolist(),
            "weight": _numbers(by_entries.mean(axis=0)),
            **_choice(looked, number, index, visible),
        }
    return {
        "window": None
        if spec.attention == "full"
        else {"first": position + 1 - seen, "weight": _numbers(by_window.mean(axis=0))},
        "entries": entries,
        "heads": {
            "window": _numbers(by_window.sum(axis=1)),
            "entries": _numbers(by_entries.sum(axis=1)),
            "sink": _numbers(weight[:, -1]),
        },
    }


def _choice(looked: Looked, number, index, visible):
    """The indexer's scores of what it chose, and the best of what it did not."""
    if number not in looked.rows.get("index_scores", {}):
        return {}
    scores = looked.rows["index_scores"][number][:visible]
    left = np.delete(scores, index)
    best = _number(left.max()) if len(left) else None
    return {"score": _numbers(scores[index]), "best_left_out": best}


def _number(x) -> float:
    return round(float(x), _DIGITS)


def _numbers(values) -> list[float]:
    return [_number(x) for x in np.asarray(values)]
