"""Scaled dot-product attention on projected heads."""

import dataclasses
from typing import Any, Literal

import keras
from keras.random import SeedGenerator

from keras_mha import _checks, masks
from keras_mha._keras import (
    Tensor,
    dtype_name,
    is_symbolic,
    told_as_it_is,
    without_autocast,
)
from keras_mha.biases import Bias
from keras_mha.kernels import backends
from keras_mha.kernels.call import Attended
from keras_mha.kernels.dropout import DrawnSeed, seed_pair
from keras_mha.ops import padding, planner
from keras_mha.ops.checked_call import as_float_tensors, checked_call


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: masks.Mask | Tensor | None = None,
    bias: Tensor | None = None,
    position_bias: Bias | None = None,
    scale: float | None = None,
    logit_soft_cap: float | None = None,
    sink: float | Tensor | None = None,
    talking_heads: tuple[Tensor | None, Tensor | None] | None = None,
    dropout: float = 0.0,
    seed: int | SeedGenerator | None = None,
    return_scores: bool = False,
    return_lse: bool = False,
    implementation: planner.Implementation = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Attends from queries to keys and returns the weighted values.

        logits  = query . key * scale
        logits  = logits mixed over the heads                with talking heads
        logits  = cap * tanh(logits / cap)                   with a soft cap
        weights = softmax((logits + bias) where the mask allows)
        weights = weights mixed over the heads               with talking heads
        output  = dropout(weights) . value

    A query that may attend to no key gets zeros, and zero gradients. Keys and values
    that `Padding` hides, or that are of other `Segments`, may hold anything, NaN too.

    Args:
        query: Shape `(B, T, N, H)`: batch, length, heads, width; floating point.
        key: Shape `(B, S, K, H)`, where `N` is a multiple of `K`: query head `n`
            reads key and value head `n // (N / K)` (grouped-query attention; with
            `K = 1` multi-query attention).
        value: Shape `(B, S, K, V)`.
        mask: Who may attend to whom: a `keras_mha.masks.Mask`, or booleans (`True` =
            may attend) of shape `(T, S)`, `(B, T, S)` or `(B, N, T, S)`.
        bias: Floating-point numbers that broadcast to `(B, N, T, S)` as in NumPy and
            are added to the scaled scores. Minus infinity masks, as does all below
            -1e30.
        position_bias: A bias object, such as `keras_mha.ALiBi(8).bias()`, which
            kernels ask for a tile at a time.
        scale: Factor of the dot products. Defaults to `1 / sqrt(H)`.
        logit_soft_cap: Keeps the scores within plus and minus this number.
        sink: A logit that joins every softmax without a key or a value, so that the
            weights of a row may sum to less than 1: a number for all heads (0 gives
            softmax1) or a tensor of shape `(N,)`.
        talking_heads: A pair of matrices `(N, N)`, either of which may be `None`. The
            first mixes the heads' scores before softmax, the second their weights
            after it: head `m` gets element `(n, m)` times what head `n` has, summed
            over `n`. Where heads have masks of their own, a mixed weight may be on
            keys that the head's own mask hides.
        dropout: Share of the attention weights to drop, from 0 to 1. There is no
            `training` here: what is asked for is dropped.
        seed: An int or a `keras.random.SeedGenerator` for dropout. The same int drops
            the same weights in every call.
        return_scores: Whether to return the attention weights too.
        return_lse: Whether to return the logarithm of each row's sum of exponentials
            too, with which `keras_mha.merge_attention` joins what was attended to in
            parts.
        implementation: `"auto"` takes the fastest kernel that can run the call.
            `"fused"` (the backend's own kernel), `"blockwise"` (tiles with a running
            softmax) and `"reference"` (the formula, with all scores in memory) demand
            one, `"flash"` demands one of the first two, whose memory is linear in the
            lengths. `keras_mha.plan_attention` says what a call would take.

    Returns:
        The output, shape `(B, T, N, V)`, in the dtype that `query`, `key` and `value`
        promote to; float16 and bfloat16 are normalised in float32. With
        `return_scores=True` or `return_lse=True` a tuple of it and what is asked for:
        the attention weights after softmax (and mixing) and before dropout, shape
        `(B, N, T, S)`; then `log(sum(exp(logits + bias)))` over what a row may attend
        to and the sink, shape `(B, N, T)`, float32 (float64 of such inputs), minus
        infinity where that is nothing, with its gradients.

    Raises:
        TypeError: If an argument is of a wrong type or dtype.
        ValueError: If shapes do not fit together, a number is out of its range, or
            the implementation asked for cannot run the call.

    Example:

    >>> query = keras.random.normal((2, 10, 8, 64))
    >>> key = value = keras.random.normal((2, 12, 2, 64))
    >>> keras_mha.dot_product_attention(query, key, value).shape
    (2, 10, 8, 64)

    References:
        Vaswani et al., 2017: https://arxiv.org/abs/1706.03762
        Ainslie et al., 2023 (grouped queries): https://arxiv.org/abs/2305.13245
        Gemma Team, 2024 (soft cap): https://arxiv.org/abs/2408.00118
        Xiao et al., 2023 (sinks): https://arxiv.org/abs/2309.17453
        Shazeer et al., 2020 (talking heads): https://arxiv.org/abs/2003.02436
    """
    options = {
        "scale": scale,
        "logit_soft_cap": logit_soft_cap,
        "dropout": dropout,
        "seed": seed,
        "return_scores": return_scores,
        "return_lse": return_lse,
        "implementation": implementation,
    }
    mixing = {"talking_heads": talking_heads}
    matrices = talking_heads if isinstance(talking_heads, tuple | list) else ()
    tensors = (query, key, value, mask, bias, sink, *matrices)
    if any(is_symbolic(x) for x in tensors):
        if position_bias is not None:
            raise ValueError(
                "`position_bias` must be None in a Functional model, which does not "
                "keep bias objects: use keras_mha.MultiHeadAttention(position=...). "
                f"Received: position_bias={position_bias!r}"
            )
        operation = DotProductAttention(**options)
        return operation.symbolic_call(
            query, key, value, mask=mask, bias=bias, sink=sink, **mixing
        )
    options |= {"position_bias": position_bias, **mixing}
    return _attend(query, key, value, mask=mask, bias=bias, sink=sink, **options)


def plan_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: masks.Mask | Tensor | None = None,
    bias: Tensor | None = None,
    position_bias: Bias | None = None,
    scale: float | None = None,
    logit_soft_cap: float | None = None,
    sink: float | Tensor | None = None,
    talking_heads: tuple[Tensor | None, Tensor | None] | None = None,
    dropout: float = 0.0,
    seed: int | SeedGenerator | None = None,
    return_scores: bool = False,
    return_lse: bool = False,
    implementation: planner.Implementation = "auto",
    device: Literal["cpu", "gpu", "tpu"] | None = None,
) -> planner.Plan:
    """Says which implementation `dot_product_attention` would take, and why.

    Nothing is computed. The arguments are those of `dot_product_attention`; tensors may
    also be `keras.KerasTensor`s, which have a shape and a dtype only.

    Args:
        query: As of `dot_product_attention`, shape `(B, T, N, H)`.
        key: As there, shape `(B, S, K, H)`.
        value: As there, shape `(B, S, K, V)`.
        mask: As there.
        bias: As there.
        position_bias: As there.
        scale: As there.
        logit_soft_cap: As there.
        sink: As there.
        talking_heads: As there.
        dropout: As there.
        seed: As there.
        return_scores: As there.
        return_lse: As there.
        implementation: As there.
        device: What kind of device to plan for, `"gpu"` being NVIDIA's: it need not be
            there. Defaults to that on which the tensors are.

    Returns:
        A plan with `implementation` (`"fused"`, `"blockwise"` or `"reference"`, and
        under a `keras_mha.distribution.SequenceParallel` also `"ring"` or
        `"all_to_all"`) and `reason`, strings both.

    Raises:
        TypeError: As `dot_product_attention` does.
        ValueError: As `dot_product_attention` does, and for a device of another name.

    Example:

    >>> x = keras.KerasTensor((1, 4096, 8, 64))
    >>> keras_mha.plan_attention(x, x, x, return_scores=True).implementation
    'reference'
    """
    call = checked_call(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        position_bias=position_bias,
        scale=scale,
        logit_soft_cap=logit_soft_cap,
        sink=sink,
        talking_heads=talking_heads,
        dropout=dropout,
        seed=seed,
        return_scores=return_scores,
        return_lse=return_lse,
    )
    if device is not None:
        device = _checks.choice("device", device, ("cpu", "gpu", "tpu"))
        call = dataclasses.replace(call, device=device)
    return planner.plan(call, implementation)


@keras.saving.register_keras_serializable(package="keras_mha")
class DotProductAttention(keras.Operation):
    """`dot_product_attention` as a node of a Functional model."""

    def __init__(self, *, name: str | None = None, **options: Any):
        super().__init__(name=name)
        self.options = options

    @told_as_it_is
    def call(
        self, query, key, value, mask=None, bias=None, sink=None, talking_heads=None
    ):
        arguments = {"mask": mask, "bias": bias, "sink": sink}
        arguments["talking_heads"] = talking_heads
        return _attend(query, key, value, **arguments, **self.options)

    @told_as_it_is
    def compute_output_spec(
        self, query, key, value, mask=None, bias=None, sink=None, talking_heads=None
    ):
        options = dict(self.options)
        implementation = options.pop("implementation")
        if options["dropout"]:
            raise ValueError(
                "`dropout` must be 0 in a Functional model, which would neither keep "
                "the seed's state nor turn dropout off at inference: use "
                "keras_mha.MultiHeadAttention. "
                f"Received: dropout={options['dropout']}"
            )
        arguments = {"mask": mask, "bias": bias, "sink": sink, "position_bias": None}
        arguments["talking_heads"] = talking_heads
        call = checked_call(query, key, value, **arguments, **options)
        planner.plan(call, implementation)
        shape, dtype = (*query.shape[:3], value.shape[-1]), call.query.dtype
        output = keras.KerasTensor(shape, dtype=dtype)
        results = (output,)
        if call.return_scores:
            results += (keras.KerasTensor(call.scores_shape, dtype=dtype),)
        if call.return_lse:
            dtype = "float64" if dtype_name(call.query) == "float64" else "float32"
            results += (keras.KerasTensor(call.scores_shape[:3], dtype=dtype),)
        return results if len(results) > 1 else output

    def get_config(self) -> dict[str, Any]:
        seed = keras.saving.serialize_keras_object(self.options["seed"])
        return {"name": self.name, **self.options, "seed": seed}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DotProductAttention":
        seed = keras.saving.deserialize_keras_object(config["seed"])
        return cls(**{**config, "seed": seed})


@backends.as_written
def _attend(query, key, value, *, implementation, position_bias=None, **arguments):
    arguments["position_bias"] = position_bias
    # Before variables keep their precision, which biases and masks may hold.
    query, key, value = as_float_tensors(query, key, value)
    with without_autocast():
        call = checked_call(query, key, value, **arguments)
        call, spoilt = padding.without_padding(call)
        results = _asked_for(planner.plan(call, implementation).kernel(call))
    if spoilt is not None:
        # Of the output the tokens are behind the batch, of all else behind the heads.
        output, *others = results
        others = [padding.nan_where(spoilt[:, None], x) for x in others]
        results = (padding.nan_where(spoilt, output), *others)
    return results if len(results) > 1 else results[0]


@backends.as_written
def attend_without_padding(query, key, value, *, implementation, **arguments):
    """Attends as `dot_product_attention` does, of tensors in which padding is zero."""
    with without_autocast():
        call = checked_call(query, key, value, **arguments)
        results = _asked_for(planner.plan(call, implementation).kernel(call))
    return results if len(results) > 1 else results[0]


def _asked_for(attended: Attended) -> tuple[Tensor, ...]:
    return tuple(x for x in attended if x is not None)


def drawn(seed: int | SeedGenerator | None) -> DrawnSeed:
    """Draws what one call needs of a seed now, to be given to it as its seed: where the
    call may be computed twice, or within a branch that a generator cannot leave."""
    return DrawnSeed(seed_pair(seed))
