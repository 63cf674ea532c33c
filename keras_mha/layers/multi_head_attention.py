"""Multi-head attention as a Keras layer."""

import math
import string
from typing import Any

import keras
from keras import ops

from keras_mha import _checks
from keras_mha._keras import Shape, Tensor, get_keras_mask, set_keras_mask
from keras_mha.layers import input_checks
from keras_mha.layers.axes import AttentionAxes, checked_attention_axes
from keras_mha.layers.normalization import QK_NORMS, normalize_heads
from keras_mha.masks import (
    Causal,
    Dense,
    Mask,
    Padding,
    Segments,
    SlidingWindow,
    intersect,
)
from keras_mha.ops.dot_product_attention import dot_product_attention

ATTENTION_SINKS = (None, "zero", "learned")

# Left out of a config while they are at their defaults: Keras's own layer, which does
# not know them, can then be made from the config too.
_BEYOND_KERAS = {
    "flash_attention": None,
    "num_key_value_heads": None,
    "qk_norm": None,
    "qk_norm_epsilon": 1e-6,
    "attention_sink": None,
    "logit_soft_cap": None,
    "scale": None,
}


@keras.saving.register_keras_serializable(package="keras_mha")
class MultiHeadAttention(keras.layers.Layer):
    """Multi-head attention, in place of `keras.layers.MultiHeadAttention`.

    Each head projects query, key and value to vectors of its own, lets every query
    attend to the keys, and the heads' outputs are projected together:

        head_n = softmax(query W_n^Q (key W_n^K)^T / sqrt(key_dim)) (value W_n^V)
        output = concatenate(head_1 ... head_N) W^O

    It takes the same arguments, calls, weights and files as Keras's layer and gives
    the same numbers, except where those are wrong: a query that may attend to nothing
    gets zeros (so its output is the output projection's bias) and zero gradients.

    Args:
        num_heads: Number of query heads, N.
        key_dim: Width of each head of query and key, H.
        value_dim: Width of each head of value, V. Defaults to `key_dim`.
        dropout: Share of the attention weights to drop in training, from 0 to 1.
        use_bias: Whether the projections add a bias.
        output_shape: Features of the output: an int, or a tuple for several axes.
            Defaults to the features of the query.
        attention_axes: Axes to attend over, of inputs with several position axes
            (images, video); the others join the batch. Defaults to all position axes.
            A causal mask or a window counts along them in row-major order.
        sliding_window: Each query sees the keys less than this many positions away,
            on both sides. Defaults to `None` (all).
        flash_attention: `None` chooses the implementation by itself, `True` demands
            one that does not hold all scores in memory and raises where there is none,
            `False` takes the reference formula.
        kernel_initializer: Initializer of the projections' kernels.
        bias_initializer: Initializer of the projections' biases.
        kernel_regularizer: Regularizer of the projections' kernels.
        bias_regularizer: Regularizer of the projections' biases.
        activity_regularizer: Regularizer of the projections' outputs.
        kernel_constraint: Constraint on the projections' kernels.
        bias_constraint: Constraint on the projections' biases.
        use_gate: Whether the heads' outputs are multiplied by
            `sigmoid(gate projection of the query)` before the output projection.
        seed: Integer seed of dropout.
        num_key_value_heads: Number of key and value heads, K; divides `num_heads`.
            Query head n reads key and value head n // (N / K): grouped-query
            attention, with 1 multi-query attention. Defaults to `num_heads`.
        qk_norm: Normalises each query and key head over its width before the scores:
            `"rms"` or `"layer"` (each with a learned scale), or `"l2"` (unit length:
            the scores are cosine similarities). Defaults to `None`.
        qk_norm_epsilon: Keeps `qk_norm` from dividing by zero.
        attention_sink: `"zero"` adds 1 to the softmax's denominator (softmax1);
            `"learned"` adds the exponential of a learned logit per head. A row's
            weights then sum to less than 1. Defaults to `None`.
        logit_soft_cap: Scores become `cap * tanh(scores / cap)`. Defaults to `None`.
        scale: Factor of the dot products. Defaults to `1 / sqrt(key_dim)`, and to
            `sqrt(key_dim)` with `qk_norm="l2"`.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Call arguments:
        query: Floating-point tensor of shape `(B, T, D)`, or `(B, *positions, D)`.
        value: Tensor of shape `(B, S, D_v)`. Defaults to `query` (self-attention).
        key: Tensor of shape `(B, S, D_k)`. Defaults to `value`.
        query_mask: Booleans of shape `(B, T)`, `True` for real tokens. Defaults to the
            Keras mask that `query` carries. It goes on to the output.
        value_mask: Booleans of shape `(B, S)`. Defaults to the Keras mask that `value`
            carries; in self-attention without `value`, to `query_mask`.
        key_mask: Booleans of shape `(B, S)`. Defaults to the Keras mask that `key`
            carries. All masks given count together.
        attention_mask: Booleans (`True` = may attend) of shape `(T, S)`, `(B, T, S)`
            or `(B, N, T, S)`, or a `keras_mha.masks.Mask`. Whole numbers count as
            booleans.
        return_attention_scores: Whether to return the attention weights too. Asking
            for them does not change the output.
        training: Whether dropout is on.
        use_causal_mask: Whether query i sees only the keys j <= i.
        attention_bias: Floating-point tensor that broadcasts to `(B, N, T, S)` as in
            NumPy (three axes are `(N, T, S)`) and is added to the scaled scores.
        segment_ids: Whole numbers of shape `(B, T)`, or a pair of shapes `(B, T)` and
            `(B, S)`: tokens attend only within their own segment (packed sequences).

    Returns:
        The output, shape `(B, T, E)` with `E` from `output_shape`, in the layer's
        compute dtype; with `return_attention_scores=True` the pair of it and the
        attention weights after softmax and before dropout, shape `(B, N, T, S)`.

    Raises:
        TypeError: If an argument is of a wrong type or dtype.
        ValueError: If a number is out of its range, shapes do not fit together, or
            `flash_attention=True` cannot be had.

    Example:

    >>> x = keras.random.normal((2, 10, 512))
    >>> layer = keras_mha.MultiHeadAttention(num_heads=8, key_dim=64)
    >>> layer(x, use_causal_mask=True).shape
    (2, 10, 512)
    >>> memory = keras.random.normal((2, 6, 256))
    >>> layer = keras_mha.MultiHeadAttention(num_heads=8, key_dim=64)
    >>> output, scores = layer(x, memory, return_attention_scores=True)
    >>> scores.shape
    (2, 8, 10, 6)

    References:
        Vaswani et al., 2017, Attention is all you need:
            https://arxiv.org/abs/1706.03762
        Ainslie et al., 2023, GQA (num_key_value_heads):
            https://arxiv.org/abs/2305.13245
        Qiu et al., 2025, Gated attention (use_gate): https://arxiv.org/abs/2505.06708
        Henry et al., 2020, Query-key normalization (qk_norm):
            https://arxiv.org/abs/2010.04245
        Xiao et al., 2023, Attention sinks (attention_sink):
            https://arxiv.org/abs/2309.17453
        Gemma Team, 2024, Gemma 2 (logit_soft_cap): https://arxiv.org/abs/2408.00118
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: int | tuple[int, ...] | None = None,
        attention_axes: int | tuple[int, ...] | None = None,
        sliding_window: int | None = None,
        flash_attention: bool | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        use_gate: bool = False,
        seed: int | None = None,
        *,
        num_key_value_heads: int | None = None,
        qk_norm: str | None = None,
        qk_norm_epsilon: float = 1e-6,
        attention_sink: str | None = None,
        logit_soft_cap: float | None = None,
        scale: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        positive = _checks.positive_integer
        self._num_heads = positive("num_heads", num_heads)
        self._key_dim = positive("key_dim", key_dim)
        self._value_dim = (
            self._key_dim if value_dim is None else positive("value_dim", value_dim)
        )
        self._num_key_value_heads = _checked_key_value_heads(
            num_key_value_heads, self._num_heads
        )
        self._dropout = _checks.dropout_rate("dropout", dropout)
        self._use_bias = _checks.boolean("use_bias", use_bias)
        self._use_gate = _checks.boolean("use_gate", use_gate)
        self._output_shape = _checked_output_shape(output_shape)
        self._attention_axes = checked_attention_axes(attention_axes)
        self._sliding_window = _optional(positive, "sliding_window", sliding_window)
        self._flash_attention = _optional(
            _checks.boolean, "flash_attention", flash_attention
        )
        self._qk_norm = _checks.choice("qk_norm", qk_norm, QK_NORMS)
        self._qk_norm_epsilon = _checks.positive_number(
            "qk_norm_epsilon", qk_norm_epsilon
        )
        self._attention_sink = _checks.choice(
            "attention_sink", attention_sink, ATTENTION_SINKS
        )
        self._logit_soft_cap = _optional(
            _checks.positive_number, "logit_soft_cap", logit_soft_cap
        )
        self._scale = _optional(_checks.number, "scale", scale)
        self.seed = _optional(_checks.integer, "seed", seed)

        self._kernel_initializer = keras.initializers.get(kernel_initializer)
        self._bias_initializer = keras.initializers.get(bias_initializer)
        self._kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self._bias_regularizer = keras.regularizers.get(bias_regularizer)
        self._activity_regularizer = keras.regularizers.get(activity_regularizer)
        self._kernel_constraint = keras.constraints.get(kernel_constraint)
        self._bias_constraint = keras.constraints.get(bias_constraint)

    # ------------------------------------------------------------------ properties

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return self._num_heads

    @property
    def num_key_value_heads(self) -> int:
        """Number of key and value heads."""
        return self._num_key_value_heads or self._num_heads

    @property
    def key_dim(self) -> int:
        """Width of each head of query and key."""
        return self._key_dim

    @property
    def value_dim(self) -> int:
        """Width of each head of value."""
        return self._value_dim

    @property
    def dropout(self) -> float:
        """Share of the attention weights dropped in training."""
        return self._dropout

    @property
    def use_bias(self) -> bool:
        """Whether the projections add a bias."""
        return self._use_bias

    @property
    def attention_axes(self) -> tuple[int, ...] | None:
        """The axes attended over, counted from the front once the layer is built."""
        return self._axes.attended if self.built else self._attention_axes

    @property
    def scale(self) -> float:
        """Factor of the dot products."""
        if self._scale is not None:
            return self._scale
        root = math.sqrt(self._key_dim)
        return root if self._qk_norm == "l2" else 1 / root

    # Converters written for Keras's layer read the projections under these names.
    # Saving goes by public names first, so that these do not show in files.

    @property
    def _query_dense(self) -> keras.layers.EinsumDense:
        return self.query_dense

    @property
    def _key_dense(self) -> keras.layers.EinsumDense:
        return self.key_dense

    @property
    def _value_dense(self) -> keras.layers.EinsumDense:
        return self.value_dense

    @property
    def _output_dense(self) -> keras.layers.EinsumDense:
        return self.output_dense

    # ------------------------------------------------------------------ weights

    def build(
        self,
        query_shape: Shape,
        value_shape: Shape | None = None,
        key_shape: Shape | None = None,
    ) -> None:
        """Makes the projections.

        Args:
            query_shape: Shape of the query, `(B, T, D)`.
            value_shape: Shape of the value. Defaults to `query_shape`.
            key_shape: Shape of the key. Defaults to `value_shape`.
        """
        query_shape, value_shape, key_shape = _filled(
            query_shape, value_shape, key_shape
        )
        input_checks.check_build_shapes(query_shape, value_shape, key_shape)
        self._axes = AttentionAxes(len(query_shape), self._attention_axes)
        input_checks.check_input_shapes(self._axes, query_shape, value_shape, key_shape)
        self._widths = {
            "query": query_shape[-1],
            "value": value_shape[-1],
            "key": key_shape[-1],
        }
        heads, groups = self._num_heads, self.num_key_value_heads

        # In the order of Keras's layer, which files of LoRA weights and equal initial
        # weights from equal seeds both count on.
        self.query_dense = self._projection("query", query_shape, heads, self._key_dim)
        self.key_dense = self._projection("key", key_shape, groups, self._key_dim)
        if self._use_gate:
            self._gate_dense = self._projection(
                "gate", query_shape, heads, self._value_dim, activation="sigmoid"
            )
        self.value_dense = self._projection(
            "value", value_shape, groups, self._value_dim
        )
        self._dropout_layer = keras.layers.Dropout(
            self._dropout, dtype=self.dtype_policy, seed=self.seed
        )
        self.output_dense = self._output_projection(query_shape)
        self._add_own_weights()

    def _projection(
        self, name: str, shape: Shape, heads: int, width: int, activation=None
    ) -> keras.layers.EinsumDense:
        """Makes `(B, *positions, D) -> (B, *positions, heads, width)`."""
        positions = string.ascii_lowercase[: len(shape) - 1]
        dense = keras.layers.EinsumDense(
            f"{positions}X,XYZ->{positions}YZ",
            output_shape=(None,) * (len(shape) - 2) + (heads, width),
            bias_axes="YZ" if self._use_bias else None,
            activation=activation,
            name=name,
            **self._sublayer_arguments(name),
        )
        # It need not warn that it loses the input's mask; this layer keeps it.
        dense.supports_masking = True
        dense.build(shape)
        return dense

    def _output_projection(self, query_shape: Shape) -> keras.layers.EinsumDense:
        """Makes `(B, *positions, N, V) -> (B, *positions, *output_shape)`."""
        positions = string.ascii_lowercase[: len(query_shape) - 1]
        output_shape = self._output_shape or (query_shape[-1],)
        outputs = string.ascii_uppercase[: len(output_shape)]
        dense = keras.layers.EinsumDense(
            f"{positions}YZ,YZ{outputs}->{positions}{outputs}",
            output_shape=(None,) * (len(query_shape) - 2) + output_shape,
            bias_axes=outputs if self._use_bias else None,
            name="attention_output",
            **self._sublayer_arguments("attention_output"),
        )
        dense.build((*query_shape[:-1], self._num_heads, self._value_dim))
        return dense

    def _sublayer_arguments(self, name: str) -> dict[str, Any]:
        policy = self.dtype_policy
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            # Its own part of the map, which quantization can then change.
            policy = policy[f"{self.path}/{name}"]
        return {
            # A copy each: the same initializer twice would give the same weights.
            "kernel_initializer": _copy_of(self._kernel_initializer),
            "bias_initializer": _copy_of(self._bias_initializer),
            "kernel_regularizer": self._kernel_regularizer,
            "bias_regularizer": self._bias_regularizer,
            "activity_regularizer": self._activity_regularizer,
            "kernel_constraint": self._kernel_constraint,
            "bias_constraint": self._bias_constraint,
            "dtype": policy,
        }

    def _add_own_weights(self) -> None:
        self.query_norm_scale = self.key_norm_scale = self.sink = None
        if self._qk_norm in ("rms", "layer"):
            self.query_norm_scale = self._add_float32_weight(
                "query_norm_scale", self._key_dim, "ones"
            )
            self.key_norm_scale = self._add_float32_weight(
                "key_norm_scale", self._key_dim, "ones"
            )
        if self._attention_sink == "learned":
            self.sink = self._add_float32_weight("sink", self._num_heads, "zeros")

    def _add_float32_weight(self, name: str, size: int, initializer: str):
        """Adds a weight that keeps its precision under a mixed policy."""
        return self.add_weight(
            name=name, shape=(size,), initializer=initializer, autocast=False
        )

    # ------------------------------------------------------------------ call

    def call(
        self,
        query: Tensor,
        value: Tensor | None = None,
        key: Tensor | None = None,
        query_mask: Tensor | None = None,
        value_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        attention_mask: Mask | Tensor | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        *,
        attention_bias: Tensor | None = None,
        segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        query_mask, value_mask, key_mask, attention_mask, segment_ids = _from_lists(
            query_mask, value_mask, key_mask, attention_mask, segment_ids
        )
        if query_mask is None:
            # Keras fills masks in by itself only when there are several inputs.
            query_mask = get_keras_mask(query)
        if value is None:
            value = query
            value_mask = query_mask if value_mask is None else value_mask
        if key is None:
            key = value
        self._check_call(
            query,
            value,
            key,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            return_attention_scores=return_attention_scores,
            use_causal_mask=use_causal_mask,
            attention_bias=attention_bias,
            segment_ids=segment_ids,
        )
        mask = intersect(
            self._attention_mask(attention_mask, query, value),
            self._query_mask(query_mask, query),
            self._padding(value_mask, value),
            self._padding(key_mask, value),
            self._segments(segment_ids, query, value),
            SlidingWindow(self._sliding_window) if self._sliding_window else None,
            Causal() if use_causal_mask else None,
        )
        heads, scores = self._attend(
            query,
            value,
            key,
            mask,
            self._attention_bias(attention_bias, query, value),
            self._dropout if training else 0.0,
            return_attention_scores,
        )
        if self._use_gate:
            heads = heads * self._gate_dense(query)
        output = self.output_dense(heads)
        if query_mask is not None:
            set_keras_mask(output, query_mask)
        return (output, scores) if return_attention_scores else output

    def _attend(self, query, value, key, mask, bias, dropout, return_scores):
        """Projects the inputs and lets every head attend."""
        projected_query = self._normalized(
            self.query_dense(query), self.query_norm_scale
        )
        projected_key = self._normalized(self.key_dense(key), self.key_norm_scale)
        result = dot_product_attention(
            self._axes.fold(projected_query),
            self._axes.fold(projected_key),
            self._axes.fold(self.value_dense(value)),
            mask=mask,
            bias=bias,
            scale=self.scale,
            logit_soft_cap=self._logit_soft_cap,
            sink=self._sink_logits(),
            dropout=dropout,
            seed=self._dropout_layer.seed_generator if dropout else None,
            return_scores=return_scores,
            implementation=self._implementation(),
        )
        heads, scores = result if return_scores else (result, None)
        heads = self._axes.unfold(heads, like=query)
        if return_scores:
            scores = ops.cast(scores, self.compute_dtype)
            scores = self._axes.unfold_scores(scores, query, value)
        return heads, scores

    def _normalized(self, heads: Tensor, scale: Tensor | None) -> Tensor:
        if self._qk_norm is None:
            return heads
        return normalize_heads(heads, self._qk_norm, self._qk_norm_epsilon, scale)

    def _sink_logits(self) -> Tensor | float | None:
        return 0.0 if self._attention_sink == "zero" else self.sink

    def _implementation(self) -> str:
        flash_attention = self._flash_attention
        if flash_attention is None:
            flash_attention = keras.config.is_flash_attention_enabled()
            # Keras's switch can turn fused kernels off; on is what happens anyway.
            return "reference" if flash_attention is False else "auto"
        return "flash" if flash_attention else "reference"

    # ------------------------------------------------------------------ masks

    def _attention_mask(self, mask, query, value) -> Mask | None:
        if mask is None or isinstance(mask, Mask):
            return mask
        if not self._axes.is_plain:
            mask = ops.reshape(mask, self._axes.expand_mask(tuple(ops.shape(mask))))
            mask = self._axes.fold_scores(mask, query, value)
        return Dense(mask)

    def _attention_bias(self, bias, query, value) -> Tensor | None:
        if bias is None or self._axes.is_plain:
            return bias
        return self._axes.fold_scores(bias, query, value)

    def _query_mask(self, mask, query) -> Mask | None:
        if mask is None:
            return None
        valid = self._axes.fold_positions(_spread(mask, query))
        return Dense(ops.cast(valid, "bool")[:, None, :, None])

    def _padding(self, mask, value) -> Mask | None:
        if mask is None:
            return None
        return Padding(self._axes.fold_positions(_spread(mask, value)))

    def _segments(self, segment_ids, query, value) -> Mask | None:
        if segment_ids is None:
            return None
        ids = input_checks.checked_segment_ids(segment_ids, query.shape, value.shape)
        return Segments(*(self._axes.fold_positions(each) for each in ids))

    def _check_call(
        self,
        query,
        value,
        key,
        *,
        query_mask,
        value_mask,
        key_mask,
        attention_mask,
        return_attention_scores,
        use_causal_mask,
        attention_bias,
        segment_ids,
    ) -> None:
        _checks.boolean("return_attention_scores", return_attention_scores)
        _checks.boolean("use_causal_mask", use_causal_mask)
        shapes = {"query": query.shape, "value": value.shape, "key": key.shape}
        shapes = {name: tuple(shape) for name, shape in shapes.items()}
        axes = self._axes_of(query)
        if self.built:
            input_checks.check_ranks(axes.rank, shapes)
            input_checks.check_feature_widths(self._widths, shapes)
        else:  # a symbolic call may come before there are weights
            input_checks.check_build_shapes(*shapes.values())
        input_checks.check_input_shapes(axes, *shapes.values())
        for name, mask, owner in (
            ("query_mask", query_mask, "query"),
            ("value_mask", value_mask, "value"),
            ("key_mask", key_mask, "key"),
        ):
            if mask is not None:
                input_checks.check_positions_mask(name, mask, owner, shapes[owner])
        scores_shape = axes.scores_shape(
            shapes["query"], shapes["value"], self._num_heads
        )
        if attention_mask is not None:
            input_checks.check_attention_mask(attention_mask, axes, scores_shape)
        if attention_bias is not None:
            input_checks.check_attention_bias(attention_bias, scores_shape)
        if segment_ids is not None:
            input_checks.checked_segment_ids(
                segment_ids, shapes["query"], shapes["value"]
            )
        if self._flash_attention and return_attention_scores:
            raise ValueError(
                "`return_attention_scores=True` needs all scores in memory, which "
                "`flash_attention=True` forbids. Use `flash_attention=None`."
            )

    # ------------------------------------------------------------------ symbolic

    def compute_output_shape(
        self,
        query_shape: Shape,
        value_shape: Shape | None = None,
        key_shape: Shape | None = None,
    ) -> Shape:
        """Returns the output's shape for inputs of these shapes."""
        shapes = _filled(query_shape, value_shape, key_shape)
        input_checks.check_build_shapes(*shapes)
        axes = AttentionAxes(len(shapes[0]), self._attention_axes)
        input_checks.check_input_shapes(axes, *shapes)
        return (*shapes[0][:-1], *(self._output_shape or shapes[0][-1:]))

    def compute_output_spec(
        self,
        query: Tensor,
        value: Tensor | None = None,
        key: Tensor | None = None,
        query_mask: Tensor | None = None,
        value_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        attention_mask: Mask | Tensor | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        *,
        attention_bias: Tensor | None = None,
        segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> keras.KerasTensor | tuple[keras.KerasTensor, keras.KerasTensor]:
        """Returns what `call` would return, as placeholders."""
        value = query if value is None else value
        key = value if key is None else key
        query_mask, value_mask, key_mask, attention_mask, segment_ids = _from_lists(
            query_mask, value_mask, key_mask, attention_mask, segment_ids
        )
        self._check_call(
            query,
            value,
            key,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            return_attention_scores=return_attention_scores,
            use_causal_mask=use_causal_mask,
            attention_bias=attention_bias,
            segment_ids=segment_ids,
        )
        output = keras.KerasTensor(
            self.compute_output_shape(query.shape, value.shape, key.shape),
            dtype=(self.output_dense if self.built else self).compute_dtype,
        )
        if query_mask is not None:
            set_keras_mask(output, query_mask)
        if not return_attention_scores:
            return output
        axes = self._axes_of(query)
        scores = axes.scores_shape(query.shape, value.shape, self._num_heads)
        return output, keras.KerasTensor(scores, dtype=self.compute_dtype)

    def _axes_of(self, query: Tensor) -> AttentionAxes:
        if self.built:
            return self._axes
        return AttentionAxes(len(query.shape), self._attention_axes)

    # ------------------------------------------------------------------ config

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for `from_config`."""
        initializers, regularizers = keras.initializers, keras.regularizers
        constraints = keras.constraints
        config = {
            "num_heads": self._num_heads,
            "key_dim": self._key_dim,
            "value_dim": self._value_dim,
            "dropout": self._dropout,
            "use_bias": self._use_bias,
            "use_gate": self._use_gate,
            "output_shape": self._output_shape,
            "attention_axes": self._attention_axes,
            "sliding_window": self._sliding_window,
            "kernel_initializer": initializers.serialize(self._kernel_initializer),
            "bias_initializer": initializers.serialize(self._bias_initializer),
            "kernel_regularizer": regularizers.serialize(self._kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self._bias_regularizer),
            "activity_regularizer": regularizers.serialize(self._activity_regularizer),
            "kernel_constraint": constraints.serialize(self._kernel_constraint),
            "bias_constraint": constraints.serialize(self._bias_constraint),
            "seed": self.seed,
        }
        beyond = {
            name: getattr(self, f"_{name}")
            for name, default in _BEYOND_KERAS.items()
            if getattr(self, f"_{name}") != default
        }
        return {**super().get_config(), **config, **beyond, **self._dtype_config()}

    def _dtype_config(self) -> dict[str, Any]:
        """The dtype policy with what `quantize()` has made of the projections."""
        projections = [
            layer
            for layer in self._flatten_layers(include_self=False)
            if isinstance(layer, keras.layers.EinsumDense)
        ]
        if all(dense.quantization_mode is None for dense in projections):
            return {}
        policy = self.dtype_policy
        policies = keras.dtype_policies.DTypePolicyMap(
            default_policy=getattr(policy, "default_policy", policy)
        )
        for dense in projections:
            # By a pattern: the layer's path may be another one when it is loaded.
            policies[f".*/{dense.name}"] = dense.dtype_policy
        return {"dtype": keras.dtype_policies.serialize(policies)}


def _optional(check, name: str, value: Any) -> Any:
    return None if value is None else check(name, value)


def _checked_key_value_heads(value: Any, num_heads: int) -> int | None:
    if value is None:
        return None
    value = _checks.positive_integer("num_key_value_heads", value)
    if num_heads % value:
        raise ValueError(
            "`num_key_value_heads` must divide `num_heads`. Received: "
            f"num_key_value_heads={value}, num_heads={num_heads}"
        )
    return value


def _checked_output_shape(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        value = (value,)
    sizes = tuple(_checks.positive_integer("output_shape", size) for size in value)
    return sizes or None  # Keras's layer takes an empty shape for none given


def _filled(query: Shape, value: Shape | None, key: Shape | None) -> tuple[Shape, ...]:
    """Fills in the shapes that are left out, as the call fills in its tensors."""
    value = query if value is None else value
    key = value if key is None else key
    return tuple(query), tuple(value), tuple(key)


def _from_lists(*arguments: Any) -> list[Any]:
    """Makes tensors of nested Python lists, and leaves everything else alone."""
    return [
        ops.convert_to_tensor(x)
        if isinstance(x, list) and x and isinstance(x[0], list)
        else x
        for x in arguments
    ]


def _copy_of(initializer):
    return initializer.__class__.from_config(initializer.get_config())


def _spread(mask: Tensor, x: Tensor) -> Tensor:
    """Gives a mask of the leading axes of `x` all its axes but the last."""
    missing = len(x.shape) - 1 - len(mask.shape)
    if missing == 0:
        return mask
    mask = ops.reshape(mask, (*ops.shape(mask), *(1,) * missing))
    return ops.broadcast_to(mask, ops.shape(x)[:-1])
