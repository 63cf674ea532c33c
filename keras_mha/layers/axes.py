"""Several attention axes as one: folds images and video into `(B, T, N, H)` and back.

A layer's input has a batch axis, any number of position axes and a features axis.
Attention runs over some of the position axes, in row-major order as one long axis; the
others join the batch. With the usual input `(B, T, D)` there is nothing to fold.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_mha import _checks
from keras_mha._keras import Shape, Tensor


def checked_attention_axes(value: Any) -> tuple[int, ...] | None:
    """Returns `attention_axes` as a tuple of distinct ints, or raises."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        axes = tuple(_checks.integer("attention_axes", axis) for axis in value)
    else:
        axes = (_checks.integer("attention_axes", value),)
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(
            "`attention_axes` must be an axis or several distinct ones. "
            f"Received: attention_axes={value!r}"
        )
    return axes


class AttentionAxes:
    """Which axes attention runs over, for inputs of one rank.

    Args:
        rank: Number of axes of the inputs, batch and features included.
        axes: The axes to attend over; `None` for all but batch and features.
    """

    def __init__(self, rank: int, axes: Sequence[int] | None = None):
        if axes is None:
            axes = range(1, rank - 1)
        self.rank = rank
        self.attended = tuple(self._resolved(axis, axes) for axis in axes)
        if len(set(self.attended)) < len(self.attended):
            raise ValueError(
                "`attention_axes` must be distinct. "
                f"Received: attention_axes={axes} for inputs of {rank} axes"
            )
        others = (axis for axis in range(rank - 1) if axis not in self.attended)
        self.batch = tuple(others)
        self.is_plain = rank == 3

    def _resolved(self, axis: int, axes: Sequence[int]) -> int:
        resolved = axis + self.rank if axis < 0 else axis
        if not 1 <= resolved <= self.rank - 2:
            raise ValueError(
                "`attention_axes` must name axes between the batch axis (0) and the "
                f"features axis ({self.rank - 1}). "
                f"Received: attention_axes={tuple(axes)} for inputs of {self.rank} axes"
            )
        return resolved

    def fold(self, x: Tensor) -> Tensor:
        """`(B, *positions, N, H)` to `(B', T, N, H)`."""
        return x if self.is_plain else self._fold(x, trailing=2)

    def fold_positions(self, x: Tensor) -> Tensor:
        """`(B, *positions)` to `(B', T)`."""
        return x if self.is_plain else self._fold(x, trailing=0)

    def fold_ids(self, ids: Tensor, like: Tensor) -> Tensor:
        """`(T,)`, or the shape of `like` without its features, to `(B' or 1, T)`."""
        if len(ids.shape) == 1:
            return ids[None]
        if self.is_plain:
            return ids
        ids = ops.broadcast_to(ids, ops.shape(like)[:-1])
        return self.fold_positions(ids)

    def fold_coordinates(self, ids: Tensor, like: Tensor) -> Tensor:
        """Folds what `checked_coordinates` returned to `(B' or 1, T, coordinates)`.

        Args:
            ids: With all position axes, or with the attended ones alone.
            like: What they are the coordinates of.
        """
        attended, count = sorted(self.attended), ids.shape[-1]
        if len(ids.shape) == len(attended) + 1:
            order = (attended.index(axis) for axis in self.attended)
            ids = ops.transpose(ids, (*order, len(attended)))
            length = math.prod(ops.shape(ids)[:-1])
            return ops.reshape(ids, (1, length, count))
        if self.is_plain:
            return ids
        ids = ops.broadcast_to(ids, (*ops.shape(like)[: self.rank - 1], count))
        return self._fold(ids, trailing=1)

    def _fold(self, x: Tensor, trailing: int) -> Tensor:
        kept = tuple(range(self.rank - 1, self.rank - 1 + trailing))
        sizes = ops.shape(x)
        x = ops.transpose(x, self.batch + self.attended + kept)
        batch, length = self._merged_sizes(sizes)
        return ops.reshape(x, (batch, length, *sizes[self.rank - 1 :]))

    def unfold(self, x: Tensor, like: Tensor) -> Tensor:
        """`(B', T, N, V)` to `(B, *positions, N, V)`, positions as those of `like`."""
        if self.is_plain:
            return x
        sizes = ops.shape(like)
        order = self.batch + self.attended
        x = ops.reshape(x, (*(sizes[axis] for axis in order), *ops.shape(x)[2:]))
        kept = (self.rank - 1, self.rank)
        return ops.transpose(x, (*(order.index(i) for i in range(len(order))), *kept))

    def unfold_positions(self, x: Tensor, like: Tensor) -> Tensor:
        """`(B', T)` to `(B, *positions)`, positions as those of `like`."""
        return self.unfold(x[:, :, None, None], like)[..., 0, 0]

    def unfold_scores(self, scores: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """`(B', N, T, S)` to `(*batch, N, *query positions, *key positions)`."""
        if self.is_plain:
            return scores
        heads = scores.shape[1]
        return ops.reshape(
            scores, self.scores_shape(ops.shape(query), ops.shape(key), heads)
        )

    def scores_shape(self, query: Shape, key: Shape, heads: int) -> Shape:
        """Returns the scores' shape for inputs of the shapes `query` and `key`."""
        return (
            *(query[axis] for axis in self.batch),
            heads,
            *(query[axis] for axis in self.attended),
            *(key[axis] for axis in self.attended),
        )

    def expand_mask(self, shape: Shape) -> Shape:
        """Gives a mask's shape the axes it leaves out: heads, and batch in front.

        As in Keras, what precedes the query's and the key's positions is batch first;
        only a mask with all axes has one for the heads.
        """
        pairs = 2 * len(self.attended)
        missing = len(self.batch) + 1 + pairs - len(shape)
        if missing <= 0 or len(shape) < pairs:
            return shape
        head = len(shape) - pairs
        return (*shape[:head], *(1,) * missing, *shape[head:])

    def fold_scores(self, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Folds what broadcasts to the unfolded scores so that it does to the folded.

        A group of axes that are all 1 becomes one axis of 1; nothing that could be
        broadcast later is broadcast now.
        """
        full = self.scores_shape(ops.shape(query), ops.shape(key), 1)
        x = ops.reshape(x, (1,) * (len(full) - len(x.shape)) + tuple(ops.shape(x)))
        batch, attended = len(self.batch), len(self.attended)
        edges = (0, batch, batch + 1, batch + 1 + attended, len(full))
        target, merged = [], []
        for start, stop in itertools.pairwise(edges):
            group = tuple(ops.shape(x)[start:stop])
            if start != batch and any(size != 1 for size in x.shape[start:stop]):
                group = full[start:stop]
            target.extend(group)
            merged.append(math.prod(group))
        return ops.reshape(ops.broadcast_to(x, target), merged)

    def _merged_sizes(self, sizes: Sequence[Any]) -> tuple[Any, Any]:
        return (
            math.prod([sizes[axis] for axis in self.batch]),
            math.prod([sizes[axis] for axis in self.attended]),
        )
