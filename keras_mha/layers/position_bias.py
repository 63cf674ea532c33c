"""Position biases as Keras layers: added to a score for how far apart the two are."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mha import _checks
from keras_mha._keras import Shape, Tensor, told_as_it_is
from keras_mha.biases import (
    Bias,
    ByDistance,
    Euclidean,
    InWindow,
    Manhattan,
    Positions,
    Slopes,
)
from keras_mha.layers.building import building
from keras_mha.layers.coordinates import checked_coordinates
from keras_mha.layers.position_ids import checked_ids
from keras_mha.layers.sharing import Shareable
from keras_mha.masks import whole_tile
from keras_mha.ops.tensors import constant


class PositionBias(Shareable):
    """Base of the layers whose bias follows from where query and key stand.

    Args:
        num_heads: Number of heads, N; filled in by the layer that holds it.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.
    """

    def __init__(self, num_heads: int | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        if num_heads is not None:
            num_heads = _checks.positive_integer("num_heads", num_heads)
        self.num_heads = num_heads

    def set_heads(self, num_heads: int) -> None:
        """Fills in the number of heads, or raises if it is another one already."""
        if self.num_heads not in (None, num_heads):
            raise ValueError(
                f"`num_heads` of {type(self).__name__} must be that of the layer that "
                f"it is given to. Received: num_heads={self.num_heads} and {num_heads}"
            )
        self.num_heads = num_heads

    def bias(
        self, query_positions: Tensor | None = None, key_positions: Tensor | None = None
    ) -> Bias:
        """Returns the bias as an object that answers for any tile.

        Args:
            query_positions: Whole numbers of shape `(B, T)` or `(1, T)`; `None` for
                `0 ... T - 1`.
            key_positions: Whole numbers of shape `(B, S)` or `(1, S)`; `None` for
                `0 ... S - 1`.

        Where positions have several axes, both have a last axis of that many, and are
        never `None`.
        """
        raise NotImplementedError

    @told_as_it_is
    def call(
        self, position_ids: Tensor, key_position_ids: Tensor | None = None
    ) -> Tensor:
        ids = self._checked_ids(position_ids, key_position_ids)
        columns = ops.shape(ids[1])[1]
        bias = self.bias(*ids).block(whole_tile(ops.shape(ids[0])[1], columns))
        bias = ops.cast(bias, self.compute_dtype)
        return bias if self._has_batch(position_ids, key_position_ids) else bias[0]

    def _require_heads(self) -> None:
        if self.num_heads is None:
            raise ValueError(
                f"`num_heads` of {type(self).__name__} must be given when it is used "
                "without a MultiHeadAttention. Received: num_heads=None"
            )

    def _require_coordinates(self, *sides: Tensor | None) -> None:
        if any(ids is None for ids in sides):
            raise ValueError(
                f"Positions of query and key must be given to a {type(self).__name__} "
                f"of {self.axes} axes, of shape (B, T, {self.axes}). Received: None"
            )

    def _checked_ids(self, position_ids, key_position_ids):
        self._require_heads()
        if key_position_ids is None:
            key_position_ids = position_ids
        names = "position_ids", "key_position_ids"
        given = position_ids, key_position_ids
        checked = [
            checked_ids(name, ids, (None, None))
            if self.axes == 1
            else checked_coordinates(name, ids, (None, None), (1,), self.axes)
            for name, ids in zip(names, given, strict=True)
        ]
        return [ids if self._has_batch(ids) else ids[None] for ids in checked]

    def _has_batch(self, *ids) -> bool:
        rank = 2 if self.axes == 1 else 3
        return any(each is not None and len(each.shape) == rank for each in ids)

    @told_as_it_is
    def compute_output_spec(
        self, position_ids: Tensor, key_position_ids: Tensor | None = None
    ) -> keras.KerasTensor:
        ids = self._checked_ids(position_ids, key_position_ids)
        rows, columns = (each.shape[1] for each in ids)
        shape: Shape = (self.num_heads, rows, columns)
        if self._has_batch(position_ids, key_position_ids):
            batches = [each.shape[0] for each in ids if each.shape[0] != 1]
            shape = (batches[0] if batches else 1, *shape)
        return keras.KerasTensor(shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for `from_config`."""
        return {**super().get_config(), "num_heads": self.num_heads}


