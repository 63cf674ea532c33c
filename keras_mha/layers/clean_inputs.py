"""The inputs of a call without numbers that its masks hide; see `ops/padding.py`.

Before the projections, since the gradients of their kernels are sums over all tokens:
0 times NaN would reach them too.
"""

from typing import NamedTuple

from keras import ops

from keras_mha._keras import Tensor
from keras_mha.ops import padding


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
