"""What splash attention takes of a mask: a function of positions, and segment ids.

A mask is taken apart into those that must all allow a pair. What depends on positions
alone becomes one function, which the kernel calls for a block of scores at a time.
Padding and packed segments become one number for every query and every key of a
sequence: a pair is allowed where they are equal.
"""

from dataclasses import dataclass, field
from functools import lru_cache, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from keras import ops

from keras_mha._keras import Tensor, dtype_name
from keras_mha.kernels.jax_kernels.mask_parts import dense_shape
from keras_mha.kernels.parts import join_tensors, split_tensors
from keras_mha.masks import (
    And,
    Causal,
    Dense,
    Mask,
    Not,
    Or,
    Padding,
    Prefix,
    Segments,
    SlidingWindow,
    Where,
    intersect,
)

# What a user's function may do with positions: what has one result for every pair, of
# whole numbers and booleans, and what the kernel's compiler knows for these types.
_OF_NUMBERS = (
    *("add", "sub", "mul", "div", "rem", "neg", "abs", "sign", "max", "min", "clamp"),
    *("square", "integer_pow", "lt", "le", "gt", "ge"),
    *("shift_left", "shift_right_arithmetic", "shift_right_logical"),
)
_OF_BOTH = (
    *("eq", "ne", "and", "or", "xor", "not"),
    *("select_n", "broadcast_in_dim", "convert_element_type", "stop_gradient"),
)
_CALLS = ("jit", "pjit")
_SAMPLE = (8, 128)  # the shape of positions that it is tried with

# Others might be cut when they become int32.
_ID_TYPES = frozenset({"int8", "int16", "int32", "uint8", "uint16"})


@dataclass
class Split:
    """A mask taken apart: a pair is allowed where all of this allows it.

    Args:
        positions: Masks of positions alone.
        keys: Booleans that broadcast to `(B, S)`: the keys that are seen.
        queries: Booleans that broadcast to `(B, T)`: the queries that see.
        segments: Packed sequences.
        others: What splash attention does not take.
    """

    positions: list[Mask] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    segments: list[Segments] = field(default_factory=list)
    others: list[Mask] = field(default_factory=list)

    @property
    def has_ids(self) -> bool:
        """Whether queries and keys need numbers."""
        return bool(self.keys or self.queries or self.segments)


def split(mask: Mask | None) -> Split:
    """Takes a mask apart."""
    found = Split()
    if mask is not None:
        _sort_into(found, mask)
    return found


def _sort_into(found, mask):
    if type(mask) is And:
        _sort_into(found, mask.left)
        _sort_into(found, mask.right)
    elif type(mask) is Padding:
        found.keys.append(mask.valid)
    elif type(mask) is Segments:
        found.segments.append(mask)
    elif type(mask) is Dense:
        _sort_dense_into(found, mask)
    elif _speaks_of_positions(mask):
        found.positions.append(mask)
    else:
        found.others.append(mask)


def _sort_dense_into(found, mask):
    """Booleans that are the same for all keys, or for all queries, are padding."""
    batch, heads, rows, columns = dense_shape(mask)
    if heads == 1 and columns == 1:
        found.queries.append(ops.reshape(mask.values, (batch, rows)))
    elif heads == 1 and rows == 1:
        found.keys.append(ops.reshape(mask.values, (batch, columns)))
    else:
        found.others.append(mask)


def _speaks_of_positions(mask: Any) -> bool:
    """Whether a mask says that it knows where tokens stand, and nothing else."""
    kind = type(mask)
    if kind in (And, Or):
        return _speaks_of_positions(mask.left) and _speaks_of_positions(mask.right)
    if kind is Not:
        return _speaks_of_positions(mask.mask)
    if kind is Causal:
        return isinstance(mask.offset, int)
    if kind is Prefix:
        return isinstance(mask.n, int)
    if kind in (SlidingWindow, Where):
        return True
    return kind.block is Mask.block and kind.allowed is not Mask.allowed


