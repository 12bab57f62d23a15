"""The collectives of a compiled program, counted as often as its loops run them.

Reads the optimised HLO as text. A collective inside a `while` counts once for each of its trips
(XLA's own analyses count a loop's body once). Both branches of a conditional count: an upper bound.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_BITS = {"pred": 8, "u4": 4, "s4": 4, "bf16": 16, "token": 0}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations)=\{?(%?[^,}\s]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-]+))"
)
_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# As JAX 0.12 writes them: mesh['expert'=2,'tensor'=8], device_ids=(...) {'expert','tensor':(2)4}
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, ?device_ids=\((?:([\d,]+)|\[([\d,]+)\](?:T\(([\d,]+)\))?)\))? ?\{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: of `KINDS`. group: devices that take part together. span: from the first to the last
        of them in the mesh's order. axes: mesh axes along which they differ.
      count: how often a step runs it.
      bytes: what leaves a device in one run, at least: of n devices' all-gather (n - 1)/n of the
        result, of a reduce-scatter or all-to-all of the operand, of an all-reduce twice that.
        A ragged all-to-all counts as if the smaller of its two buffers were full and came from all
        alike; the larger one has room for the most uneven spread.
    """

    kind: str
    group: int
    span: int
    axes: tuple[str, ...]
    count: int
    bytes: int | float


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    text: str
    root: bool


def collectives(text: str, mesh: Mapping[str, int]) -> tuple[list[Collective], int]:
    """The collectives of a program, and how many loops hold some and have no count that we see.

    Args:
      text: `compiled.as_text()`. mesh: axis sizes of the mesh that it was compiled for, in order.
    """
    program = Program(text)
    found = []
    for computation, times in program.runs().items():
        for instruction in program.computations[computation]:
            kind = _kind(instruction.opcode)
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # a TPU's fusion of both
            if kind:
                found.append(_collective(program, computation, instruction, kind, times, mesh))
    return found, program.unknown_loops


def _kind(opcode):
    plain = opcode.removesuffix("-start")
    return plain if plain in KINDS else None


class Program:
    """Computations of an HLO module by name, and how often each runs."""

    def __init__(self, text: str):
        self.computations, self.entry = _read(text)
        self.unknown_loops = 0

    def runs(self) -> dict[str, int]:
        """How often a step runs each computation that holds or reaches a collective."""
        times: dict[str, int] = {}
        self._visit(self.entry, 1, times)
        return times

    def _visit(self, name, times, found):
        found[name] = found.get(name, 0) + times
        for instruction in self.computations[name]:
            called = self._called(instruction)
            if not any(self._reaches(child) for child in called):
                continue
            trips = self.trips(name, instruction) if instruction.opcode == "while" else 1
            if trips is None:
                self.unknown_loops += 1
            for child in called:
                self._visit(child, times * (1 if trips is None else trips), found)

    def _called(self, instruction):
        text = instruction.text
        if instruction.opcode in ("async-update", "async-done"):
            return []  # what they call, their async-start has called
        if instruction.opcode == "conditional":
            names = ",".join(a or b for a, b in _BRANCHES.findall(text)).split(",")
        elif "=%" in text:
            names = _CALLED.findall(text)
        else:
            return []
        names = [name.strip().lstrip("%") for name in names]
        return [name for name in names if name in self.computations]

    @functools.cache  # noqa: B019 (a program lives as long as its analysis)
    def _reaches(self, name):
        """Whether a computation holds a collective or calls one that does."""
        return any(
            _kind(instruction.opcode) or any(map(self._reaches, self._called(instruction)))
            for instruction in self.computations[name]
        )

    def trips(self, where: str, loop: _Instruction) -> int | None:
        """How often a `while` runs; None where that is not a constant of the program."""
        known = _TRIPS.search(loop.text)
        if known:
            return int(known[1])
        limit = self._limit(_named(loop.text, "condition"))
        if limit is None:
            return None
        index, end = limit
        start = self._constant_in_tuple(where, loop.operands[0], index)
        step = self._step(_named(loop.text, "body"), index)
        if start is None or not step:
            return None
        return max(0, -(-(end - start) // step))

    def _limit(self, condition):
        """The element of the loop's tuple that is compared, and the number it stays below."""
        by_name = self.named(condition)
        compare, by_name = self._opened(by_name, _root(by_name))
        if compare.opcode != "compare":
            return None
        left, right = (by_name[name] for name in compare.operands)
        direction = re.search(r"direction=(\w+)", compare.text)[1]
        if left.opcode == "constant":
            left, right = right, left
            direction = {"GT": "LT", "GE": "LE"}.get(direction, direction)
        if left.opcode != "get-tuple-element" or right.opcode != "constant":
            return None
        if direction not in ("LT", "LE"):
            return None
        return _index(left), int(_argument(right)) + (direction == "LE")

    def _constant_in_tuple(self, where, name, index):
        by_name = self.named(where)
        made = by_name.get(name)
        if made is None or made.opcode != "tuple":
            return None
        return _value(by_name, made.operands[index])

    def _step(self, body, index):
        by_name = self.named(body)
        root = _root(by_name)
        if root.opcode != "tuple":
            return None
        added, by_name = self._opened(by_name, by_name[root.operands[index]])
        values = [_value(by_name, name) for name in added.operands]
        constants = [value for value in values if value is not None]
        return constants[0] if added.opcode == "add" and len(constants) == 1 else None

    def _opened(self, by_name, instruction):
        """An instruction and those it may name; of a fusion its root, the parameters resolved."""
        if instruction.opcode != "fusion":
            return instruction, by_name
        inner = self.named(_named(instruction.text, "calls"))
        outer = {
            name: by_name[instruction.operands[int(_argument(parameter))]]
            for name, parameter in inner.items()
            if parameter.opcode == "parameter"
        }
        return _root(inner), by_name | inner | outer

    def named(self, computation: str | None) -> dict[str, _Instruction]:
        """A computation's instructions by name."""
        return {i.name: i for i in self.computations.get(computation, ())}


def _root(by_name):
    return next(i for i in by_name.values() if i.root)


def _value(by_name, name):
    """The integer that a name stands for, through copies; None if it is no constant."""
    instruction = by_name.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = by_name.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "constant":
        return None
    found = _argument(instruction)
    return int(found) if re.fullmatch(r"-?\d+", found) else None


def _argument(instruction):
    """What stands in the parentheses of `constant(7)` or `parameter(0)`."""
    return re.search(rf"{instruction.opcode}\((-?[^)]*)\)", instruction.text)[1]


def _index(instruction):
    return int(re.search(r"index=(\d+)", instruction.text)[1])


def _named(text, attribute):
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", text)
    return found[1] if found else None


def _read(text):
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None:
            head = _COMPUTATION.match(line)
            if head:
                current = computations.setdefault(head[1], [])
                entry = head[1] if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif instruction := _parse(line):
            current.append(instruction)
    return computations, entry


def _parse(line):
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    body = match[3].split(", metadata=", 1)[0] + _kept_config(match[3])
    opcode = _OPCODE.search(" " + body if not body.startswith("(") else body)
    if opcode is None:
        return None
    start = body.index(opcode[1] + "(")
    inside = body[start + len(opcode[1]) + 1 :]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside[: _closing(inside)]))
    return _Instruction(match[2], opcode[1], body[:start], operands, body, bool(match[1]))


