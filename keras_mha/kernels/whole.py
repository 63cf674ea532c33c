"""The problem that tiles solve, with all scores at once, for derivatives beyond theirs.

It takes and returns what `blockwise.forward` does, by operations that have every
derivative.
"""

from dataclasses import replace
from typing import Any

from keras import ops

from keras_mha._keras import Tensor, at_least_float32, dtype_name
from keras_mha.kernels.problem import Problem
from keras_mha.kernels.tile_scores import TileScores
from keras_mha.kernels.walk import Place


def whole(problem: Problem, tensors: dict[str, Any]) -> Tensor:
    """Attends with all scores at once, by operations that have every derivative.

    The same weights are dropped as in tiles.

    Args:
        problem: As of `forward`.
        tensors: As of `forward`.

    Returns:
        The output, shape `(B, K, V, G, T)`.
    """
    # Nothing is cut here: in XLA's programs of TensorFlow, the gradient of a piece that
    # was cut out has no gradient.
    scores = TileScores(replace(problem, groups_at_once=None, tile=None), tensors)
    walk, place = (
        scores.walk,
        Place(chunk=0, batch=0, group=0, i=0, row=0, j=0, column=0),
    )
    query, key, value = (
        at_least_float32(tensors[name]) for name in ("query", "key", "value")
    )
    logits = walk.backend.scores(walk.as_rows(query * problem.scale), key)
    if problem.logit_soft_cap is not None:
        logits = problem.logit_soft_cap * ops.tanh(logits / problem.logit_soft_cap)
    logits, seen = scores.whole(logits, place)
    if "sink" in tensors:
        sink = ops.cast(tensors["sink"], walk.dtype)[None, :, :, None, None]
        sink = ops.broadcast_to(sink, ops.shape(logits[..., :1]))
        logits = ops.concatenate([logits, sink], axis=-1)
    # As a tuple where there is one key: of an int, Keras would warn.
    weights = ops.softmax(logits, axis=(4,) if logits.shape[4] == 1 else -1)
    weights = weights[..., : ops.shape(seen)[4]] / (1.0 - problem.dropout)
    weights = ops.where(seen, weights, ops.cast(0.0, walk.dtype))
    output = walk.backend.to_rows(scores.dropped(place)(weights), value)
    output = walk.from_rows(output)
    return ops.cast(output, dtype_name(tensors["query"]))
