"""cuDNN's kernel on JAX: which calls it is given, as what, and what is made of it.

Nothing here has a GPU. The kernel's numbers are those of a formula that stands in for
its primitives and takes their arguments by what their documentation says of them; what
the documentation leaves open it answers with NaN. That the kernel is called is read in
programs that are lowered for a GPU.
"""

from __future__ import annotations

import re
from dataclasses import replace

import keras
import numpy as np
import pytest

from keras_mha import masks
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.problem import prepared
from tests import oracle
from tests.helpers import only_jax, rounded, to_numpy, to_tensor

pytestmark = only_jax

B, T, S, N, K, H, V = 2, 9, 13, 4, 2, 6, 5
RNG = np.random.default_rng(0)
i, j = np.arange(T)[:, None], np.arange(S)


def booleans(*shape, share=0.6):
    return RNG.uniform(size=shape) < share


RIGHT = j < np.array([[7], [S]])
LEFT = ~RIGHT[:, ::-1] | (j > 3)
ANYWHERE = booleans(B, S)
FROM_THE_FIFTH = np.stack([j > 4, j > 4])
ONE_SEES_NOTHING = np.stack([ANYWHERE[0], np.zeros(S, bool)])
QUERIES = booleans(B, T)
OF_HEADS = booleans(B, N, T, 1)
DENSE = booleans(B, N, T, S, share=0.15)
PLANE = booleans(T, S, share=0.15)
BIAS = RNG.normal(size=(B, N, T, S))
MASKING = np.where(booleans(1, N, T, S, share=0.2), BIAS[:1], -np.inf)


def dense(values):
    return lambda: masks.Dense(to_tensor(values))


def padding(valid):
    return lambda: masks.Padding(to_tensor(valid))


def causal(*others):
    return lambda: masks.intersect(masks.Causal(), *(other() for other in others))


def window(size):
    return lambda: masks.SlidingWindow(size)


def both(*others):
    return lambda: masks.intersect(*(other() for other in others))


def keys(valid):
    return valid[:, None, None]


# The mask, its booleans, and the rest of the call.
CASES = {
    "no mask": (lambda: None, None, {}),
    "causal": (causal(), j <= i, {}),
    "window": (causal(window(3)), (j <= i) & (i - j < 3), {}),
    "wide window": (both(window(20)), None, {}),
    "wide causal window": (causal(window(T)), j <= i, {}),
    "padding on the right": (padding(RIGHT), keys(RIGHT), {}),
    "padding on the left": (padding(LEFT), keys(LEFT), {}),
    "padding anywhere": (padding(ANYWHERE), keys(ANYWHERE), {}),
    "padding alone": (padding(ONE_SEES_NOTHING), keys(ONE_SEES_NOTHING), {}),
    "padding, causal": (causal(padding(ANYWHERE)), (j <= i) & keys(ANYWHERE), {}),
    "padding, first rows see nothing": (
        causal(padding(FROM_THE_FIFTH)),
        (j <= i) & keys(FROM_THE_FIFTH),
        {},
    ),
    "padding, window": (
        causal(padding(ANYWHERE), window(2)),
        (j <= i) & (i - j < 2) & keys(ANYWHERE),
        {},
    ),
    "padding, sinks": (
        padding(ONE_SEES_NOTHING),
        keys(ONE_SEES_NOTHING),
        {"sink": RNG.normal(size=N)},
    ),
    "causal, sinks": (causal(), j <= i, {"sink": RNG.normal(size=N)}),
    "padding and queries": (
        both(padding(ANYWHERE), dense(QUERIES[:, None, :, None])),
        keys(ANYWHERE) & QUERIES[:, None, :, None],
        {},
    ),
    "queries of heads": (causal(dense(OF_HEADS)), (j <= i) & OF_HEADS, {}),
    "prefix": (lambda: masks.Prefix(4), j < 4, {}),
    "padding or prefix": (
        lambda: masks.Padding(to_tensor(ANYWHERE)) | masks.Prefix(4),
        keys(ANYWHERE) | (j < 4),
        {},
    ),
    "not a prefix": (lambda: ~masks.Prefix(4), j >= 4, {}),
    "booleans of keys": (dense(ANYWHERE[:, None]), keys(ANYWHERE), {}),
    "booleans": (dense(DENSE), DENSE, {}),
    "booleans of a plane, causal": (causal(dense(PLANE)), PLANE & (j <= i), {}),
    "booleans, padding": (
        both(dense(DENSE), padding(ANYWHERE)),
        DENSE & keys(ANYWHERE),
        {},
    ),
    "bias": (lambda: None, None, {"bias": BIAS}),
    "bias of heads, causal": (causal(), j <= i, {"bias": BIAS[:1]}),
    "bias of rows": (lambda: None, None, {"bias": BIAS[:, :1]}),
    "bias of a plane": (lambda: None, None, {"bias": BIAS[:1, :1]}),
    "bias that masks": (lambda: None, None, {"bias": MASKING}),
    "bias that masks, padding, causal": (
        causal(padding(ANYWHERE)),
        (j <= i) & keys(ANYWHERE),
        {"bias": MASKING},
    ),
    "bias, booleans, sinks": (
        dense(DENSE),
        DENSE,
        {"bias": BIAS, "sink": RNG.normal(size=N)},
    ),
}


