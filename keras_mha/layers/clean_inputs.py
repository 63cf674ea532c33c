"""The inputs of a call without numbers that its masks hide; see `ops/padding.py`.

Before the projections, since the gradients of their kernels are sums over all tokens:
0 times NaN would reach them too.
"""

from typing import NamedTuple

from keras import ops

from keras_mha._keras import Tensor
from keras_mha.layers.arguments import Call
from keras_mha.masks import Mask, Segments
from keras_mha.ops import padding

Good = tuple[Tensor, Tensor | None]
"""Which queries, and which keys (`None` for all), are finite or seen by nobody."""


def clean(call: Call, keep_finite: bool) -> Good | None:
    """Sets what a call's masks hide to zero, and what may spoil what sees it.

    Args:
        call: The call, whose query, value and key are replaced.
        keep_finite: Whether hidden tokens become zero only if they hold NaN or
            infinity.

    Returns:
        What `spoilt` needs where a query may see a token that was not finite.
    """
    if _hides_nothing(call):
        return None
    inputs = Inputs(call.query, call.value, call.key)
    visible = _visible_keys(call)
    cleaned = inputs.zero_unless(call.query_mask, visible, keep_finite)
    good = None if call.cache is not None else _good(call, inputs, cleaned, visible)
    if good is not None:
        cleaned = cleaned.zero_unless(*good, keep_finite=False)
    call.query, call.value, call.key = cleaned
    return good


def _hides_nothing(call):
    """Whether nothing is given by which a token could be padding."""
    has_objects = isinstance(call.attention_mask, Mask)
    hides = has_objects or call.segment_ids is not None or call.cache is not None
    return not hides and call.masks == (None, None, None)


def _visible_keys(call):
    masks = list(call.masks[1:])
    if call.cache is not None:
        masks = call.masks  # a new token is both
    elif isinstance(call.attention_mask, Mask):
        masks.append(_not_padding(call))
    rank = len(call.value.shape) - 1
    return padding.all_of(*(padding.with_rank(rank, x) for x in masks))


def _not_padding(call):
    """Returns which tokens of the value a mask object's padding does not hide."""
    valid, axes = padding.visible_keys(call.attention_mask), call.axes
    if valid is None or axes.is_plain:
        return valid
    folded = ops.shape(axes.fold_positions(call.value[..., 0]))
    return axes.unfold_positions(ops.broadcast_to(valid, folded), like=call.value)


def _good(call, inputs, cleaned, visible):
    if call.segment_ids is not None or padding.parts(call.attention_mask, Segments):
        good = cleaned.finite_tokens()
    elif (
        visible is not None and call.query_mask is None and inputs.value is inputs.query
    ):
        # What is hidden as a key asks as a query; what is seen stays as it is.
        finite = padding.finite_tokens(cleaned.query, 1)
        good = ops.logical_or(finite, ops.cast(visible, "bool")), None
    else:
        return None
    return None if padding.are_all(*(x for x in good if x is not None)) else good


def spoilt(
    call: Call, good: Good | None, mask: Mask | None, output: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Puts NaN where a query is not good, or may attend to a key that is not.

    Args:
        call: The call.
        good: What `clean` returned.
        mask: Who may attend to whom.
        output: Of the layer.
        scores: Of the heads, `(B', N, T, S)`, or `None`.
    """
    if good is None:
        return output, scores
    axes, (query, key) = call.axes, good
    segments = [] if key is None else padding.parts(mask, Segments)
    key = None if key is None else axes.fold_positions(key)
    queries = padding.spoilt_queries(axes.fold_positions(query), key, segments)
    if scores is not None:
        scores = padding.nan_where(queries[:, None, :], scores)
    queries = axes.unfold_positions(queries, like=call.query)
    return padding.nan_where(queries, output), scores


class Inputs(NamedTuple):
    """What a call is made of.

    Args:
        query: Shape `(B, *positions, D_q)`.
        value: Shape `(B, *positions, D_v)`.
        key: Shape `(B, *positions, D_k)`.
    """

    query: Tensor
    value: Tensor
    key: Tensor

    def zero_unless(
        self, query: Tensor | None, keys: Tensor | None, keep_finite: bool
    ) -> "Inputs":
        """Returns the inputs with zeros for the tokens that are not visible.

        Args:
            query: Which tokens of the query are visible; `None` for all.
            keys: Which tokens of value and key are.
            keep_finite: Whether only tokens that hold NaN or infinity become zero.
        """

        def clean(visible, x):
            if visible is not None and keep_finite:
                finite = padding.finite_tokens(x, 1)
                visible = padding.with_rank(len(finite.shape), visible)
                visible = ops.logical_or(ops.cast(visible, "bool"), finite)
            return padding.zero_unless(visible, x)

        clean_query = clean(query, self.query)
        is_self_attention = self.value is self.query and keys is query
        value = clean_query if is_self_attention else clean(keys, self.value)
        key = value if self.key is self.value else clean(keys, self.key)
        return Inputs(clean_query, value, key)

    def finite_tokens(self) -> tuple[Tensor, Tensor]:
        """Returns which tokens of the query, and of key and value, are finite."""
        query = padding.finite_tokens(self.query, 1)
        value = padding.finite_tokens(self.value, 1)
        if self.value is self.query:
            value = query
        if self.key is self.value:
            return query, value
        return query, ops.logical_and(value, padding.finite_tokens(self.key, 1))
