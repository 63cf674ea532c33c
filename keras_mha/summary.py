"""What heads do, in a few numbers each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_mha import _checks
from keras_mha._keras import Tensor, dtype_name

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, eq=False)
class AttentionSummary:
    """What `attention_summary` found, a place for each head of each layer.

    All arrays have the shape `(heads of all layers,)`. `rich.print(summary)` shows them
    as a table.

    Args:
        layer: Paths of the layers, strings; empty ones for scores without a layer.
        head: Numbers of the heads within their layers, integers.
        entropy: How spread out the attention is, in nats: 0 when all of it is on one
            key, `log(S)` when it is even over S keys.
        distance: How far from the query the attention goes, in positions.
        first_token: Share of the attention on the first key. Where little else gets
            any, it is a sink (https://arxiv.org/abs/2309.17453).
        diagonal: Share of the attention on the key at the query's own position.
    """

    layer: np.ndarray
    head: np.ndarray
    entropy: np.ndarray
    distance: np.ndarray
    first_token: np.ndarray
    diagonal: np.ndarray

    def table(self) -> "Table":
        """Returns the numbers as a `rich.table.Table`.

        Raises:
            MissingExtra: If rich is not installed.
        """
        from keras_mha.info import require

        require("AttentionSummary.table", {"rich": "rich"}, "viz")
        from rich.table import Table

        table = Table(title="What heads attend to")
        has_layers = any(self.layer)
        if has_layers:
            table.add_column("layer")
        for name in ("head", "entropy", "distance", "first token", "diagonal"):
            table.add_column(name, justify="right")
        for i, layer in enumerate(self.layer):
            is_new = i == 0 or layer != self.layer[i - 1]
            table.add_row(
                *([layer if is_new else ""] if has_layers else []),
                str(self.head[i]),
                f"{self.entropy[i]:.2f}",
                f"{self.distance[i]:.1f}",
                f"{self.first_token[i]:.1%}",
                f"{self.diagonal[i]:.1%}",
                end_section=i + 1 < len(self.layer) and self.layer[i + 1] != layer,
            )
        return table

    def __rich__(self) -> "Table":
        return self.table()


def attention_summary(
    scores: Tensor | Mapping[str, Tensor],
    *,
    heads: int | Sequence[int] | None = None,
    query_rows: int | Sequence[int] | None = None,
) -> AttentionSummary:
    """Says of each head how spread out its attention is, how far it goes, and where to.

    The numbers are means over the batch and over the queries. Queries that attend to
    nothing (padding) do not count. With an attention sink weights sum to less than 1:
    entropy and distance are those of the weights divided by their sum, shares are not.

    Args:
        scores: Attention weights of shape `(T, S)`, `(N, T, S)` or `(B, N, T, S)`, or
            what `keras_mha.attention_maps` returned.
        heads: Which heads they are, if they are not all: what `attention_maps` was
            given. Defaults to 0, 1 ... N - 1.
        query_rows: Where the queries stand, if they are not all: what `attention_maps`
            was given, without negative numbers. Defaults to 0, 1 ... T - 1. (Calls with
            a cache start later: give their rows, a call at a time.)

    Returns:
        The numbers, as arrays with a place for each head; `.table()` shows them. A head
        without any query that attends to something gets NaN.

    Raises:
        TypeError: If the scores are no numbers.
        ValueError: If the scores are no attention weights, or `heads` or `query_rows`
            are not as many as there are.

    Example:

    >>> scores = np.tril(np.ones((1, 2, 4, 4))) / np.arange(1, 5)[:, None]
    >>> summary = keras_mha.attention_summary(scores)
    >>> summary.first_token.round(2)
    array([0.52, 0.52])
    """
    maps = scores if isinstance(scores, Mapping) else {"": scores}
    layers, names, numbers = [], [], []
    for layer, weights in maps.items():
        weights = _checked_scores(weights)
        names.extend(_given("heads", heads, weights.shape[1]))
        rows = _given("query_rows", query_rows, weights.shape[2], minimum=0)
        for head in range(weights.shape[1]):
            layers.append(layer)
            numbers.append(_numbers(weights[:, head], rows))
    columns = np.array(numbers, "float64").reshape(-1, 4).T
    return AttentionSummary(np.array(layers, str), np.array(names, "int64"), *columns)


def _numbers(weights: np.ndarray, rows: np.ndarray) -> tuple[float, ...]:
    """Entropy, distance, share of the first key, share of the own position.

    Args:
        weights: Of one head, shape `(B, T, S)`.
        rows: Where the queries stand, shape `(T,)`.
    """
    columns = np.arange(weights.shape[-1])
    total = weights.sum(-1)
    share = weights / np.where(total > 0, total, 1)[..., None]
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(-1)
    distance = (share * abs(rows[:, None] - columns)).sum(-1)
    first = weights[..., :1].sum(-1)
    diagonal = (weights * (rows[:, None] == columns)).sum(-1)
    is_live = total > 0
    if not is_live.any():
        return (np.nan,) * 4
    return tuple(x[is_live].mean() for x in (entropy, distance, first, diagonal))


def _checked_scores(scores: Tensor) -> np.ndarray:
    """Returns attention weights as a float64 array `(B, N, T, S)`, or raises."""
    if not hasattr(scores, "shape"):
        scores = np.asarray(scores)
    if not any(kind in str(scores.dtype) for kind in ("float", "int", "bool")):
        raise TypeError(
            "`scores` must be numbers, or a mapping from layers to numbers. "
            f"Received: {type(scores).__name__} of dtype {scores.dtype}"
        )
    if dtype_name(scores) == "bfloat16":  # not every backend makes an array of it
        scores = keras.ops.cast(scores, "float32")
    weights = np.asarray(keras.ops.convert_to_numpy(scores), "float64")
    if not 2 <= weights.ndim <= 4:
        raise ValueError(
            "`scores` must have the shape (T, S), (N, T, S) or (B, N, T, S). "
            f"Received: scores of shape {weights.shape}"
        )
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(
            "`scores` must be attention weights, after softmax: finite, none below 0. "
            f"Received: scores from {weights.min():.3g} to {weights.max():.3g}"
        )
    return weights.reshape((1,) * (4 - weights.ndim) + weights.shape)


def _given(
    name: str, numbers: Any, length: int, minimum: int | None = None
) -> np.ndarray:
    """Returns the numbers of heads or rows; those of all by default."""
    if numbers is None:
        return np.arange(length)
    numbers = _checks.integers(name, numbers, minimum)
    if len(numbers) != length:
        raise ValueError(
            f"`{name}` must be as many as the scores have, {length}. "
            f"Received: {len(numbers)} of them"
        )
    return np.array(numbers)
