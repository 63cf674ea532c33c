"""Masks as objects: who may attend to whom, answered a tile at a time.

Row `i` of the score matrix is a query, column `j` a key, and `True` means that the
query may attend to the key. A mask never builds the whole matrix by itself: a kernel
asks it about a `Tile`, first what the tile is (`status`: empty, full or mixed), which
costs nothing, and only for a mixed tile its booleans (`block`).

Masks compose with `&`, `|` and `~`:

>>> window = masks.Causal() & masks.SlidingWindow(512)
>>> prefix = masks.Causal() | masks.Prefix(16)
"""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_mha import _checks
from keras_mha._keras import (
    Shape,
    Tensor,
    as_tensor,
    dtype_name,
    is_float,
    is_integer,
    is_symbolic,
)
from keras_mha._lengths import unless_one
from keras_mha.ops.tensors import is_read_by_compiler, known_numbers

Status = Literal["empty", "full", "mixed"]
"""What a mask says of a tile: no pair may attend, every pair may, or it depends."""


class Tile(NamedTuple):
    """A rectangle of the score matrix.

    Args:
        row: First query position. An int, or a scalar tensor inside a loop.
        rows: Number of query positions.
        column: First key position. An int, or a scalar tensor inside a loop.
        columns: Number of key positions.
        whole: Whether the tile is the whole matrix, so that nothing need be cut.
        batch: The one row of the batch that the tile is for, or `None` for all.
        head: The first query head that the tile is for, or `None` for all heads.
        heads: How many heads the tile is for, from this one on.
    """

    row: Any
    rows: Any
    column: Any
    columns: Any
    whole: bool = False
    batch: Any = None
    head: Any = None
    heads: int | None = None

    @property
    def is_static(self) -> bool:
        """Whether all four numbers are known now."""
        return all(isinstance(number, int) for number in self[:4])

    @property
    def row_indices(self) -> Tensor:
        """The query positions, int32, shape `(rows, 1)`."""
        return _positions(self.row, self.rows)[:, None]

    @property
    def column_indices(self) -> Tensor:
        """The key positions, int32, shape `(1, columns)`."""
        return _positions(self.column, self.columns)[None, :]

    @property
    def cheap_indices(self) -> tuple[Tensor, Tensor]:
        """Both positions, as NumPy arrays where they are few: comparing some numbers
        takes less time than calling the backend for it."""
        few = self.is_static and self.rows * self.columns <= 2**12
        if few and not is_read_by_compiler():
            rows = np.arange(self.row, self.row + self.rows)
            columns = np.arange(self.column, self.column + self.columns)
            return rows[:, None], columns[None, :]
        return self.row_indices, self.column_indices

    def cut_batch(self, x: Tensor, axis: int = 0) -> Tensor:
        """Cuts the tile's row of the batch out of `x`; an axis of length 1 stays."""
        return x if self.batch is None else _cut(x, axis, self.batch, 1)

    def cut_heads(self, x: Tensor, axis: int) -> Tensor:
        """Cuts the tile's heads out of `x`; an axis of length 1 stays."""
        return x if self.head is None else _cut(x, axis, self.head, self.heads)

    def cut_rows(self, x: Tensor, axis: int) -> Tensor:
        """Cuts the tile's rows out of `x`; an axis of length 1 stays, to broadcast."""
        return x if self.whole else _cut(x, axis, self.row, self.rows)

    def cut_columns(self, x: Tensor, axis: int) -> Tensor:
        """Cuts the tile's columns out of `x`; an axis of length 1 stays."""
        return x if self.whole else _cut(x, axis, self.column, self.columns)


def _with_axes(x: Tensor, *axes: int) -> Tensor:
    # LiteRT knows `x[:, None]` only of lengths that are known beforehand.
    for axis in axes:
        x = ops.expand_dims(x, axis)
    return x


def _positions(start: Any, length: Any) -> Tensor:
    if isinstance(start, int) and isinstance(length, int):
        return ops.arange(start, start + length, dtype="int32")
    return ops.arange(length, dtype="int32") + ops.cast(start, "int32")


def whole_tile(rows: Any, columns: Any) -> Tile:
    """Returns the tile that is the whole score matrix."""
    return Tile(0, rows, 0, columns, whole=True)


