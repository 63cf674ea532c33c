"""What heads do, in a few numbers each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_mha import _checks
from keras_mha._keras import Tensor, dtype_name
from keras_mha.inspect import tiles_of_rows, watched
from keras_mha.kernels import reference
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.reference import Scores

if TYPE_CHECKING:
    from rich.table import Table

# How many scores are worked out at a time: 4 MiB of them in float32, several times.
_AT_ONCE = 2**20


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
        largest_product: The largest `query . key * scale` of a query and a key that it
            may attend to: what QK-clip keeps below a threshold
            (https://arxiv.org/abs/2507.20534). NaN if scores were given.
        largest_logit: The largest number that softmax is taken of, which is that after
            the soft cap and with the biases; the same if there are none. NaN if scores
            were given.
    """

    layer: np.ndarray
    head: np.ndarray
    entropy: np.ndarray
    distance: np.ndarray
    first_token: np.ndarray
    diagonal: np.ndarray
    largest_product: np.ndarray
    largest_logit: np.ndarray

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
        has_logits = not np.isnan(self.largest_logit).all()
        names = ["head", "entropy", "distance", "first token", "diagonal"]
        for name in names + ["largest product", "largest logit"] * has_logits:
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
                *[
                    f"{x[i]:.2f}"
                    for x in (self.largest_product, self.largest_logit)
                    if has_logits
                ],
                end_section=i + 1 < len(self.layer) and self.layer[i + 1] != layer,
            )
        return table

    def __rich__(self) -> "Table":
        return self.table()


def attention_summary(
    scores: keras.layers.Layer | Tensor | Mapping[str, Tensor],
    inputs: Any = None,
    layers: Any = None,
    *,
    heads: int | Sequence[int] | None = None,
    query_rows: int | Sequence[int] | None = None,
    **call_arguments: Any,
) -> AttentionSummary:
    """Says of each head how spread out its attention is, how far it goes, and where to,
    and of a model's heads how large their logits are.

    Given a model and its inputs, the model is called as by `attention_maps`, and its
    layers' scores are worked out some rows at a time and never kept: the memory that
    takes is linear in the length. Or give scores that there are already.

    The numbers are means over the batch and over the queries, but for the largest ones.
    Queries that attend to nothing (padding) do not count. With an attention sink or
    learned keys weights sum to less than 1: entropy and distance are those of the
    weights divided by their sum, shares are not. (The products and logits of learned
    keys count among the largest.) Of talking heads the weights are those of softmax,
    before they are mixed, and the products those before, too.

    Args:
        scores: A Keras model or layer that holds `keras_mha.MultiHeadAttention`; or
            attention weights of shape `(T, S)`, `(N, T, S)` or `(B, N, T, S)`, or
            what `keras_mha.attention_maps` returned.
        inputs: What the model is called with.
        layers: Which attention layers of the model, as for `attention_maps`. Defaults
            to all.
        heads: Which heads of a model, as for `attention_maps`; of scores, which heads
            they are, if they are not all. Defaults to 0, 1 ... N - 1.
        query_rows: Which queries of a model; of scores, where the queries stand, if
            they are not all, without negative numbers. Defaults to 0, 1 ... T - 1.
            (Calls with a cache start later: give scores and their rows, a call at a
            time.)
        **call_arguments: Passed on to the model's call. `training` is `False` unless
            it is given here.

    Returns:
        The numbers, as arrays with a place for each head; `.table()` shows them. A head
        without any query that attends to something gets NaN.

    Raises:
        TypeError: If the scores are no numbers, or arguments are given that belong to
            a model.
        ValueError: If the scores are no attention weights, or `heads` or `query_rows`
            are not as many as there are; of a model as `attention_maps`.

    Example:

    >>> scores = np.tril(np.ones((1, 2, 4, 4))) / np.arange(1, 5)[:, None]
    >>> summary = keras_mha.attention_summary(scores)
    >>> summary.first_token.round(2)
    array([0.52, 0.52])
    >>> layer = keras_mha.MultiHeadAttention(2, 8, position=keras_mha.RotaryEmbedding())
    >>> x = keras.random.normal((1, 4096, 16))
    >>> keras_mha.attention_summary(layer, x, use_causal_mask=True).largest_logit.shape
    (2,)
    """
    if isinstance(scores, keras.layers.Layer):
        wishes = layers, heads, query_rows, call_arguments
        found = watched(_statistics, scores, inputs, *wishes)
        return _summary(found)
    given = {"inputs": inputs, "layers": layers, **call_arguments}
    for name, argument in given.items():
        if argument is not None:
            raise TypeError(
                f"`{name}` belongs to a model as the first argument. "
                f"Received: scores={type(scores).__name__}, {name}={argument!r}"
            )
    maps = scores if isinstance(scores, Mapping) else {"": scores}
    found = {}
    for layer, weights in maps.items():
        weights = _checked_scores(weights)
        names = _given("heads", heads, weights.shape[1])
        rows = _given("query_rows", query_rows, weights.shape[2], minimum=0)
        numbers = [_numbers(weights[:, head], rows) for head in range(len(names))]
        found[layer] = names, numbers
    return _summary(found)


