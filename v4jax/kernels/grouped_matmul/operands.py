"""What the kernels of both platforms read and write, by name.

The same tuple holds the arrays outside, their blocks, and inside a kernel the references.
"""

from typing import Any, NamedTuple


class Weight(NamedTuple):
    """A stack of experts' weights [E, out, in] as a kernel reads it; floats have no scales."""

    values: Any
    scales: Any = None


class Extras(NamedTuple):
    """What else `store` reads: the routing weights, and the gradient of z (None where unused)."""

    gate: Any = None
    dz: Any = None


class Operands(NamedTuple):
    """What is multiplied: lhs, one for all weights or one each, with weights; and `Extras`."""

    lhs: list
    weights: list[Weight]
    extras: Extras = Extras()


class Product(NamedTuple):
    """The result of a matmul."""

    out: Any


class UpGradient(NamedTuple):
    """Gradients of a = x w1^T, b = x w3^T and the gate, and z where it is wanted."""

    da: Any
    db: Any
    dgate: Any
    z: Any = None