def _cut(x: Tensor, axis: int, start: Any, size: Any) -> Tensor:
    if x.shape[axis] == 1:
        return x
    starts = [0] * len(x.shape)
    sizes = list(ops.shape(x))
    length = sizes[axis]
    starts[axis] = unless_one(length, start, one=0)
    sizes[axis] = unless_one(length, size)
    return ops.slice(x, starts, sizes)


class Mask:
    """Base of all masks: says for every query and key whether they may attend.

    A new kind of mask implements `allowed` (from positions alone; `Where` makes one of
    a function) or `block` (from data it holds), and may implement `status` to let
    kernels skip tiles.

    Example:

    >>> class Dilated(keras_mha.masks.Mask):
    ...     def allowed(self, rows, columns):
    ...         return (rows - columns) % 2 == 0
    >>> mask = Dilated() & keras_mha.masks.Causal()
    """

    def allowed(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Says who may attend, from positions alone.

        Args:
            rows: Query positions, int32, shape `(rows, 1)`.
            columns: Key positions, int32, shape `(1, columns)`.

        Returns:
            Booleans that broadcast to `(batch, heads, rows, columns)`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement `allowed(rows, columns)` "
            "or `block(tile)`."
        )

    def block(self, tile: Tile) -> Tensor:
        """Returns the tile's booleans, broadcastable to `(B, N, rows, columns)`."""
        return self.allowed(tile.row_indices, tile.column_indices)

    def status(self, tile: Tile) -> Status:
        """Says what is known of a tile without computing its booleans."""
        return "mixed"

    def check(self, scores_shape: Shape) -> None:
        """Raises a `ValueError` if the mask cannot mask scores of this shape."""

    def __and__(self, other: "Mask | Tensor") -> "Mask":
        return And(self, as_mask(other))

    def __rand__(self, other: "Mask | Tensor") -> "Mask":
        return And(as_mask(other), self)

    def __or__(self, other: "Mask | Tensor") -> "Mask":
        return Or(self, as_mask(other))

    def __ror__(self, other: "Mask | Tensor") -> "Mask":
        return Or(as_mask(other), self)

    def __invert__(self) -> "Mask":
        return Not(self)

    # NumPy arrays on the left of `&` must leave the operation to the mask.
    __array_ufunc__ = None

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` needs to make the same mask again."""
        if not dataclasses.is_dataclass(self):
            raise NotImplementedError(
                f"{type(self).__name__} must implement `get_config()` (or be a "
                "dataclass) and be registered with "
                "`keras.saving.register_keras_serializable()` to be saved."
            )
        return {
            field.name: keras.saving.serialize_keras_object(getattr(self, field.name))
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Mask":
        """Makes the mask again that `get_config` described."""
        return cls(
            **{
                name: keras.saving.deserialize_keras_object(value)
                for name, value in config.items()
            }
        )


_serializable = keras.saving.register_keras_serializable(package="keras_mha")
_mask = dataclass(frozen=True, eq=False)


@_serializable
@_mask
class Causal(Mask):
    """Query `i` sees the keys `j <= i + offset`.

    Args:
        offset: How many keys stand before the first query: an int, or an int tensor
            of shape `(B,)` with one for each row of the batch. Defaults to 0.
    """

    offset: int | Tensor = 0

    def __post_init__(self):
        _check_int_or_vector(self, "offset")

    def block(self, tile):
        if not isinstance(self.offset, int):
            rows = tile.row_indices + _spread(self.offset, tile)
            return tile.column_indices <= rows
        rows, columns = tile.cheap_indices
        return ops.convert_to_tensor(columns <= rows + self.offset, dtype="bool")

    def status(self, tile):
        if not (tile.is_static and isinstance(self.offset, int)):
            return "mixed"
        last_row, last_column = tile.row + tile.rows - 1, tile.column + tile.columns - 1
        if last_column <= tile.row + self.offset:
            return "full"
        return "empty" if tile.column > last_row + self.offset else "mixed"

    def check(self, scores_shape):
        _check_vector(self, "offset", scores_shape)


@_serializable
@_mask
class SlidingWindow(Mask):
    """Query `i` sees the keys `j` with `|i - j| < size`, on both sides.

    Args:
        size: Number of keys on either side, the query's own position included.

    References:
        Beltagy et al., 2020, Longformer: https://arxiv.org/abs/2004.05150
    """

    size: int

    def __post_init__(self):
        size = _checks.positive_integer("size", self.size)
        object.__setattr__(self, "size", size)

    def block(self, tile):
        rows, columns = tile.cheap_indices
        near = abs(rows - columns) < self.size
        return ops.convert_to_tensor(near, dtype="bool")

    def status(self, tile):
        if not tile.is_static:
            return "mixed"
        last_row, last_column = tile.row + tile.rows - 1, tile.column + tile.columns - 1
        if max(last_row - tile.column, last_column - tile.row) < self.size:
            return "full"
        nearest = max(tile.column - last_row, tile.row - last_column)
        return "empty" if nearest >= self.size else "mixed"


@_serializable
@_mask
class Prefix(Mask):
    """Every query sees the first `n` keys: `Causal() | Prefix(n)` is a prefix LM.

    Args:
        n: Length of the prefix: an int, or an int tensor of shape `(B,)` with one for
            each row of the batch.

    References:
        Raffel et al., 2020, T5: https://arxiv.org/abs/1910.10683
    """

    n: int | Tensor

    def __post_init__(self):
        _check_int_or_vector(self, "n", minimum=0)

    def block(self, tile):
        return tile.column_indices < _spread(self.n, tile)

    def status(self, tile):
        if not (tile.is_static and isinstance(self.n, int)):
            return "mixed"
        if tile.column + tile.columns <= self.n:
            return "full"
        return "empty" if tile.column >= self.n else "mixed"

    def check(self, scores_shape):
        _check_vector(self, "n", scores_shape)


@_serializable
@_mask
class Padding(Mask):
    """Every query sees the valid keys.

    Args:
        valid: Booleans of shape `(B, S)`, `True` where the key is a real token.
    """

    valid: Tensor

    def __post_init__(self):
        _hold_tensor(self, "valid", rank=2)
        object.__setattr__(self, "valid", as_booleans("valid", self.valid))

    def block(self, tile):
        valid = tile.cut_columns(tile.cut_batch(self.valid), 1)
        return _with_axes(ops.cast(valid, "bool"), 1, 2)

    def check(self, scores_shape):
        batch, _, _, columns = scores_shape
        _check_shape(self, "valid", self.valid, (batch, columns))


@_serializable
@_mask
class Segments(Mask):
    """Packed sequences: a query sees the keys of its own segment.

    Args:
        query_ids: Whole numbers of shape `(B, T)`, the segment of each query.
        key_ids: Whole numbers of shape `(B, S)`, the segment of each key. Defaults to
            `query_ids`. No number is special; 0 is a segment like any other.
    """

    query_ids: Tensor
    key_ids: Tensor | None = None

    def __post_init__(self):
        if self.key_ids is None:
            object.__setattr__(self, "key_ids", self.query_ids)
        for name in ("query_ids", "key_ids"):
            _hold_tensor(self, name, rank=2)
            if not is_integer(getattr(self, name)):
                raise TypeError(
                    f"`{name}` of Segments must hold whole numbers. "
                    f"Received: dtype {dtype_name(getattr(self, name))}"
                )

    def block(self, tile):
        rows = tile.cut_rows(tile.cut_batch(self.query_ids), 1)
        columns = tile.cut_columns(tile.cut_batch(self.key_ids), 1)
        return ops.equal(_with_axes(rows, 1, 3), _with_axes(columns, 1, 2))

    def check(self, scores_shape):
        batch, _, rows, columns = scores_shape
        _check_shape(self, "query_ids", self.query_ids, (batch, rows))
        _check_shape(self, "key_ids", self.key_ids, (batch, columns))


@_serializable
@_mask
class Dense(Mask):
    """A mask that is already there as booleans.

    Args:
        values: Booleans of shape `(T, S)`, `(B, T, S)` or `(B, N, T, S)`, `True` where
            the query may attend to the key; any length may be 1, to broadcast. Whole
            numbers count as booleans. Floating-point numbers do too (non-zero means
            "may attend", as in Keras), with a warning: a mask that is to be added to
            the scores is a bias. Such a one has numbers below 0, which are an error
            where they are known (in compiled programs they are not).
    """

    values: Tensor

    def __post_init__(self):
        _hold_tensor(self, "values")
        shape = tuple(self.values.shape)
        if not 2 <= len(shape) <= 4:
            raise ValueError(
                "A mask must have the shape (T, S), (B, T, S) or (B, N, T, S). "
                f"Received: shape {shape}"
            )
        values = as_booleans("values", self.values, warn=True)
        object.__setattr__(self, "values", values)

    def block(self, tile):
        values = self.values
        if len(values.shape) == 2:
            values = _with_axes(values, 0, 1)
        elif len(values.shape) == 3:
            values = _with_axes(values, 1)
        values = tile.cut_columns(tile.cut_rows(tile.cut_batch(values), 2), 3)
        return ops.cast(values, "bool")

    def check(self, scores_shape):
        check_dense_shape("mask", tuple(self.values.shape), scores_shape)


@_serializable
@_mask
class Where(Mask):
    """Query `i` sees the keys `j` for which a function says so.

    Args:
        function: Takes the query positions, int32 of shape `(rows, 1)`, and the key
            positions, `(1, columns)`; returns booleans that broadcast to both. To be
            saved, it must be registered with
            `keras.saving.register_keras_serializable()`.

    Example:

    >>> dilated = keras_mha.masks.Where(lambda i, j: (i - j) % 2 == 0)
    """

    function: Callable[[Tensor, Tensor], Tensor]

    def __post_init__(self):
        if not callable(self.function):
            raise TypeError(
                "`function` of Where must be a function of query and key positions. "
                f"Received: function={self.function!r} "
                f"(of type {type(self.function).__name__})"
            )

    def allowed(self, rows, columns):
        return self.function(rows, columns)


@_serializable
@_mask
class And(Mask):
    """Both masks allow it; written `left & right`."""

    left: Mask
    right: Mask

    def block(self, tile):
        return ops.logical_and(self.left.block(tile), self.right.block(tile))

    def status(self, tile):
        both = {self.left.status(tile), self.right.status(tile)}
        if "empty" in both:
            return "empty"
        return "full" if both == {"full"} else "mixed"

    def check(self, scores_shape):
        self.left.check(scores_shape)
        self.right.check(scores_shape)


@_serializable
@_mask
class Or(Mask):
    """At least one of the masks allows it; written `left | right`."""

    left: Mask
    right: Mask

    def block(self, tile):
        return ops.logical_or(self.left.block(tile), self.right.block(tile))

    def status(self, tile):
        both = {self.left.status(tile), self.right.status(tile)}
        if "full" in both:
            return "full"
        return "empty" if both == {"empty"} else "mixed"

    def check(self, scores_shape):
        self.left.check(scores_shape)
        self.right.check(scores_shape)


@_serializable
@_mask
class Not(Mask):
    """The mask forbids it; written `~mask`."""

    mask: Mask

    def block(self, tile):
        return ops.logical_not(self.mask.block(tile))

    def status(self, tile):
        opposite = {"empty": "full", "full": "empty", "mixed": "mixed"}
        return opposite[self.mask.status(tile)]

    def check(self, scores_shape):
        self.mask.check(scores_shape)


def is_plain_causal(mask: Mask | None) -> bool:
    """Whether a mask is what others call causal: `j <= i`, for every row alike."""
    # The very type: a user's subclass may allow something else.
    return type(mask) is Causal and isinstance(mask.offset, int) and not mask.offset


def is_alike_for_all_rows(mask: Mask) -> bool:
    """Whether a mask is known to hide the same keys from every query of a sequence."""
    if type(mask) in (And, Or):
        return is_alike_for_all_rows(mask.left) and is_alike_for_all_rows(mask.right)
    if type(mask) is Not:
        return is_alike_for_all_rows(mask.mask)
    return type(mask) in (Padding, Prefix)


def as_mask(value: Mask | Tensor) -> Mask:
    """Returns a mask as it is, and an array or tensor of booleans as a `Dense` mask."""
    return value if isinstance(value, Mask) else Dense(value)


def as_booleans(name: str, mask: Tensor | None, warn: bool = False) -> Tensor | None:
    """Returns a mask of floating-point numbers as booleans, and any other as it is.

    Args:
        name: Of the argument, for the message.
        mask: A tensor of any kind.
        warn: Whether to warn that floats may not mean what they are taken for.

    Raises:
        ValueError: If numbers, where they are known, are negative: such a mask is made
            to be added to the scores, and as booleans would show what it shall hide.
    """
    # Integers are not looked at: 0 and 1 of a tokenizer come with every call.
    if mask is None or not is_float(mask):
        return mask
    if known_numbers(ops.any(mask < 0)):
        raise ValueError(
            f"`{name}` must not hold negative numbers: a mask that is added to the "
            "scores belongs in `attention_bias` (`bias` of `dot_product_attention`), "
            f'and in `{name}` non-zero means "may attend". '
            f"Received: {name} of dtype {dtype_name(mask)} with a lowest number of "
            f"{float(known_numbers(ops.cast(ops.min(mask), 'float32'))):g}"
        )
    if warn:
        warnings.warn(
            "A mask of floating-point numbers is taken as booleans: non-zero means "
            '"may attend". A mask that is to be added to the scores belongs in '
            "`attention_bias` (`bias` of `dot_product_attention`).",
            stacklevel=5,
        )
    return ops.cast(mask, "bool")


def check_dense_shape(name: str, shape: Shape, scores_shape: Shape) -> None:
    """Raises if booleans of this shape cannot mask scores of shape `(B, N, T, S)`."""
    full = (shape[0], 1, *shape[1:]) if len(shape) == 3 else shape
    if len(shape) < 2 or not _checks.broadcasts_to(full, scores_shape):
        raise ValueError(
            f"`{name}` must have the shape (T, S), (B, T, S) or (B, N, T, S) and "
            f"broadcast to the scores, (B, N, T, S) = {tuple(scores_shape)}. "
            f"Received: {name} of shape {tuple(shape)}"
        )


def intersect(*masks: Mask | None) -> Mask | None:
    """Returns the mask that allows what all given masks allow; `None` allows all."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    result = given[0]
    for mask in given[1:]:
        result = And(result, mask)
    return result


def _hold_tensor(mask: Mask, name: str, rank: int | None = None) -> None:
    """Makes the field `name` a tensor, once, and checks what can be seen of it."""
    kind, value = type(mask).__name__, getattr(mask, name)
    if is_symbolic(value):
        raise TypeError(
            f"`{name}` of {kind} cannot be a KerasTensor: a Functional model does not "
            "look inside mask objects. Give the layer the tensor itself, as "
            "`attention_mask=`, `query_mask=`, `value_mask=` or `segment_ids=`."
        )
    tensor = as_tensor(value)
    if tensor is None:
        raise TypeError(
            f"`{name}` of {kind} must be an array or a tensor of booleans or numbers. "
            f"Received: {name}={value!r} (of type {type(value).__name__})"
        )
    value = tensor
    if rank is not None and len(value.shape) != rank:
        raise ValueError(
            f"`{name}` of {kind} must have {rank} axes. "
            f"Received: shape {tuple(value.shape)}"
        )
    object.__setattr__(mask, name, value)


def _check_shape(mask: Mask, name: str, value: Tensor, expected: Shape) -> None:
    if not _checks.broadcasts_to(tuple(value.shape), expected):
        raise ValueError(
            f"`{name}` of {type(mask).__name__} must have the shape {expected}. "
            f"Received: shape {tuple(value.shape)}"
        )


def _check_int_or_vector(mask: Mask, name: str, minimum: int | None = None) -> None:
    value = getattr(mask, name)
    if hasattr(value, "shape") and len(value.shape) > 0:
        _hold_tensor(mask, name, rank=1)
        if not is_integer(getattr(mask, name)):
            raise TypeError(
                f"`{name}` of {type(mask).__name__} must hold whole numbers. "
                f"Received: dtype {dtype_name(value)}"
            )
    else:
        object.__setattr__(mask, name, _checks.integer(name, value, minimum))


def _check_vector(mask: Mask, name: str, scores_shape: Shape) -> None:
    value = getattr(mask, name)
    if not isinstance(value, int):
        _check_shape(mask, name, value, scores_shape[:1])


def _spread(value: int | Tensor, tile: Tile) -> int | Tensor:
    """Shapes one number per row of the batch so that it broadcasts to the scores."""
    if isinstance(value, int):
        return value
    return ops.reshape(ops.cast(tile.cut_batch(value), "int32"), (-1, 1, 1, 1))