def _is_of_ours(mask: Mask) -> bool:
    """Whether all of a mask is of kinds that say exactly which tiles are empty."""
    if type(mask) in (And, Or):
        return _is_of_ours(mask.left) and _is_of_ours(mask.right)
    if type(mask) is Not:
        return _is_of_ours(mask.mask)
    return type(mask) in (Causal, Prefix, SlidingWindow)


def refusal(mask: Mask | None) -> str | None:
    """Returns why splash attention cannot take a mask, or `None` if it can."""
    if mask is None:
        return None
    of_pairs = "splash attention takes no booleans of all pairs"
    if not isinstance(mask, Mask):
        return of_pairs
    found = split(mask)
    if found.others:
        kind = type(found.others[0])
        if kind is Dense:
            return of_pairs
        return (
            f"splash attention takes no {kind.__name__} that is of more than positions"
        )
    if len(found.segments) > 1:
        return "splash attention takes one kind of segments"
    for segments in found.segments:
        kinds = {dtype_name(segments.query_ids), dtype_name(segments.key_ids)}
        if not kinds <= _ID_TYPES:
            return "splash attention takes segment ids of int32 at most"
    if all(map(_is_of_ours, found.positions)):
        return None
    if split_tensors(intersect(*found.positions))[1]:
        return "splash attention takes no mask of positions that holds tensors"
    if not positions(found).is_elementwise:
        return (
            "splash attention takes no mask that does not work out every pair "
            "by itself, in whole numbers"
        )
    return None


# --------------------------------------------------------------------- positions


@dataclass(frozen=True)
class _Positions:
    """Positions as they are asked for of a tile, whatever their shape."""

    row_indices: Any
    column_indices: Any

    @property
    def cheap_indices(self):
        return self.row_indices, self.column_indices


@dataclass(frozen=True)
class PositionFunction:
    """A mask of positions as a function; equal ones can share a program.

    Args:
        parts: The mask, as `split_tensors` leaves it; `None` allows all.
        columns: How many keys there are, where others behind them are to be hidden.
    """

    parts: Any
    columns: int | None = None

    @property
    def mask(self) -> Mask | None:
        """The mask."""
        return None if self.parts is None else join_tensors(self.parts, ())

    def __call__(self, rows: Any, columns: Any) -> Any:
        """Returns booleans for positions of queries and keys, all of one shape."""
        program = jax.make_jaxpr(self.allowed)(rows, columns)
        (allowed,) = _run(program, (rows, columns))
        return allowed

    def allowed(self, rows: Any, columns: Any) -> Any:
        """Returns the same, by whatever operations the mask is written with."""
        allowed = None
        if self.parts is not None:
            allowed = jnp.asarray(self.mask.block(_Positions(rows, columns)))
            allowed = allowed if allowed.dtype == bool else allowed != 0
        if self.columns is not None:
            exist = columns < self.columns
            allowed = exist if allowed is None else jnp.logical_and(allowed, exist)
        return allowed

    @property
    def is_elementwise(self) -> bool:
        """Whether the result of a pair is made of its two positions alone."""
        return _is_elementwise(self)

    @property
    def says_what_is_empty(self) -> bool:
        """Whether the mask's `status` finds all tiles that are empty."""
        return self.parts is None or _is_of_ours(self.mask)


def positions(found: Split, columns: int | None = None) -> PositionFunction | None:
    """Returns one function of all masks of positions, or `None` if nothing is hidden.

    Args:
        found: The mask taken apart, whose masks of positions hold no tensors.
        columns: How many keys there are, if there is room for more.
    """
    if not found.positions and columns is None:
        return None
    parts, _ = split_tensors(intersect(*found.positions))
    return PositionFunction(parts if found.positions else None, columns)