# ------------------------------------------------------------ what stands in for cuDNN


def scores_of(query, key, bias, rows, columns, scale, mask_type, window):
    """The scores, (B, N, T, S), minus infinity where the kernel's arguments mask."""
    import jax.numpy as jnp

    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest") * scale
    row, column = np.arange(query.shape[1])[:, None], np.arange(key.shape[1])
    seen = np.ones((len(row), len(column)), bool)
    if "CAUSAL" in mask_type.name:
        seen &= column <= row
    if window is not None:
        assert "CAUSAL" in mask_type.name and bias.size == 0
        assert len(row) <= len(column)
        seen &= column > row - window
    if bias.size:
        assert bias.dtype == query.dtype and bias.shape[2:] == scores.shape[2:]
        assert all(length % 2 == 0 for length in bias.shape[2:])
        scores = scores + bias
    if "PADDING" in mask_type.name:
        seen = seen & (row < rows[:, None, None, None])
        seen = seen & (column < columns[:, None, None, None])
    return jnp.where(seen, scores, -jnp.inf)


def stand_in(name, received):
    """Returns a function that takes the arguments of the primitive of this name."""

    def in_float32(tensors):
        return (x.astype("float32") if x.dtype == "bfloat16" else x for x in tensors)

    def weights_of(tensors, sums, options):
        import jax.numpy as jnp

        query, key, _, bias, *lengths = tensors[:6]
        bias = bias.astype(query.dtype)
        window = options["sliding_window_length"]
        scores = scores_of(
            *(query, key, bias, *lengths, options["scale"]),
            options["mask_type"],
            window,
        )
        if sums is None:
            top = jnp.max(scores, axis=-1)  # NaN comes of a row that sees nothing
            sums = top + jnp.log(jnp.sum(jnp.exp(scores - top[..., None]), axis=-1))
        return jnp.exp(scores - sums[..., None]), sums

    def forward(*tensors, is_training, **options):
        import jax.numpy as jnp

        received.append(options)
        assert is_training and len(tensors) == 10
        dtype = tensors[0].dtype
        assert all(x.dtype == dtype for x in tensors[:4])
        tensors = tuple(in_float32(tensors))
        weights, sums = weights_of(tensors, None, options)
        value = jnp.repeat(tensors[2], weights.shape[1] // tensors[2].shape[2], axis=2)
        output = jnp.einsum("bnts,bsnh->btnh", weights, value, precision="highest")
        return output.astype(dtype), sums

    def backward(*tensors, **options):
        import jax
        import jax.numpy as jnp

        received.append(options)
        dtype = tensors[0].dtype
        *tensors, sums, output, d_output = in_float32(tensors)
        query, key, value, bias = tensors[:4]
        shared = query.shape[2] // key.shape[2]
        product = lambda *x: jnp.einsum(*x, precision="highest")  # noqa: E731
        weights, _ = weights_of(tensors, sums, options)
        of_heads = jnp.repeat(value, shared, axis=2)
        share = jnp.sum(output * d_output, axis=-1).swapaxes(1, 2)[..., None]
        d_weights = product("btnh,bsnh->bnts", d_output, of_heads)
        d_scores = weights * (d_weights - share)

        def summed(x):
            return x.reshape(*key.shape[:3], shared, x.shape[-1]).sum(3)

        d_query = product("bnts,bsnh->btnh", d_scores, jnp.repeat(key, shared, axis=2))
        d_key = summed(product("bnts,btnh->bsnh", d_scores, query))
        d_value = summed(product("bnts,btnh->bsnh", weights, d_output))
        found = [d_query * options["scale"], d_key * options["scale"], d_value]
        if tensors[5].size:  # what stands behind a sequence's keys is nobody's to say
            behind = np.arange(key.shape[1]) >= tensors[5][:, None]
            found[1:] = (
                jnp.where(behind[..., None, None], jnp.nan, x) for x in found[1:]
            )
        if options["variadic_args"][1]:
            axes = [axis for axis in (0, 1) if bias.shape[axis] == 1]
            found.append(jnp.sum(d_scores, axis=axes, keepdims=True))
        return jax.tree.map(lambda x: x.astype(dtype), found)

    return {"fwd": forward, "bwd": backward}[name]


@pytest.fixture
def cudnn(monkeypatch):
    """The kernel's module, with the options of the kernel's calls as `received`."""
    from keras_mha.kernels.jax_kernels import cudnn, cudnn_primitives

    received = []
    monkeypatch.setattr(
        cudnn_primitives, "_bound", lambda _, name: stand_in(name, received)
    )
    # Numbers are compared in float32, in which little is rounded.
    monkeypatch.setitem(cudnn._MASKED, "float32", cudnn._MASKED["bfloat16"])
    monkeypatch.setattr(cudnn, "received", received, raising=False)
    return cudnn


def a_call(mask=None, shapes=None, dtype="float32", **options):
    """Returns the arrays of a call, and the call."""
    shapes = shapes or ((B, T, N, H), (B, S, K, H), (B, S, K, V))
    arrays = [rounded(RNG.normal(size=shape), dtype) for shape in shapes]
    given = {name: to_tensor(x, dtype) for name, x in options.items()}
    call = AttentionCall(
        *(to_tensor(x, dtype) for x in arrays), mask=mask, scale=0.4, **given
    )
    return arrays, call


def run(kernel, call, d_output):
    """Returns the output (B, T, N, V), the sums (B, N, T) and the gradients."""
    import jax

    problem, tensors = prepared(call)

    @jax.jit
    def both(tensors, d_output):
        output, lse = kernel.forward(problem, tensors)
        return output, lse, kernel.backward(problem, tensors, output, lse, d_output)

    batch, rows, heads, width = d_output.shape
    groups = call.key.shape[2]
    d_output = d_output.reshape(batch, rows, groups, heads // groups, width)
    d_output = to_tensor(d_output.transpose(0, 2, 4, 3, 1), call.query.dtype)
    output, lse, gradients = both(tensors, d_output)
    assert output.dtype == call.query.dtype and lse.dtype == "float32"
    output = to_numpy(output).transpose(0, 4, 1, 3, 2).reshape(batch, rows, heads, -1)
    lse = to_numpy(lse).reshape(batch, heads, rows)
    return output, lse, {name: to_numpy(x) for name, x in gradients.items()}


def in_layout(name, gradient, call):
    """A gradient of the oracle's as the kernel has it."""
    if name == "query":
        batch, rows, heads, width = gradient.shape
        groups = call.key.shape[2]
        shape = (batch, rows, groups, heads // groups, width)
        return gradient.reshape(shape).transpose(0, 2, 4, 3, 1)
    if name in ("key", "value"):
        return gradient.transpose(0, 2, 3, 1)
    return gradient


def check(kernel, mask, seen, options, dtype="float32", atol=2e-5, shapes=None):
    arrays, call = a_call(mask, shapes, dtype, **options)
    d_output = rounded(RNG.normal(size=(*arrays[0].shape[:3], V)), dtype)
    options = {"mask": seen, "scale": 0.4, **options}
    output, lse, gradients = run(kernel, call, d_output)
    expected, _ = oracle.dot_product_attention(*arrays, **options)
    np.testing.assert_allclose(output, expected, atol=atol)
    sums = oracle.log_sums(*arrays[:2], **options)
    sums = np.where(sums == -np.inf, np.inf, sums)
    np.testing.assert_allclose(lse, sums, atol=atol)
    expected = oracle.dot_product_attention_gradients(
        *arrays, output_cotangent=d_output, **options
    )
    assert gradients.keys() == {name[1:] for name in expected}
    for name, found in gradients.items():
        wanted = in_layout(name, expected[f"d{name}"], call)
        np.testing.assert_allclose(
            found, wanted.reshape(found.shape), atol=4 * atol, err_msg=name
        )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_numbers_are_the_oracles(case, cudnn):
    mask, seen, options = case
    check(cudnn, mask(), seen, options)
    assert len(cudnn.received) == 2
