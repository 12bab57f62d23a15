"""What api hands to every implementation, by name; one tuple serves arrays and references."""

from typing import Any, NamedTuple


class Sublayer(NamedTuple):
    """What `post` mixes: the sub-layer's output y [B,T,D], the streams h [B,T,M,D], the weights."""

    y: Any
    h: Any
    post: Any
    comb: Any


class Weights(NamedTuple):
    """What makes logits of streams: fn [X, M*D], base [X], scale [3] (one number for each kind)."""

    fn: Any
    base: Any
    scale: Any


class Mixing(NamedTuple):
    """What `pre` decides for each token: post [B,T,M] and comb [B,T,M,M], or their gradients."""

    post: Any
    comb: Any


class Saved(NamedTuple):
    """What the gradients keep: logits before scale and base [X, N], and the rms factors [N]."""

    mixed: Any
    norm: Any


class Packed(NamedTuple):
    """A `Sublayer` as kernels take it (`pack` of a platform's tiles), or its gradients.

    Attributes:
      y, h: padded to whole tiles.
      coefficients: post above comb, M + M*M rows of numbers, tokens last.
    """

    y: Any
    h: Any
    coefficients: Any


class Mixed(NamedTuple):
    """What kernels decide for each token, one row per number: `Saved`, and all (2+M)M weights."""

    mixed: Any
    norm: Any
    weights: Any