@lru_cache(maxsize=128)
def _is_elementwise(function):
    index = jax.ShapeDtypeStruct(_SAMPLE, jnp.int32)
    try:
        program = jax.make_jaxpr(function.allowed)(index, index)
    except Exception:  # a user's function may raise anything of what it is not made for
        return False
    (result,) = program.out_avals
    return (
        not program.consts
        and result.shape == _SAMPLE
        and result.dtype == bool
        and all(map(_is_known, program.jaxpr.eqns))
    )


def _is_known(step):
    name, kinds = step.primitive.name, [x.aval for x in step.invars]
    if name in _CALLS:
        inner = step.params["jaxpr"]
        return not inner.consts and all(map(_is_known, inner.jaxpr.eqns))
    types = [str(kind.dtype) for kind in kinds]
    if not all(kind.shape in ((), _SAMPLE) for kind in kinds):
        return False
    if name == "select_n" and types.pop(0) != "bool":
        return False
    known = ("int32",) if name in _OF_NUMBERS else ("int32", "bool")
    return name in _OF_NUMBERS + _OF_BOTH and all(kind in known for kind in types)


def _run(program, values):
    """Runs steps that `_is_known` knows, one after the other."""
    found = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    found |= zip(program.jaxpr.invars, values, strict=True)

    def value(x):
        return x.val if isinstance(x, Literal) else found[x]

    for step in program.jaxpr.eqns:
        given = [value(x) for x in step.invars]
        if step.primitive.name in _CALLS:
            results = _run(step.params["jaxpr"], given)
        elif step.primitive.name == "sign":
            # jax lowers it by the TPU that it finds, and finds none on other machines.
            x = jnp.asarray(given[0])
            results = [(x > 0).astype("int32") - (x < 0).astype("int32")]
        else:
            results = [step.primitive.bind(*given, **step.params)]
        found |= zip(step.outvars, results, strict=True)
    return [value(x) for x in program.jaxpr.outvars]


# ------------------------------------------------------------------- segment ids


def segment_ids(
    found: Split, batch: int, rows: int, columns: int
) -> tuple[Tensor, Tensor] | None:
    """Returns int32 of shapes `(B, T)` and `(B, S)`, equal where padding and segments
    allow a pair; `None` where neither hides anything."""
    if not found.has_ids:
        return None
    hidden_query, hidden_key = 1, 2
    queries = jnp.zeros((batch, rows), jnp.int32)
    keys = jnp.zeros((batch, columns), jnp.int32)
    for segments in found.segments:
        queries = _spread(segments.query_ids, queries.shape).astype(jnp.int32)
        keys = _spread(segments.key_ids, keys.shape).astype(jnp.int32)
    if found.keys:
        if found.segments:
            hidden_key = unused_number(queries)
        are_seen = _all_of(found.keys, keys.shape)
        keys = jnp.where(are_seen, keys, hidden_key)
    if found.queries:
        if found.segments:
            hidden_query = unused_number(keys)
        see = _all_of(found.queries, queries.shape)
        queries = jnp.where(see, queries, hidden_query)
    return queries, keys


def unused_number(ids: Tensor) -> Tensor:
    """Returns for each row of whole numbers one that is not among them, `(B, 1)`.

    Of more numbers than the row is long some are missing; of their two halves one
    holds fewer of the row than it has places, and so on down to one number.
    """
    places = 1 << ids.shape[1].bit_length()
    lowest = jnp.zeros((ids.shape[0], 1), jnp.int32)
    while places > 1:
        places //= 2
        among = (ids >= lowest) & (ids < lowest + places)
        count = among.sum(axis=1, keepdims=True, dtype=jnp.int32)
        lowest = jnp.where(count < places, lowest, lowest + places)
    return lowest


def _all_of(masks, shape):
    booleans = (_spread(mask, shape).astype(bool) for mask in masks)
    return reduce(jnp.logical_and, booleans)


def _spread(x, shape):
    return jnp.broadcast_to(jnp.asarray(x), shape)
