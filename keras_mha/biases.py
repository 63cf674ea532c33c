"""Biases as objects: what is added to the scores, answered a tile at a time.

A bias that follows from where query and key stand needs no T x S numbers: a kernel asks
for those of a `Tile`, as it asks a mask for its booleans, and passes gradients on to
the weights that the bias holds.
"""

from dataclasses import dataclass

from keras import ops

from keras_mha import _checks
from keras_mha._keras import Shape, Tensor
from keras_mha.masks import Tile
from keras_mha.ops.tensors import columns_at, constant


class Bias:
    """Base of all bias objects; a new one implements `block`.

    Floating-point tensors in its attributes get gradients; NumPy arrays and plain
    numbers are constants.
    """

    is_finite = False
    """Whether none of its numbers is so low that it masks."""

    falls = False
    """Whether far tokens may be left out: only a `DistanceBias` may say so, whose
    positions are counted and whose `of_distances` are alike on either side and nowhere
    rise with the distance."""

    def block(self, tile: Tile) -> Tensor:
        """Returns what is added to a tile of the scaled scores.

        Args:
            tile: The part of the scores. `tile.cut_heads` cuts out what belongs to its
                heads.

        Returns:
            Floating-point numbers that broadcast to `(B, heads, rows, columns)`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `block(tile)`")

    def check(self, scores_shape: Shape) -> None:
        """Raises a `ValueError` if the bias does not fit scores of this shape."""


@dataclass(frozen=True, eq=False)
class Positions:
    """Where the queries and the keys of a call stand.

    Args:
        query: Whole numbers of shape `(B, T)` or `(1, T)`; `None` for 0 ... T - 1.
        key: Whole numbers of shape `(B, S)` or `(1, S)`; `None` for 0 ... S - 1.
    """

    query: Tensor | None = None
    key: Tensor | None = None

    @property
    def are_counted(self) -> bool:
        """Whether both sides are counted from 0."""
        return self.query is None and self.key is None

    def distances(self, tile: Tile) -> Tensor:
        """Key position minus query position, int32, `(B or 1, 1, rows, columns)`."""
        if self.query is None:
            rows = tile.row_indices[None, None]
        else:
            rows = tile.cut_rows(tile.cut_batch(self.query), 1)[:, None, :, None]
        if self.key is None:
            columns = tile.column_indices[None, None]
        else:
            columns = tile.cut_columns(tile.cut_batch(self.key), 1)[:, None, None, :]
        return ops.cast(columns, "int32") - ops.cast(rows, "int32")

    def check(self, scores_shape: Shape) -> None:
        """Raises a `ValueError` if there are not as many as the scores have."""
        batch, _, rows, columns = scores_shape
        sides = ("query", self.query, rows), ("key", self.key, columns)
        for name, positions, length in sides:
            if positions is None:
                continue
            shape = tuple(positions.shape)
            if not self._fits(shape, (batch, length)):
                raise ValueError(
                    f"The positions of the {name} must have the shape "
                    f"{(batch, length, *self._coordinates)}. Received: shape {shape}"
                )

    _coordinates = ()  # the sizes of what each token has

    def _fits(self, shape: Shape, expected: Shape) -> bool:
        return (
            len(shape) == 2 + len(self._coordinates)
            and shape[2:] == self._coordinates
            and _checks.broadcasts_to(shape[:2], expected)
        )


@dataclass(frozen=True, eq=False)
class Coordinates(Positions):
    """Where the queries and the keys of a call stand along several axes.

    Args:
        query: Whole numbers of shape `(B, T, axes)` or `(1, T, axes)`.
        key: Whole numbers of shape `(B, S, axes)` or `(1, S, axes)`.
        axes: How many axes there are.
    """

    axes: int = 2

    are_counted = False

    @property
    def _coordinates(self):
        return (self.axes,)

    def along_axes(self, tile: Tile) -> list[Tensor]:
        """Key minus query, int32, `(B or 1, 1, rows, columns)`, for each axis."""
        return [
            Positions(self.query[..., axis], self.key[..., axis]).distances(tile)
            for axis in range(self.axes)
        ]


class Manhattan(Coordinates):
    """Whose distance is the sum of the distances along the axes."""

    def distances(self, tile):
        return sum(ops.abs(along) for along in self.along_axes(tile))


class Euclidean(Coordinates):
    """Whose distance is that of a straight line, float32."""

    def distances(self, tile):
        along = (ops.cast(each, "float32") for each in self.along_axes(tile))
        return ops.sqrt(sum(each * each for each in along))


@dataclass(frozen=True, eq=False)
class InWindow(Coordinates):
    """Whose distances in a window are numbered, as the rows of Swin's tables are.

    The number of a distance, query minus key along each axis, is 0 for none at all;
    those on either side are numbered in row-major order.

    Args:
        window: The window's size along each axis. What is farther away than it reaches
            counts as its farthest.
    """

    window: tuple[int, ...] = ()

    def distances(self, tile):
        number = 0
        for along, size in zip(self.along_axes(tile), self.window, strict=True):
            number = number * (2 * size - 1) + ops.clip(-along, 1 - size, size - 1)
        return number


class DistanceBias(Bias):
    """Base of the biases that follow from key position minus query position alone.

    A subclass holds `positions` and implements `of_distances`.
    """

    positions: Positions
    is_finite = True

    reach = None
    """The distance from which on, on either side, the bias changes no more; `None` if
    it may."""

    def of_distances(self, distances: Tensor, tile: Tile) -> Tensor:
        """Returns `(heads, *shape)` for distances, int32, of any shape."""
        raise NotImplementedError

    def block(self, tile):
        if self.positions.are_counted:
            return self._along_diagonals(tile)[None]
        found = self.of_distances(self.positions.distances(tile), tile)
        return ops.transpose(found[:, :, 0], (1, 0, 2, 3))

    def _along_diagonals(self, tile):
        """The same number all along a diagonal: worked out once for each of them."""
        rows, columns = tile.rows, tile.columns
        # Row 0's distances in a circle, after its last the ones left of its first: one
        # step back at each row, which is what cutting rows one shorter does, and these
        # too have all columns if there should be no rows. (jax2onnx does not do without
        # the 0.)
        around = rows + columns + 1
        along = ops.arange(0, around, dtype="int32")
        along = ops.where(along < columns, along, along - around)
        distances = along + ops.cast(tile.column - tile.row, "int32")
        circle = self.of_distances(distances, tile)[:, None]
        heads = ops.shape(circle)[0]
        if tile.is_static and rows * columns == 0:
            return ops.zeros((heads, rows, columns), dtype=circle.dtype)
        flat = ops.reshape(
            ops.broadcast_to(circle, (heads, rows, around)), (heads, rows * around)
        )
        flat = flat[:, :-rows]  # of rows * (around - 1) as a symbol JAX asks the sign
        return ops.reshape(flat, (heads, rows, around - 1))[:, :, :columns]

    def check(self, scores_shape):
        self.positions.check(scores_shape)


def least_distance(tile: Tile) -> Tensor:
    """How far apart the nearest of a tile's pairs are, as they are counted; int32."""
    columns_before = tile.row - (tile.column + tile.columns - 1)
    columns_after = tile.column - (tile.row + tile.rows - 1)
    nearest = ops.maximum(ops.maximum(columns_before, columns_after), 0)
    return ops.cast(nearest, "int32")


