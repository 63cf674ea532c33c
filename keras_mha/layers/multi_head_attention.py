"""Multi-head attention as a Keras layer."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_mha import _checks
from keras_mha._keras import (
    Shape,
    Tensor,
    convert_no_inputs,
    kernel_variable,
    parts_not_rematerialized,
    set_keras_mask,
    told_as_it_is,
)
from keras_mha.layers import cache as kv_cache
from keras_mha.layers import input_checks, memory_key_values, options, recording
from keras_mha.layers.arguments import Call, Remembered, filled
from keras_mha.layers.axes import AttentionAxes, checked_attention_axes
from keras_mha.layers.building import building
from keras_mha.layers.cache import Cache
from keras_mha.layers.call_masks import bias_of, mask_of
from keras_mha.layers.clean_inputs import clean, spoilt
from keras_mha.layers.conversion import converted
from keras_mha.layers.keras_hooks import check_no_hooks
from keras_mha.layers.new_cache import new_cache
from keras_mha.layers.normalization import QK_NORMS
from keras_mha.layers.operands import Operands, operands_of
from keras_mha.layers.own_weights import add_own_weights
from keras_mha.layers.own_weights import arguments_of as own_arguments
from keras_mha.layers.position_bias import PositionBias
from keras_mha.layers.projections import add_projections, projected, quantized_dtype
from keras_mha.layers.rotary_embedding import RotaryEmbedding
from keras_mha.layers.sharing import copy_in_place
from keras_mha.layers.training import as_trained, rematerializable
from keras_mha.masks import Mask, intersect
from keras_mha.ops.dot_product_attention import attend_without_padding

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
    "num_memory_key_values": None,
    "talking_heads": None,
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
            Where gradient checkpointing (`torch.utils.checkpoint`, `tf.recompute_grad`,
            `keras.RematScope`) runs the layer again, the same ones are dropped.
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
        seed: Integer seed of dropout. The same one drops the same weights on every
            backend, but for PyTorch on a GPU, whose kernel drops its own.
        num_key_value_heads: Number of key and value heads, K; divides `num_heads`.
            Query head n reads key and value head n // (N / K): grouped-query
            attention, with 1 multi-query attention. Defaults to `num_heads`.
        position: Says where tokens stand: a `keras_mha.RotaryEmbedding`, a
            `keras_mha.ALiBi` or a `keras_mha.RelativePositionBias`. Attention over
            several axes takes one that has as many, in the order of `attention_axes`.
            Several layers may be given the same one; copies of them share one too.
            Defaults to `None`.
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
        num_memory_key_values: Number of keys and values that each key and value head
            learns beside the sequence's (persistent memory). Every query sees them,
            through any mask, and no position or bias is added to them; a query that may
            attend to nothing else attends to these. `kernel_initializer` makes them.
            Their weights are left out of the scores, whose rows then sum to less than
            1. Defaults to `None`.
        talking_heads: Where heads mix, each becoming a learned mixture of all: `"pre"`
            their scores before softmax, `"post"` their weights after it, or `"both"`.
            The matrices `(N, N)` start as identities; what head m gets of head n is
            element (n, m). All heads' scores are needed at once, some rows at a time:
            `flash_attention=True` is refused. With masks of each head's own, `"post"`
            may give a head weight on keys that its own mask hides. Defaults to `None`.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Call arguments:
        query: Tensor of shape `(B, T, D)`, or `(B, *positions, D)`. Floating-point
            numbers, integers and booleans are cast to the layer's compute dtype, in
            `value` and `key` too; complex numbers are refused.
        value: Tensor of shape `(B, S, D_v)`. Defaults to `query` (self-attention).
        key: Tensor of shape `(B, S, D_k)`. Defaults to `value`.
        query_mask: Booleans of shape `(B, T)`, `True` for real tokens. Defaults to the
            Keras mask that `query` carries. It goes on to the output.
        value_mask: Booleans of shape `(B, S)`. Defaults to the Keras mask that `value`
            carries; in self-attention without `value`, to `query_mask`.
        key_mask: Booleans of shape `(B, S)`. Defaults to the Keras mask that `key`
            carries. All masks given count together. Tokens that these three masks or
            a `Padding` hide, or that are of other segments, may hold anything, NaN too.
        attention_mask: Booleans (`True` = may attend) of shape `(T, S)`, `(B, T, S)`
            or `(B, N, T, S)`, or a `keras_mha.masks.Mask`. Whole numbers count as
            booleans, and so do 0.0 and 1.0; numbers below 0 are `attention_bias`.
        return_attention_scores: Whether to return the attention weights too. Asking
            for them does not change the output.
        training: Whether dropout is on.
        use_causal_mask: Whether query i sees only the keys j <= i.
        attention_bias: Floating-point tensor that broadcasts to `(B, N, T, S)` as in
            NumPy (three axes are `(N, T, S)`) and is added to the scaled scores. It
            keeps its precision, whatever the layer's compute dtype.
        segment_ids: Whole numbers of shape `(B, T)`, or a pair of shapes `(B, T)` and
            `(B, S)`: tokens attend only within their own segment (packed sequences).
        position_ids: Where tokens stand, for `position`: whole numbers of shape `(T,)`
            or `(B, T)` for both sides, or a pair (query's, key's). Defaults to counting
            from 0, anew where a segment starts; with a cache from what it holds. For
            a `position` over several axes, coordinates along a last axis: shape
            `(T, axes)` or `(B, T, axes)`, or with the axes of an image's positions
            `(rows, columns, axes)` or `(B, rows, columns, axes)`, whichever are
            attended; defaults to counting along each attended axis.
        cache: What `init_cache` or an earlier call returned. The query is then what
            follows the tokens that the cache has seen; those that `query_mask` says
            are real are added to it. With a cache made of a memory, what is attended
            to. With `use_causal_mask=True` steps give what one call would.

    Returns:
        The output, shape `(B, T, E)` with `E` from `output_shape`, in the layer's
        compute dtype. With `return_attention_scores=True` a tuple of it and the
        attention weights after softmax and before dropout, shape `(B, N, T, S)`; with
        `cache` the new cache is the tuple's last, and scores, mask and bias have a
        column for each of its slots (for several tokens and a sliding window, scores
        have those of the old cache and then of the new tokens).

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
        Sukhbaatar et al., 2019, Persistent memory (num_memory_key_values):
            https://arxiv.org/abs/1907.01470
        Shazeer et al., 2020, Talking heads (talking_heads):
            https://arxiv.org/abs/2003.02436
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
        position: RotaryEmbedding | PositionBias | None = None,
        qk_norm: str | None = None,
        qk_norm_epsilon: float = 1e-6,
        attention_sink: str | None = None,
        logit_soft_cap: float | None = None,
        scale: float | None = None,
        num_memory_key_values: int | None = None,
        talking_heads: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        convert_no_inputs(self)  # `__call__` does
        self.supports_masking = True
        positive, optional = _checks.positive_integer, options.optional
        self._num_heads = positive("num_heads", num_heads)
        self._key_dim = positive("key_dim", key_dim)
        self._value_dim = (
            self._key_dim if value_dim is None else positive("value_dim", value_dim)
        )
        self._num_key_value_heads = options.checked_key_value_heads(
            num_key_value_heads, self._num_heads
        )
        self._dropout = _checks.dropout_rate("dropout", dropout)
        self._use_bias = _checks.boolean("use_bias", use_bias)
        self._use_gate = _checks.boolean("use_gate", use_gate)
        self._output_shape = options.checked_output_shape(output_shape)
        self._attention_axes = checked_attention_axes(attention_axes)
        self._sliding_window = optional(positive, "sliding_window", sliding_window)
        self._flash_attention = optional(
            _checks.boolean, "flash_attention", flash_attention
        )
        self._qk_norm = _checks.choice("qk_norm", qk_norm, QK_NORMS)
        self._qk_norm_epsilon = _checks.positive_number(
            "qk_norm_epsilon", qk_norm_epsilon
        )
        self._attention_sink = _checks.choice(
            "attention_sink", attention_sink, options.ATTENTION_SINKS
        )
        self._logit_soft_cap = optional(
            _checks.positive_number, "logit_soft_cap", logit_soft_cap
        )
        self._scale = optional(_checks.number, "scale", scale)
        self._num_memory_key_values = optional(
            positive, "num_memory_key_values", num_memory_key_values
        )
        self._talking_heads = options.checked_talking_heads(
            talking_heads, self._flash_attention
        )
        self.seed = optional(_checks.integer, "seed", seed)
        self._drawn_seed = None
        self._share = None  # what computes calls where others have some of the heads
        self.position = options.checked_position(
            position,
            self._attention_axes,
            self._key_dim,
            self._num_heads,
            self.num_key_value_heads,
        )
        self._place = None if position is None else position.take_place()

        self._kernel_initializer = keras.initializers.get(kernel_initializer)
        self._bias_initializer = keras.initializers.get(bias_initializer)
        self._kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self._bias_regularizer = keras.regularizers.get(bias_regularizer)
        self._activity_regularizer = keras.regularizers.get(activity_regularizer)
        self._kernel_constraint = keras.constraints.get(kernel_constraint)
        self._bias_constraint = keras.constraints.get(bias_constraint)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_no_hooks(cls, MultiHeadAttention)

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
    _query_dense = property(operator.attrgetter("query_dense"))
    _key_dense = property(operator.attrgetter("key_dense"))
    _value_dense = property(operator.attrgetter("value_dense"))
    _output_dense = property(operator.attrgetter("output_dense"))

    # ------------------------------------------------------------------ weights

    @told_as_it_is
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
        query_shape, value_shape, key_shape = filled(
            query_shape, value_shape, key_shape
        )
        input_checks.check_build_shapes(query_shape, value_shape, key_shape)
        self._axes = AttentionAxes(len(query_shape), self._attention_axes)
        self._remembered = Remembered()
        input_checks.check_input_shapes(self._axes, query_shape, value_shape, key_shape)
        if self.position is not None:
            input_checks.check_position_axes(self.position, self._axes.attended)
        self._widths = {
            "query": query_shape[-1],
            "value": value_shape[-1],
            "key": key_shape[-1],
        }
        with building(self):
            if self.position is not None and not self.position.built:
                self.position.build()
            with parts_not_rematerialized(self):
                add_projections(self, query_shape, value_shape, key_shape)
            add_own_weights(self)

    # ------------------------------------------------------------------ call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer; see its call arguments."""
        cache = kwargs.get("cache")
        args, kwargs = converted(self, args, kwargs, uncast="attention_bias")
        result = super().__call__(*args, **kwargs)
        if cache is None:
            return result
        # All floating-point arguments are cast; a cache keeps a dtype of its own.
        return (*result[:-1], kv_cache.with_dtypes_of(result[-1], cache))

    @told_as_it_is
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
        position_ids: Tensor | tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
    ) -> Any:
        call = Call(
            query,
            value,
            key,
            query_mask,
            value_mask,
            key_mask,
            attention_mask,
            return_attention_scores,
            training,
            use_causal_mask,
            attention_bias,
            segment_ids,
            position_ids,
            cache,
        )
        call.read(self).fill(self.compute_dtype)
        input_checks.check_weights_are_trained(self, kernel_variable(self.query_dense))
        # An activity regularizer sees all tokens.
        good = clean(call, keep_finite=self._activity_regularizer is not None)
        compute = self._share or self._compute
        output, scores, mask, cache = compute(call)
        output, scores = spoilt(call, good, mask, output, scores)
        if call.query_mask is not None:
            set_keras_mask(output, call.query_mask)
        results = (output,)
        if return_attention_scores:
            results += (call.axes.unfold_scores(scores, call.query, call.value),)
        if cache is not None:
            results += (cache,)
        return results if len(results) > 1 else output

    def _compute(self, call: Call):
        return self._compute_with(operands_of(self, call), call)

    def _compute_with(self, operands: Operands, call: Call):
        """Returns output, scores or None, who may attend to whom, and the cache."""
        mask = intersect(mask_of(call), operands.mask)
        heads, scores = self._attend(call, operands, mask)
        heads = call.axes.unfold(heads, like=call.query)
        if self._use_gate:
            heads = heads * projected(self._gate_dense, call.query)
        output = projected(self.output_dense, heads)
        return output, scores, mask, operands.cache

    def _attend(self, call: Call, operands: Operands, mask: Mask | None):
        """Lets every head attend; returns heads `(B', T, N, V)` and scores or None."""
        heads = operands.query, operands.key, operands.value
        return_scores = call.return_attention_scores
        arguments = {
            "mask": mask,
            "bias": bias_of(call, self.compute_dtype),
            "position_bias": operands.position_bias,
            "scale": self.scale,
            "logit_soft_cap": self._logit_soft_cap,
            **own_arguments(self),
        }
        heads, arguments = memory_key_values.joined(self, heads, arguments)
        recording.note(self, *heads, **arguments)
        attend = functools.partial(
            attend_without_padding,
            *heads,
            **arguments,
            return_scores=return_scores,
            implementation=options.implementation_of(self._flash_attention),
        )
        result = as_trained(self, attend, call.training)
        heads, scores = result if return_scores else (result, None)
        heads = ops.cast(heads, self.compute_dtype)
        if operands.new_tokens is not None:
            heads = operands.new_tokens.refused(heads)
        if return_scores:
            scores = scores[..., self._num_memory_key_values or 0 :]
            scores = ops.cast(scores, self.compute_dtype)
        return heads, scores

    def rematerialized_call(self, layer_call: Callable, *args: Any, **kwargs: Any):
        """Has Keras compute the call again for its gradient: `keras.RematScope`."""
        call, floats = rematerializable(self, layer_call, args, kwargs)
        call = super().rematerialized_call(call, *args, **kwargs)
        return lambda *args, **kwargs: call(*floats)

    @property
    def _position_axes(self) -> int:
        return 1 if self.position is None else self.position.axes

    @property
    def _rotates(self) -> bool:
        return isinstance(self.position, RotaryEmbedding)

    @property
    def _rotates_later(self) -> bool:
        """Whether a cache holds keys as they are before they are rotated."""
        return self._rotates and self.position.depends_on_length

    # ------------------------------------------------------------------ cache

    def init_cache(
        self,
        batch_size: int | None = None,
        max_length: int | None = None,
        dtype: str | None = None,
        *,
        memory: Tensor | tuple[Tensor, Tensor] | None = None,
        value_mask: Tensor | None = None,
    ) -> Cache:
        """Returns a cache, to be given to calls as `cache=`.

        Either an empty one for self-attention, which the calls fill, or one of the
        projected keys and values of a memory, for cross-attention.

        Args:
            batch_size: Rows of the batch, B.
            max_length: How many tokens a row can get, L. With `sliding_window` never
                more slots than its size are made, and once there are so many, rows can
                get any number of tokens.
            dtype: Of keys and values. Defaults to the layer's compute dtype.
            memory: What is attended to: a tensor of shape `(B, S, D_v)`, or a pair
                `(value, key)` of shapes `(B, S, D_v)` and `(B, S, D_k)`. The layer must
                have been built.
            value_mask: Booleans of shape `(B, S)`, `True` for real tokens of the
                memory. Defaults to the Keras mask that the value carries.

        Returns:
            A dictionary of tensors: `"key"`, shape `(B, L, K, H)`, `"value"`, shape
            `(B, L, K, V)`, and `"length"`, int32 of shape `(B,)`, zeros; of a memory
            `"key"` and `"value"` with `S` for `L`, and `"mask"` if there is one.

        Raises:
            TypeError: If an argument is of a wrong type.
            ValueError: If arguments for both kinds are given, or shapes do not fit.

        Example:

        >>> layer = keras_mha.MultiHeadAttention(num_heads=8, key_dim=64)
        >>> cache = layer.init_cache(batch_size=2, max_length=100)
        >>> x = keras.random.normal((2, 10, 512))
        >>> output, cache = layer(x, cache=cache, use_causal_mask=True)
        >>> output, cache = layer(x[:, :1], cache=cache, use_causal_mask=True)
        >>> cache["length"]
        [11, 11]
        """
        return new_cache(self, batch_size, max_length, dtype, memory, value_mask)

    # ------------------------------------------------------------------ symbolic

    def compute_output_shape(
        self,
        query_shape: Shape,
        value_shape: Shape | None = None,
        key_shape: Shape | None = None,
    ) -> Shape:
        """Returns the output's shape for inputs of these shapes."""
        shapes = filled(query_shape, value_shape, key_shape)
        input_checks.check_build_shapes(*shapes)
        axes = AttentionAxes(len(shapes[0]), self._attention_axes)
        input_checks.check_input_shapes(axes, *shapes)
        return (*shapes[0][:-1], *(self._output_shape or shapes[0][-1:]))

    @told_as_it_is
    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what `call` would return, as placeholders."""
        call = Call(*args, **kwargs).read(self)
        query = call.query
        output = keras.KerasTensor(
            (*query.shape[:-1], *(self._output_shape or query.shape[-1:])),
            dtype=(self.output_dense if self.built else self).compute_dtype,
        )
        if call.query_mask is not None:
            set_keras_mask(output, call.query_mask)
        results = (output,)
        if call.return_attention_scores:
            scores = keras.KerasTensor(call.scores_shape, dtype=self.compute_dtype)
            results += (scores,)
        if call.cache is not None:
            results += (kv_cache.like(call.cache),)
        return results if len(results) > 1 else output

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
        if self.position is not None:
            beyond["position"] = self.position.config_in(self._place)
        return {**super().get_config(), **config, **beyond, **quantized_dtype(self)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MultiHeadAttention":
        """Makes the layer that `get_config` described."""
        config, place = dict(config), None
        if isinstance(config.get("position"), dict):
            config["position"], place = copy_in_place(config["position"])
        layer = super().from_config(config)
        if place is not None:
            layer._place = place
        return layer
