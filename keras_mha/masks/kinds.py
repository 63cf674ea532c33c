"""The kinds of masks: by where tokens stand, and by what is known of them."""

from collections.abc import Callable

from keras import ops

from keras_mha import _checks
from keras_mha._keras import Tensor, dtype_name, is_integer
from keras_mha.masks.fields import (
    as_booleans,
    check_int_or_vector,
    check_shape,
    check_vector,
    hold_tensor,
)
from keras_mha.masks.mask import (
    And,
    Dense,
    Mask,
    Not,
    Or,
    intersect,
    mask_dataclass,
    serializable,
)
from keras_mha.masks.tile import Tile, with_axes


@serializable
@mask_dataclass
class Causal(Mask):
    """Query `i` sees the keys `j <= i + offset`.

    Args:
        offset: How many keys stand before the first query: an int, or an int tensor
            of shape `(B,)` with one for each row of the batch. Defaults to 0.
    """

    offset: int | Tensor = 0

    def __post_init__(self):
        check_int_or_vector(self, "offset")

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
        check_vector(self, "offset", scores_shape)


@serializable
@mask_dataclass
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


@serializable
@mask_dataclass
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
        check_int_or_vector(self, "n", minimum=0)

    def block(self, tile):
        return tile.column_indices < _spread(self.n, tile)

    def status(self, tile):
        if not (tile.is_static and isinstance(self.n, int)):
            return "mixed"
        if tile.column + tile.columns <= self.n:
            return "full"
        return "empty" if tile.column >= self.n else "mixed"

    def check(self, scores_shape):
        check_vector(self, "n", scores_shape)


@serializable
@mask_dataclass
class Padding(Mask):
    """Every query sees the valid keys.

    Args:
        valid: Booleans of shape `(B, S)`, `True` where the key is a real token.
    """

    valid: Tensor

    def __post_init__(self):
        hold_tensor(self, "valid", rank=2)
        object.__setattr__(self, "valid", as_booleans("valid", self.valid))

    def block(self, tile):
        valid = tile.cut_columns(tile.cut_batch(self.valid), 1)
        return with_axes(ops.cast(valid, "bool"), 1, 2)

    def check(self, scores_shape):
        batch, _, _, columns = scores_shape
        check_shape(self, "valid", self.valid, (batch, columns))


@serializable
@mask_dataclass
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
            hold_tensor(self, name, rank=2)
            if not is_integer(getattr(self, name)):
                raise TypeError(
                    f"`{name}` of Segments must hold whole numbers. "
                    f"Received: dtype {dtype_name(getattr(self, name))}"
                )

    def block(self, tile):
        rows = tile.cut_rows(tile.cut_batch(self.query_ids), 1)
        columns = tile.cut_columns(tile.cut_batch(self.key_ids), 1)
        return ops.equal(with_axes(rows, 1, 3), with_axes(columns, 1, 2))

    def check(self, scores_shape):
        batch, _, rows, columns = scores_shape
        check_shape(self, "query_ids", self.query_ids, (batch, rows))
        check_shape(self, "key_ids", self.key_ids, (batch, columns))


@serializable
@mask_dataclass
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


def is_plain_causal(mask: Mask | None) -> bool:
    """Whether a mask is what others call causal: `j <= i`, for every row alike."""
    # The very type: a user's subclass may allow something else.
    return type(mask) is Causal and isinstance(mask.offset, int) and not mask.offset


def is_certain(mask: Mask | None) -> bool:
    """Whether every tile of which a mask says `"mixed"` is known to hold a pair that
    may attend."""
    if type(mask) is Or:
        return is_certain(mask.left) and is_certain(mask.right)
    if type(mask) is And:
        # Where causal is mixed, the diagonal runs, which every window holds.
        parts = sorted((mask.left, mask.right), key=is_plain_causal)
        return type(parts[0]) is SlidingWindow and is_plain_causal(parts[1])
    numbers = {Causal: "offset", SlidingWindow: "size", Prefix: "n"}
    if type(mask) in numbers:
        return isinstance(getattr(mask, numbers[type(mask)]), int)
    return mask is None


def is_alike_for_all_rows(mask: Mask) -> bool:
    """Whether a mask is known to hide the same keys from every query of a sequence."""
    if type(mask) in (And, Or):
        return is_alike_for_all_rows(mask.left) and is_alike_for_all_rows(mask.right)
    if type(mask) is Not:
        return is_alike_for_all_rows(mask.mask)
    if type(mask) is Dense:
        return mask.values.shape[-2] == 1
    return type(mask) in (Padding, Prefix)


def hidden_rows_apart(mask: Mask | None) -> tuple[list[Dense], Mask | None]:
    """Parts a mask from what hides queries, each from all keys alike.

    Args:
        mask: A mask; `None` allows all.

    Returns:
        Masks of one column, all of which must show a query for it to see anything, and
        the rest; `None` if there is none.
    """
    if type(mask) is And:
        left, right = hidden_rows_apart(mask.left), hidden_rows_apart(mask.right)
        return left[0] + right[0], intersect(left[1], right[1])
    if type(mask) is Dense and mask.values.shape[-1] == 1:
        return [mask], None
    return [], mask


def _spread(value: int | Tensor, tile: Tile) -> int | Tensor:
    """Shapes one number per row of the batch so that it broadcasts to the scores."""
    if isinstance(value, int):
        return value
    return ops.reshape(ops.cast(tile.cut_batch(value), "int32"), (-1, 1, 1, 1))