DISTANCES = {"manhattan": Manhattan, "euclidean": Euclidean}


@keras.saving.register_keras_serializable(package="keras_mha")
class ALiBi(PositionBias):
    """Attention with linear biases: the farther away a key, the lower its score.

        bias = -slope_n * |key position - query position|

    with a slope for each head that is set, not learned: `2^(-8n / N)` for head
    n = 1 ... N where N is a power of two; else those of the power of two below, and
    every second one of the power of two above. With a causal mask it is the paper's;
    without one it is the symmetric form. With several `axes` (2 for images, 3 for
    video) a token has a position along each, and the distance is one in that grid.

    Args:
        num_heads: Number of heads, N. Defaults to that of the `MultiHeadAttention`
            that it is given to as `position=`.
        axes: Number of axes that positions have.
        distance: How far apart two tokens are where there are several axes:
            `"manhattan"`, the sum of the distances along them (as RMT's decay goes),
            or `"euclidean"`, that of a straight line (as CROMA's 2D-ALiBi has it).
        **kwargs: `name` and `dtype`, as for any Keras layer.

    Call arguments:
        position_ids: Where the queries stand, whole numbers, shape `(T,)` or `(B, T)`;
            with several axes `(T, axes)` or `(B, T, axes)`.
        key_position_ids: Where the keys stand, shape `(S,)` or `(B, S)`, or with
            `axes` as last axis. Defaults to `position_ids`.

    Returns:
        The bias, shape `(N, T, S)`, or `(B, N, T, S)` if positions have a batch axis,
        in the layer's compute dtype.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If `num_heads` is missing, or not that of the layer that holds it.

    Example:

    >>> layer = keras_mha.MultiHeadAttention(8, key_dim=64, position=keras_mha.ALiBi())
    >>> keras_mha.ALiBi(num_heads=8)(keras.ops.arange(10)).shape
    (8, 10, 10)

    References:
        Press et al., 2022, Train short, test long: https://arxiv.org/abs/2108.12409
        Fan et al., 2023, RMT: Retentive networks meet vision transformers:
            https://arxiv.org/abs/2309.11523
        Fuller et al., 2023, CROMA (2D-ALiBi): https://arxiv.org/abs/2311.00566
    """

    def __init__(
        self,
        num_heads: int | None = None,
        axes: int = 1,
        distance: str = "manhattan",
        **kwargs: Any,
    ):
        super().__init__(num_heads, **kwargs)
        self.axes = _checks.positive_integer("axes", axes)
        self.distance = _checks.choice("distance", distance, tuple(DISTANCES))
        self.built = True  # it has no weights

    @property
    def slopes(self) -> np.ndarray:
        """The heads' slopes, float32 NumPy array of shape `(N,)`."""
        return np.array(self._slopes(), "float32")

    def _slopes(self) -> tuple[float, ...]:
        below = 2 ** int(math.log2(self.num_heads))
        slopes = _slopes_of_power_of_two(below)
        others = _slopes_of_power_of_two(2 * below)[::2][: self.num_heads - below]
        return tuple(slopes + others)

    def bias(
        self, query_positions: Tensor | None = None, key_positions: Tensor | None = None
    ) -> Bias:
        positions = Positions(query_positions, key_positions)
        if self.axes > 1:
            self._require_coordinates(query_positions, key_positions)
            kind = DISTANCES[self.distance]
            positions = kind(query_positions, key_positions, self.axes)
        return Slopes(self._slopes(), positions)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for `from_config`."""
        config = super().get_config()
        if self.axes == 1:
            return config  # as it was before there were axes
        return {**config, "axes": self.axes, "distance": self.distance}


def _slopes_of_power_of_two(heads: int) -> list[float]:
    return [2.0 ** (-8.0 * n / heads) for n in range(1, heads + 1)]


_BUCKETS = {"num_buckets": 32, "max_distance": 128, "bidirectional": True}


@keras.saving.register_keras_serializable(package="keras_mha")
class RelativePositionBias(PositionBias):
    """A learned number for each head and distance: T5's bias, or Swin's in a window.

    T5's distances (key position minus query position) share numbers in buckets: near
    ones have one each, farther ones share it with ever more others, and all from
    `max_distance` on share the last.

    With a `window` tokens have a position along each of its axes, and every distance
    within the window has a number of its own, as in Swin: for a window of `(h, w)` the
    table has `(2h - 1)(2w - 1)` rows, in Swin's order, so that its tables can be
    assigned to `table`. Attention over as many axes (`attention_axes`) counts along
    them, and so does attention over one axis on which the whole window lies, row by
    row; other tokens take `position_ids`. A distance beyond the window counts as the
    farthest within.

    Args:
        num_heads: Number of heads, N. Defaults to that of the `MultiHeadAttention`
            that it is given to as `position=`.
        num_buckets: Number of buckets; an even number if `bidirectional`.
        max_distance: The distance from which on all share a bucket.
        bidirectional: Whether keys before and after the query have buckets of their
            own, half of them each; if not, those after share that of distance 0.
        initializer: Initializer of the table.
        window: The window's size along each of its axes, such as `(7, 7)`, in place of
            buckets. Defaults to `None`.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Call arguments:
        position_ids: Where the queries stand, whole numbers, shape `(T,)` or `(B, T)`;
            with a window `(T, axes)` or `(B, T, axes)`.
        key_position_ids: Where the keys stand, shape `(S,)` or `(B, S)`, or with the
            window's axes as last axis. Defaults to `position_ids`.

    Returns:
        The bias, shape `(N, T, S)`, or `(B, N, T, S)` if positions have a batch axis,
        in the layer's compute dtype.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If `num_heads` is missing or not that of the layer that holds it,
            there are too few buckets, or buckets are asked for beside a `window`.

    Example:

    >>> position = keras_mha.RelativePositionBias()
    >>> layer = keras_mha.MultiHeadAttention(8, key_dim=64, position=position)
    >>> keras_mha.RelativePositionBias(num_heads=8)(keras.ops.arange(10)).shape
    (8, 10, 10)

    Within Swin's windows:

    >>> position = keras_mha.RelativePositionBias(window=(7, 7))
    >>> layer = keras_mha.MultiHeadAttention(8, key_dim=64, position=position)
    >>> layer(keras.random.normal((16, 7, 7, 512))).shape
    (16, 7, 7, 512)
    >>> position.table.shape
    (169, 8)

    References:
        Raffel et al., 2020, T5: https://arxiv.org/abs/1910.10683
        Liu et al., 2021, Swin transformer: https://arxiv.org/abs/2103.14030
    """

    def __init__(
        self,
        num_heads: int | None = None,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        initializer: Any = "glorot_uniform",
        window: tuple[int, ...] | None = None,
        **kwargs: Any,
    ):
        super().__init__(num_heads, **kwargs)
        self._initializer = keras.initializers.get(initializer)
        self.window = _checked_window(window)
        self.bidirectional = _checks.boolean("bidirectional", bidirectional)
        least = 4 if self.bidirectional else 2
        self.num_buckets = _checks.integer("num_buckets", num_buckets, least)
        if self.bidirectional and self.num_buckets % 2:
            raise ValueError(
                "`num_buckets` must be even if `bidirectional`, half for each side. "
                f"Received: num_buckets={num_buckets}"
            )
        self.max_distance = _checks.positive_integer("max_distance", max_distance)
        if self.max_distance <= self._exact_buckets:
            raise ValueError(
                "`max_distance` must be more than the distances that have a bucket "
                f"each, {self._exact_buckets}. Received: max_distance={max_distance}"
            )
        if self.window is not None:
            self._number_distances()
            return
        self._buckets = tuple(self._all_buckets().tolist())

    def _number_distances(self) -> None:
        """Gives each distance in the window a row of the table."""
        given = {name: getattr(self, name) for name in _BUCKETS}
        if given != _BUCKETS:
            raise ValueError(
                f"`window` takes the place of buckets: leave {', '.join(_BUCKETS)} as "
                f"they are by default. Received: window={self.window}, {given}"
            )
        self.axes = len(self.window)
        self.num_buckets = math.prod(2 * size - 1 for size in self.window)
        self._buckets = ()

    @property
    def _buckets_a_side(self) -> int:
        return self.num_buckets // 2 if self.bidirectional else self.num_buckets

    @property
    def _exact_buckets(self) -> int:
        return self._buckets_a_side // 2

    @told_as_it_is
    def build(
        self,
        position_ids_shape: Shape | None = None,
        key_position_ids_shape: Shape | None = None,
    ) -> None:
        """Makes the table, which depends on the number of heads only."""
        self._require_heads()
        with building(self):
            self.table = self.add_weight(
                name="table",
                shape=(self.num_buckets, self.num_heads),
                initializer=self._initializer,
                autocast=False,  # it keeps its precision under a mixed policy
            )
        self.built = True

    @property
    def buckets(self) -> tuple[int, ...]:
        """The bucket of each distance from `-max_distance` to `max_distance`.

        Distances are key position minus query position; what is farther is in the same
        bucket as these last ones. With a `window` there are none.
        """
        return self._buckets

    def _all_buckets(self) -> np.ndarray:
        distances = np.arange(-self.max_distance, self.max_distance + 1)
        if self.bidirectional:
            after = np.where(distances > 0, self._buckets_a_side, 0)
            return after + self._bucket_of(abs(distances))
        return self._bucket_of(np.maximum(-distances, 0))

    def _bucket_of(self, distances):
        exact, buckets = self._exact_buckets, self._buckets_a_side
        # In float32, as the published code has it: that decides ties.
        far = np.log(np.maximum(distances, 1).astype("float32") / np.float32(exact))
        far = far / np.float32(math.log(self.max_distance / exact)) * (buckets - exact)
        far = np.minimum(exact + far.astype("int32"), buckets - 1)
        return np.where(distances < exact, distances, far).astype("int32")

    def bias(
        self, query_positions: Tensor | None = None, key_positions: Tensor | None = None
    ) -> Bias:
        # Shaped as it is already: TensorFlow else hands the gradient on as slices, one
        # for each distance, which Keras's optimizers apply otherwise than their sum.
        shape = self.num_buckets, self.num_heads
        table = ops.reshape(ops.convert_to_tensor(self.table), shape)
        if self.window is not None:
            self._require_coordinates(query_positions, key_positions)
            sides = query_positions, key_positions
            return ByDistance(
                ops.transpose(table), InWindow(*sides, self.axes, self.window)
            )
        buckets = constant(self._buckets, "int32")
        values = ops.transpose(ops.take(table, buckets, axis=0))
        return ByDistance(values, Positions(query_positions, key_positions))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for `from_config`."""
        buckets = {name: getattr(self, name) for name in _BUCKETS}
        return {
            **super().get_config(),
            **(buckets if self.window is None else {"window": self.window}),
            "initializer": keras.initializers.serialize(self._initializer),
        }


def _checked_window(window: Any) -> tuple[int, ...] | None:
    if window is None:
        return None
    if not isinstance(window, list | tuple):
        raise TypeError(
            "`window` must be a tuple of its sizes, such as (7, 7). "
            f"Received: window={window!r} (of type {type(window).__name__})"
        )
    sizes = tuple(_checks.positive_integer("window", size) for size in window)
    if len(sizes) < 2:
        raise ValueError(
            f"`window` must have a size for each of two axes or more. Received: {sizes}"
        )
    return sizes