def _summary(found: Mapping[str, tuple[Any, Any]]) -> AttentionSummary:
    """Joins what was found of each layer: numbers of its heads, and of each head those
    of the summary."""
    layers = [layer for layer, (heads, _) in found.items() for _ in heads]
    names = [head for heads, _ in found.values() for head in heads]
    numbers = [each for _, numbers in found.values() for each in numbers]
    columns = np.array(numbers, "float64").reshape(len(names), 6).T
    return AttentionSummary(np.array(layers, str), np.array(names, "int64"), *columns)


def _statistics(
    call: AttentionCall, heads: list[int], rows: list[int], learned: int
) -> tuple[list[int], np.ndarray]:
    """Returns heads, and the six numbers of each; see `keras_mha.inspect.watched`."""
    sums, largest = np.zeros((5, len(heads))), np.full((2, len(heads)), -np.inf)
    for run, tile in tiles_of_rows(call, rows, _AT_ONCE):
        found = reference.scores_of_rows(call, tile)
        wanted = [row - tile.row for row in run]
        if len(wanted) < tile.rows:
            found = Scores(*(_rows_of(x, wanted) for x in found))
        part = _sums_of_rows(found.weights[..., learned:], run)
        sums += keras.ops.convert_to_numpy(part)[:, heads]
        part = keras.ops.convert_to_numpy(_largest_of_rows(found))[:, heads]
        largest = np.maximum(largest, part)
    count, *sums = sums
    means = np.divide(
        sums, count, where=count > 0, out=np.full((4, len(heads)), np.nan)
    )
    largest[np.isneginf(largest)] = np.nan
    return heads, np.concatenate([means, largest]).T


def _rows_of(x: Tensor | None, rows: list[int]) -> Tensor | None:
    if x is None or x.shape[-2] == 1:
        return x
    # Counted from the end: what a mask says may have two axes only.
    return keras.ops.take(x, keras.ops.convert_to_tensor(rows, dtype="int32"), axis=-2)


def _sums_of_rows(weights: Tensor, rows: list[int]) -> Tensor:
    """Sums over the batch and the rows that attend to something: of 1, entropies,
    distances, shares of the first key and of the own position.

    Args:
        weights: Shape `(B, N, rows, S)`.
        rows: Where the queries stand.

    Returns:
        Shape `(5, N)`.
    """
    ops = keras.ops
    columns = ops.arange(ops.shape(weights)[3], dtype="int32")
    distance = ops.convert_to_tensor(rows, dtype="int32")[:, None] - columns
    total = ops.sum(weights, axis=3)
    is_live = ops.cast(total > 0, weights.dtype)
    safe_total = ops.where(total > 0, total, ops.ones_like(total))
    logs = ops.log(ops.where(weights > 0, weights, ops.ones_like(weights)))
    entropy = ops.log(safe_total) - ops.sum(weights * logs, axis=3) / safe_total
    far = ops.cast(ops.abs(distance), weights.dtype)
    far = ops.sum(weights * far, axis=3) / safe_total
    own = ops.sum(weights * ops.cast(distance == 0, weights.dtype), axis=3)
    first = ops.sum(weights[..., :1], axis=3)
    of_rows = [is_live, *(x * is_live for x in (entropy, far, first, own))]
    return ops.stack([ops.sum(x, axis=(0, 2)) for x in of_rows])


def _largest_of_rows(found: Scores) -> Tensor:
    """Returns the largest product and the largest logit of what is seen, `(2, N)`;
    minus infinity where nothing is."""
    ops, largest = keras.ops, []
    for x in (found.products, found.logits):
        if found.allowed is not None:
            x = ops.where(found.allowed, x, ops.cast(-np.inf, x.dtype))
        largest.append(ops.max(x, axis=(0, 2, 3)))
    return ops.stack(largest)


def _numbers(weights: np.ndarray, rows: np.ndarray) -> tuple[float, ...]:
    """Entropy, distance, share of the first key, share of the own position, and twice
    NaN for what weights do not tell.

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
        return (np.nan,) * 6
    means = (x[is_live].mean() for x in (entropy, distance, first, diagonal))
    return *means, np.nan, np.nan


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