def _kept_config(body):
    """Of what follows the metadata only the trip count is of use."""
    known = _TRIPS.search(body)
    return f" {known[0]}" if known else ""


def _closing(text):
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(text)


def _collective(program, computation, instruction, kind, times, mesh):
    group = _group(instruction.text, math.prod(mesh.values()))
    by_name = program.named(computation)
    operands = [by_name[name].result for name in instruction.operands if name in by_name]
    moved = _moved(kind, instruction, operands, len(group))
    axes = _axes(group, mesh)
    span = max(group) - min(group) + 1
    return Collective(kind, len(group), span, axes, times, moved)


def _moved(kind, instruction, operands, n):
    share = (n - 1) / n
    if kind == "collective-permute":
        return sum(map(_bytes, operands))
    if kind == "ragged-all-to-all":
        return share * min(map(_bytes, operands[:2]))  # rows, and the buffer they go to
    given = sum(map(_bytes, operands))
    if kind == "all-gather":
        return (n - 1) * given
    return (2 if kind == "all-reduce" else 1) * share * given


def _group(text, devices) -> Sequence[int]:
    """The devices of the first group; of a permutation those of the first pair."""
    if pairs := _PAIRS.search(text):
        return _lists(pairs[1])[0]
    if groups := _GROUPS.search(text):
        return _lists(groups[1])[0]
    if iota := _IOTA.search(text):
        shape = list(map(int, iota[1].split(",")))
        return _range(iota[2], iota[3]).reshape(shape)[0].tolist()
    if mesh := _MESH.search(text):
        return _mesh_group(*mesh.groups())
    if named := re.search(r"replica_groups=(?!\{\}).{,150}", text):
        raise ValueError(f"a compiled program has {named[0]!r}, of a form that v4jax does not know")
    return list(range(devices))  # no groups named: all of them


def _range(source, transposed, *size):
    """Devices as XLA abbreviates them, [4,32]T(1,0): 0, 1, ... of a shape, its axes reordered."""
    shape = list(map(int, source.split(","))) if source else size
    devices = np.arange(math.prod(shape)).reshape(shape)
    return devices.transpose(list(map(int, transposed.split(",")))) if transposed else devices


def _mesh_group(mesh, order, source, transposed, axes):
    """The first of the groups that lie along axes, or parts (before)size of axes, of a mesh."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", mesh)}
    parts = re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?", axes)
    # Each axis as all of its factors between the cuts that its parts make.
    shape, place = [], {}
    for name, size in sizes.items():
        own = [(int(before), int(part)) for other, before, part in parts if other == name and part]
        cuts = sorted({1, size, *(b for b, _ in own), *(b * p for b, p in own)})
        for low, high in zip(cuts, cuts[1:], strict=False):
            place[name, low] = len(shape), high
            shape.append(high // low)
    group = []
    for name, before, part in parts:
        low, end = (int(before), int(before) * int(part)) if part else (1, sizes[name])
        while low < end:
            dimension, low = place[name, low]
            group.append(dimension)
    devices = np.array(order.split(","), int) if order else _range(source, transposed, *shape)
    devices = np.moveaxis(devices.reshape(shape), group, range(-len(group), 0))
    return devices.reshape(-1, math.prod(shape[i] for i in group))[0].tolist()


def _lists(text):
    return [list(map(int, part.split(","))) for part in re.findall(r"\{([\d,]+)\}", text)]


def _axes(group, mesh):
    places = np.array(np.unravel_index(np.array(group), tuple(mesh.values())))
    return tuple(axis for axis, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1)


def _bytes(shape):
    """Bytes of an HLO type; of a tuple, of all its parts."""
    return sum(
        _bits(dtype) * math.prod(int(n) for n in size.split(",") if n) / 8
        for dtype, size in _SHAPE.findall(shape)
    )


def _bits(dtype):
    if dtype in _BITS:
        return _BITS[dtype]
    return 8 if dtype.startswith("f8") else int(re.search(r"\d+", dtype)[0])
