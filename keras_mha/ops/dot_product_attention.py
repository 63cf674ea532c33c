"""Scaled dot-product attention on projected heads."""

from typing import Any

import keras
from keras import ops
from keras.random import SeedGenerator

from keras_mha import _checks, masks
from keras_mha._keras import (
    Shape,
    Tensor,
    as_tensor,
    dtype_name,
    is_float,
    is_symbolic,
    told_as_it_is,
    without_autocast,
)
from keras_mha.biases import Bias
from keras_mha.kernels import backends
from keras_mha.kernels.call import Attended, AttentionCall
from keras_mha.kernels.dropout import DrawnSeed, seed_pair
from keras_mha.ops import padding, planner


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
    tensors = (query, key, value, mask, bias, sink, talking_heads)
    if any(is_symbolic(x) for x in keras.tree.flatten(tensors)):
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

    Returns:
        A plan with `implementation` (`"fused"`, `"blockwise"` or `"reference"`) and
        `reason`, strings both.

    Raises:
        TypeError: As `dot_product_attention` does.
        ValueError: As `dot_product_attention` does.

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
    query, key, value = _as_float_tensors(query, key, value)
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
    """Attends as `dot_product_attention` does, of numbers in which padding is zero."""
    query, key, value = _as_float_tensors(query, key, value)
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


def checked_call(
    query,
    key,
    value,
    *,
    mask,
    bias,
    position_bias,
    scale,
    logit_soft_cap,
    sink,
    talking_heads=None,
    dropout=0.0,
    seed=None,
    return_scores=False,
    return_lse=False,
) -> AttentionCall:
    """Checks the arguments, fills in the defaults and returns them as one call.

    The arguments are those of `dot_product_attention`.
    """
    query, key, value = _as_float_tensors(query, key, value)
    _check_shapes(query, key, value)
    query, key, value = _promoted(query, key, value)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    call = AttentionCall(
        query,
        key,
        value,
        mask=_as_mask(mask),
        bias=None if bias is None else _as_bias(bias),
        position_bias=_checked_position_bias(position_bias),
        scale=_checks.number("scale", scale),
        logit_soft_cap=None
        if logit_soft_cap is None
        else _checks.positive_number("logit_soft_cap", logit_soft_cap),
        sink=None if sink is None else _as_sink(sink, query.shape[2]),
        talking_heads=_as_talking_heads(talking_heads, query.shape[2]),
        dropout=_checks.dropout_rate("dropout", dropout),
        seed=seed,
        return_scores=_checks.boolean("return_scores", return_scores),
        return_lse=_checks.boolean("return_lse", return_lse),
    )
    if call.return_lse and call.talking_heads[1] is not None:
        raise ValueError(
            "`return_lse` must be False with `talking_heads` after softmax, whose rows "
            "have no sum of their own. Received: return_lse=True"
        )
    _check_seed(seed)
    if isinstance(call.mask, masks.Mask):
        call.mask.check(call.scores_shape)
    elif call.mask is not None:
        masks.check_dense_shape("mask", tuple(call.mask.shape), call.scores_shape)
    if call.bias is not None and not _checks.broadcasts_to(
        tuple(call.bias.shape), call.scores_shape
    ):
        raise ValueError(
            "`bias` must broadcast to the scores, (B, N, T, S) = "
            f"{call.scores_shape}. Received: bias of shape {tuple(bias.shape)}"
        )
    if call.position_bias is not None:
        call.position_bias.check(call.scores_shape)
    return call


def _checked_position_bias(bias: Any) -> Bias | None:
    if bias is None or isinstance(bias, Bias):
        return bias
    raise TypeError(
        "`position_bias` must be a bias object, such as `keras_mha.ALiBi(8).bias()`; a "
        "tensor of numbers is a `bias`. "
        f"Received: position_bias={bias!r} (of type {type(bias).__name__})"
    )


def _as_float_tensor(name: str, x: Any) -> Tensor:
    tensor = x if is_symbolic(x) or ops.is_tensor(x) else as_tensor(x)
    if tensor is None and hasattr(x, "dtype"):  # complex numbers, or text
        raise TypeError(
            f"`{name}` must hold floating-point numbers. "
            f"Received: {name} of dtype {x.dtype}"
        )
    if tensor is None:
        raise TypeError(
            f"`{name}` must be a tensor of floating-point numbers. "
            f"Received: {name}={x!r} (of type {type(x).__name__})"
        )
    if not is_float(tensor):
        raise TypeError(
            f"`{name}` must hold floating-point numbers. "
            f"Received: {name} of dtype {dtype_name(tensor)}"
        )
    return tensor


