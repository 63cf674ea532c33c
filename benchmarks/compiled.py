"""What a program that JAX compiled does on each device: read from its text.

XLA writes a program of several devices as one of them runs it, with its shapes there
and what it sends. Loops count as often as they turn, where the program says how often.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f64": 8, "s64": 8, "u64": 8}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
_SHAPE = re.compile(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'known_trip_count[^\d]*"?n"?[^\d]*(\d+)')


class Instruction(NamedTuple):
    """An instruction of a program.

    Args:
        name: Its name.
        shape: Shape of its result, as XLA writes it.
        kind: What it does, such as `"dot"`.
        rest: Its operands and what else is written behind its name.
    """

    name: str
    shape: str
    kind: str
    rest: str


class Work(NamedTuple):
    """What a program does on each device.

    Args:
        operations: Multiplications and additions of matrix products.
        sent: By kind of collective operation, bytes of what it returns.
        times: By kind of collective operation, how often it is run.
        memory: Bytes that are held beside inputs and outputs, at most.
    """

    operations: int
    sent: Counter
    times: Counter
    memory: int


def work(compiled: Any) -> Work:
    """Returns what a compiled function of JAX's does on each device."""
    operations, sent, times = 0, Counter(), Counter()
    computations, entry = _computations(compiled.as_text())
    for computation, turns in _visited(computations, entry, 1):
        shapes = {each.name: each.shape for each in computation}
        for each in computation:
            kind = each.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                sent[kind] += turns * _size(each.shape)
                times[kind] += turns
            elif kind == "dot":
                operations += turns * _operations(each, shapes)
    memory = compiled.memory_analysis().temp_size_in_bytes
    return Work(operations, sent, times, memory)


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of each computation, and which one is run."""
    computations, current, entry = {}, [], ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line).group(1)
            current = computations[name] = []
            if line.startswith("ENTRY"):
                entry = name
        elif found := _INSTRUCTION.match(line):
            current.append(Instruction(*found.groups()))
    return computations, entry


def _visited(
    computations: dict[str, list[Instruction]], name: str, turns: int
) -> Iterator[tuple[list[Instruction], int]]:
    """Yields every computation that is run, and how often."""
    yield computations[name], turns
    for each in computations[name]:
        if each.kind == "while":
            known = _TURNS.search(each.rest)
            body = re.search(r"body=%?([\w.\-]+)", each.rest).group(1)
            again = turns * (int(known.group(1)) if known else 1)
            yield from _visited(computations, body, again)
            continue
        called = _CALLED.findall(each.rest)
        if branches := _BRANCHES.search(each.rest):
            called += [x.strip().lstrip("%") for x in branches.group(1).split(",")]
        for other in called:
            yield from _visited(computations, other, turns)


def _operations(product: Instruction, shapes: dict[str, str]) -> int:
    """Returns twice the multiplications of a matrix product."""
    first = re.match(r"(?:\w+\[\S* )?%?([\w.\-]+)", product.rest).group(1)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.rest).group(1)
    lengths = _lengths(shapes[first])
    inner = math.prod(lengths[int(axis)] for axis in contracted.split(",") if axis)
    return 2 * inner * math.prod(_lengths(product.shape))


def _lengths(shape: str) -> list[int]:
    return [int(n) for n in _SHAPE.search(shape).group(2).split(",") if n]


def _size(shape: str) -> int:
    """Returns the bytes of all tensors of a shape."""
    return sum(
        BYTES.get(dtype, 4) * math.prod(int(n) for n in lengths.split(",") if n)
        for dtype, lengths in _SHAPE.findall(shape)
    )