@dataclass(frozen=True, eq=False)
class Slopes(DistanceBias):
    """`-slope_n * |key position - query position|` for head n.

    Args:
        slopes: A number for each of the N heads.
        positions: Where queries and keys stand.
    """

    slopes: tuple[float, ...]
    positions: Positions = Positions()

    def of_distances(self, distances, tile):
        slopes = tile.cut_heads(constant(self.slopes, "float32"), 0)
        slopes = ops.reshape(slopes, (-1, *(1,) * len(distances.shape)))
        return -slopes * ops.cast(ops.abs(distances), "float32")

    def _along_diagonals(self, tile):
        if not self._is_linear:
            return super()._along_diagonals(tile)
        # Worked out everywhere, in fewer steps than it takes to lay numbers along them.
        rows = ops.cast(tile.row_indices - tile.row, "float32")
        columns = ops.cast(tile.column_indices - tile.row, "float32")
        slopes = tile.cut_heads(constant(self.slopes, "float32"), 0)
        return -slopes[:, None, None] * ops.abs(columns - rows)

    @property
    def falls(self):
        return self._is_linear and self.positions.are_counted and min(self.slopes) >= 0

    @property
    def _is_linear(self):
        return type(self) is Slopes  # a subclass may have other numbers

    def check(self, scores_shape):
        _check_heads("ALiBi", len(self.slopes), scores_shape)
        super().check(scores_shape)


@dataclass(frozen=True, eq=False)
class ByDistance(DistanceBias):
    """A number for each head and each distance; far distances share the last one.

    Args:
        values: Shape `(N, 2 M + 1)`: for the distances (key position minus query
            position) `-M ... M`; what is farther counts as `-M` or `M`.
        positions: Where queries and keys stand.
    """

    values: Tensor
    positions: Positions = Positions()

    @property
    def reach(self):
        return self.values.shape[1] // 2

    def of_distances(self, distances, tile):
        most = self.reach
        index = ops.clip(distances, -most, most) + most
        values = tile.cut_heads(self.values, 0)
        if len(index.shape) == 1:
            # As an embedding is looked up, which every exporter knows.
            return ops.transpose(ops.take(ops.transpose(values), index, axis=0))
        return columns_at(values, index)

    def check(self, scores_shape):
        _check_heads("RelativePositionBias", self.values.shape[0], scores_shape)
        super().check(scores_shape)


def _check_heads(name: str, heads: int, scores_shape: Shape) -> None:
    if heads != scores_shape[1]:
        raise ValueError(
            f"{name} has a bias for {heads} heads, and the scores have "
            f"{scores_shape[1]} heads, (B, N, T, S) = {tuple(scores_shape)}."
        )
