"""What a mask is: the protocol that kernels ask, the algebra of masks, and booleans."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from keras_mha._keras import Shape, Tensor
from keras_mha.masks.fields import as_booleans, check_dense_shape, hold_tensor
from keras_mha.masks.tile import Status, Tile, with_axes


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


serializable = keras.saving.register_keras_serializable(package="keras_mha")
mask_dataclass = dataclass(frozen=True, eq=False)


@serializable
@mask_dataclass
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


@serializable
@mask_dataclass
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


@serializable
@mask_dataclass
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


@serializable
@mask_dataclass
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
        hold_tensor(self, "values")
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
            values = with_axes(values, 0, 1)
        elif len(values.shape) == 3:
            values = with_axes(values, 1)
        values = tile.cut_columns(tile.cut_rows(tile.cut_batch(values), 2), 3)
        return ops.cast(values, "bool")

    def check(self, scores_shape):
        check_dense_shape("mask", tuple(self.values.shape), scores_shape)


def as_mask(value: Mask | Tensor) -> Mask:
    """Returns a mask as it is, and an array or tensor of booleans as a `Dense` mask."""
    return value if isinstance(value, Mask) else Dense(value)


def intersect(*masks: Mask | None) -> Mask | None:
    """Returns the mask that allows what all given masks allow; `None` allows all."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    result = given[0]
    for mask in given[1:]:
        result = And(result, mask)
    return result