def _as_float_tensors(*inputs: Any) -> list[Tensor]:
    names = "query", "key", "value"
    return [_as_float_tensor(name, x) for name, x in zip(names, inputs, strict=True)]


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
    problem = _shape_problem(**shapes)
    if problem is not None:
        received = ", ".join(
            f"{name} of shape {tuple(s)}" for name, s in shapes.items()
        )
        raise ValueError(f"{problem} Received: {received}")


def _shape_problem(query: Shape, key: Shape, value: Shape) -> str | None:
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if len(shape) != 4:
            return f"`{name}` must have the shape (B, length, N, width)."
    (qb, _, qn, qh), (kb, ks, kn, kh), (vb, vs, vn, _) = query, key, value
    same = _checks.same
    if not (same(qb, kb) and same(qb, vb) and same(kb, vb)):
        return "`query`, `key` and `value` must have the same batch size."
    if not same(ks, vs):
        return "`key` and `value` must have the same length."
    if kn != vn:
        return "`key` and `value` must have the same number of heads."
    if qn % kn:
        return "The heads of `query` must be a multiple of those of `key`."
    if qh != kh:
        return "`query` and `key` must have the same width (last axis)."
    return None


def _promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts tensors of different dtypes to the one they promote to."""
    if len({x.dtype for x in tensors}) == 1:
        return tensors
    dtypes = {dtype_name(x) for x in tensors}
    dtype = keras.backend.result_type(*dtypes)
    return tuple(ops.cast(x, dtype) for x in tensors)


def _as_mask(mask: Any) -> Any:
    """Returns a Mask or None; a placeholder of a Functional model stays as it is."""
    if mask is None or is_symbolic(mask):
        return mask
    tensor = None if isinstance(mask, masks.Mask) else as_tensor(mask)
    return masks.as_mask(
        mask if tensor is None else masks.as_booleans("mask", tensor, warn=True)
    )


def _as_bias(bias: Any) -> Tensor:
    """Returns the bias with four axes."""
    bias = _as_float_tensor("bias", bias)
    if len(bias.shape) > 4:
        raise ValueError(
            "`bias` must have at most four axes, (B, N, T, S). "
            f"Received: bias of shape {tuple(bias.shape)}"
        )
    if is_symbolic(bias):
        return bias
    return ops.reshape(bias, (1,) * (4 - len(bias.shape)) + tuple(ops.shape(bias)))


def _as_sink(sink: Any, heads: int) -> Tensor:
    """Returns the sink as one logit a head, shape `(N,)`."""
    if not hasattr(sink, "shape"):
        return ops.full((heads,), _checks.number("sink", sink), dtype="float32")
    sink = _as_float_tensor("sink", sink)
    if tuple(sink.shape) not in ((), (1,), (heads,)):
        raise ValueError(
            f"`sink` must be a number or have the shape (N,) = ({heads},). "
            f"Received: sink of shape {tuple(sink.shape)}"
        )
    return sink


def _as_talking_heads(pair: Any, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """Returns the two matrices that heads are mixed by."""
    if pair is None:
        return None, None
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(
            "`talking_heads` must be a pair of matrices (or None), one for before and "
            "one for after softmax. "
            f"Received: talking_heads={pair!r} (of type {type(pair).__name__})"
        )
    first, second = (
        None if x is None else _as_float_tensor("talking_heads", x) for x in pair
    )
    for mixing in (first, second):
        if mixing is not None and tuple(mixing.shape) != (heads, heads):
            raise ValueError(
                f"`talking_heads` must be matrices of shape (N, N) = {heads, heads}. "
                f"Received: a matrix of shape {tuple(mixing.shape)}"
            )
    return first, second


def _check_seed(seed: Any) -> None:
    if seed is None or isinstance(seed, SeedGenerator | DrawnSeed):
        return
    if not 0 <= _checks.integer("seed", seed) < 2**32:
        raise ValueError(f"`seed` must be from 0 to 2**32 - 1. Received: seed={seed}")
