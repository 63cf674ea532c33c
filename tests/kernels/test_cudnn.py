"""cuDNN's kernel on JAX: which calls it is given, as what, and what is made of it.

Nothing here has a GPU. The kernel's numbers are those of a formula that stands in for
its primitives and takes their arguments by what their documentation says of them; what
the documentation leaves open it answers with NaN. That the kernel is called is read in
programs that are lowered for a GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.problem import prepared
from tests import oracle
from tests.helpers import kernels_exported, only_jax, rounded, to_numpy, to_tensor

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
        {"bias": np.where(np.isinf(MASKING), -np.inf, BIAS)},
    ),
    "bias lower than what a mask hides": (
        causal(padding(FROM_THE_FIFTH)),
        (j <= i) & keys(FROM_THE_FIFTH),
        # Of which one key has all the weight: nothing hangs on how it is rounded.
        {"bias": np.broadcast_to(-(2.0**26) * (j + 1), (B, 1, T, S))},
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
    row, column = jnp.arange(query.shape[1])[:, None], jnp.arange(key.shape[1])
    seen = jnp.ones((len(row), len(column)), bool)
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


def stand_ins(received):
    """Returns functions that take the arguments of the primitives, both ways."""

    def told(tensors, options):
        return {"batch": len(tensors[0]), "keys": tensors[1].shape[1], **options}

    def in_float32(tensors):
        halves = "bfloat16", "float16"
        return (x.astype("float32") if x.dtype in halves else x for x in tensors)

    def weights_of(tensors, sums, options):
        import jax.numpy as jnp

        query, key, _, bias, *lengths = tensors[:6]
        given = [x for x in (query, key, bias, sums) if x is not None]
        is_open = ~jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in given]))
        is_open |= jnp.any((lengths[1] < 1) | (lengths[1] > key.shape[1]))
        query = jnp.where(is_open, jnp.nan, query)
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

        received.append(told(tensors, options))
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

        received.append(told(tensors, options))
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
            behind = jnp.arange(key.shape[1]) >= tensors[5][:, None]
            found[1:] = (
                jnp.where(behind[..., None, None], jnp.nan, x) for x in found[1:]
            )
        if options["variadic_args"][1]:
            axes = [axis for axis in (0, 1) if bias.shape[axis] == 1]
            found.append(jnp.sum(d_scores, axis=axes, keepdims=True))
        return jax.tree.map(lambda x: x.astype(dtype), found)

    return forward, backward


@pytest.fixture
def cudnn(monkeypatch):
    """The kernel's module, with the options of the kernel's calls as `received`."""
    from keras_mha.kernels.jax_kernels import cudnn, cudnn_primitives
    from keras_mha.kernels.jax_kernels.cudnn_arguments import MASKED

    received = []
    monkeypatch.setattr(cudnn_primitives, "_kernels", lambda: stand_ins(received))
    monkeypatch.setattr(cudnn_primitives, "refusal", lambda: None)
    # Numbers are compared in float32, in which little is rounded.
    monkeypatch.setitem(MASKED, "float32", MASKED["bfloat16"])
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


LENGTHS = {
    "more queries than keys": ((2, 13, 4, 8), (2, 7, 4, 8), (2, 7, 4, V)),
    "one query": ((2, 1, 4, 8), (2, 7, 1, 8), (2, 7, 1, V)),
    "one key": ((2, 5, 4, 8), (2, 1, 2, 8), (2, 1, 2, V)),
    "even lengths": ((1, 6, 2, 9), (1, 8, 2, 9), (1, 8, 2, V)),
}


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("shapes", LENGTHS.values(), ids=LENGTHS.keys())
def test_causal_starts_at_the_first_key_whatever_the_lengths(
    shapes, has_padding, cudnn
):
    rows, columns = shapes[0][1], shapes[1][1]
    seen = np.arange(columns) <= np.arange(rows)[:, None]
    mask = masks.Causal()
    if has_padding:
        valid = booleans(shapes[0][0], columns)
        mask, seen = mask & masks.Padding(to_tensor(valid)), seen & keys(valid)
    check(cudnn, mask, seen, {}, shapes=shapes)
    # Keys behind the last query are nobody's.
    assert {each["keys"] for each in cudnn.received} == {min(rows, columns)}


HALVES = [  # a bias is refused in float16
    ("window", "bfloat16"),
    ("padding anywhere", "bfloat16"),
    ("bias that masks, padding, causal", "bfloat16"),
    ("padding, first rows see nothing", "float16"),
    ("booleans", "float16"),
]


@pytest.mark.parametrize(("name", "dtype"), HALVES)
def test_numbers_in_half_types(name, dtype, cudnn):
    mask, seen, options = CASES[name]
    options = {name: rounded(x, dtype) for name, x in options.items()}
    check(cudnn, mask(), seen, options, dtype, atol=0.02)


@pytest.mark.parametrize("scale", [2.0**-12, 0.05, 3.0, 2.0**12])
def test_a_hidden_key_has_no_weight_at_any_scale(scale, cudnn):
    valid = FROM_THE_FIFTH
    arrays, call = a_call(
        masks.Causal() & masks.Padding(to_tensor(valid)), dtype="float16"
    )
    call = replace(call, scale=scale)
    assert cudnn.refusal(call) is None
    # What a hidden key has in its value would be seen at once.
    value = np.where(valid[..., None, None], arrays[2], 6e4)
    call = replace(call, value=to_tensor(value, "float16"))
    output, lse, _ = run(cudnn, call, np.zeros((B, T, N, V)))
    seen = (j <= i) & keys(valid)
    expected, _ = oracle.dot_product_attention(*arrays, mask=seen, scale=scale)
    np.testing.assert_allclose(output, expected, atol=0.01)
    assert (lse[:, :, :5] == np.inf).all() and np.isfinite(lse[:, :, 5:]).all()


@pytest.mark.parametrize("scale", [2.0**-12, 2.0**-9, 0.05, 1.0, 3.0, 2.0**12])
def test_a_hidden_keys_score_is_low_but_no_lower_than_sums_can_bear(scale):
    from keras_mha.kernels.jax_kernels.layout import hiding_exponent

    exponent = hiding_exponent(scale)
    assert exponent <= 30  # two factors that float16 has
    assert 2.0**18 <= scale * 2.0**exponent <= 2.0**24


@pytest.mark.parametrize("name", ["booleans of keys", "booleans and keys, causal"])
def test_what_a_hidden_key_holds_is_of_no_matter(name, cudnn):
    valid = ANYWHERE
    mask, seen = masks.Dense(to_tensor(valid[:, None])), keys(valid)
    if "causal" in name:
        mask, seen = mask & masks.Causal(), seen & (j <= i)
    arrays, call = a_call(mask)
    key = np.where(valid[..., None, None], arrays[1], 1e12)
    value = np.where(valid[..., None, None], arrays[2], 1e12)
    call = replace(call, key=to_tensor(key), value=to_tensor(value))
    output, _, gradients = run(cudnn, call, np.ones((B, T, N, V)))
    expected, _ = oracle.dot_product_attention(*arrays, mask=seen, scale=0.4)
    np.testing.assert_allclose(output, expected, atol=2e-5)
    expected = oracle.dot_product_attention_gradients(
        *arrays, mask=seen, scale=0.4, output_cotangent=np.ones((B, T, N, V))
    )
    wanted = in_layout("query", expected["dquery"], call)
    np.testing.assert_allclose(gradients["query"], wanted, atol=1e-4)


LENGTHS_OF_KEYS = {
    "right": (RIGHT, True),
    "right, one sees nothing": (j < np.array([[0], [6]]), True),
    "left": (LEFT, False),
    "anywhere": (ANYWHERE, False),
}


@pytest.mark.parametrize("case", LENGTHS_OF_KEYS.values(), ids=LENGTHS_OF_KEYS.keys())
def test_heads_too_wide_for_one_more_feature_need_padding_on_the_right(
    case, cudnn, monkeypatch
):
    import jax

    from keras_mha.kernels.jax_kernels import cudnn_machine

    valid, is_right = case
    monkeypatch.setattr(cudnn_machine, "widest", lambda: H)
    forward, ran = cudnn.blockwise.forward, []

    def tiles(*arguments):
        jax.debug.callback(lambda: ran.append("tiles"))
        return forward(*arguments)

    monkeypatch.setattr(cudnn.blockwise, "forward", tiles)
    seen = (j <= i) & keys(valid)
    check(cudnn, masks.Causal() & masks.Padding(to_tensor(valid)), seen, {})
    jax.effects_barrier()
    assert ran == ([] if is_right else ["tiles"])


@pytest.mark.parametrize(
    "name", ["padding, causal", "bias of a plane", "padding alone"]
)
def test_what_is_mapped_becomes_part_of_the_batch(name, cudnn):
    import jax

    mask, _, options = CASES[name]
    options = {name: x[:, :, :T, :S] for name, x in options.items()}
    (_, one), (_, other) = a_call(mask(), **options), a_call(mask(), **options)
    problem, first = prepared(one)
    _, second = prepared(other)

    def attend(moving, mask):
        tensors = {**moving, "mask": mask}
        output, lse = cudnn.forward(problem, tensors)
        return output, cudnn.backward(problem, tensors, output, lse, output)

    moving = [
        {name: x for name, x in each.items() if name != "mask"}
        for each in (first, second)
    ]
    both = jax.tree.map(lambda *x: jax.numpy.stack(x), *moving)
    found = jax.jit(jax.vmap(attend, (0, None)))(both, first["mask"])
    assert [each["batch"] for each in cudnn.received[1::2]] == [2 * B] * 2
    attend = jax.jit(attend)
    expected = [attend(each, first["mask"]) for each in moving]
    for n in range(2):
        jax.tree.map(
            lambda x, y, n=n: np.testing.assert_allclose(x[n], y, atol=1e-5),
            found,
            expected[n],
        )


# -------------------------------------------------- what it is asked for, and what not


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_it_takes_all_these_calls(case):
    from keras_mha.kernels.jax_kernels import cudnn

    mask, _, options = case
    _, call = a_call(mask(), dtype="bfloat16", **options)
    assert cudnn.refusal(call) is None


def symbolic(dtype="bfloat16", batch=2, length=6, width=8, columns=None):
    query = keras.KerasTensor((batch, length, 4, width), dtype)
    key = keras.KerasTensor((batch, columns or length, 4, width), dtype)
    return lambda **options: AttentionCall(query, key, key, **options)


def zeros(*shape, dtype="bfloat16"):
    return to_tensor(np.zeros(shape), dtype)


SOME = np.ones((2, 6), bool)
REFUSED = {
    "float32": (symbolic("float32"), {}, "float16 and bfloat16"),
    "wide": (symbolic(width=136), {}, "up to a width of 128"),
    "unknown lengths": (symbolic(length=None), {}, "lengths that are numbers"),
    "dropout": (symbolic(), {"dropout": 0.1}, "seed"),
    "cap": (symbolic(), {"logit_soft_cap": 3.0}, "soft cap"),
    "scores": (symbolic(), {"return_scores": True}, "scores"),
    "sums": (symbolic(), {"return_lse": True}, "rows' sums"),
    "offset": (symbolic(), {"mask": masks.Causal(1)}, "an offset"),
    "window": (symbolic(), {"mask": masks.SlidingWindow(2)}, "both sides"),
    "long window": (
        symbolic(columns=3),
        {"mask": masks.Causal() & masks.SlidingWindow(2)},
        "no more queries than keys",
    ),
    "where": (symbolic(), {"mask": masks.Where(lambda i, j: i < j)}, "kind Where"),
    "prefix, causal": (symbolic(), {"mask": masks.Causal() | masks.Prefix(3)}, "Or"),
    "segments": (
        symbolic(),
        {"mask": masks.Segments(np.ones((2, 6), int))},
        "Segments",
    ),
    "keys of heads": (
        symbolic(),
        {"mask": masks.Dense(np.ones((2, 4, 1, 6), bool))},
        "kind Dense",
    ),
    "precise bias": (
        symbolic(),
        {"bias": zeros(1, 1, 6, 6, dtype="float32")},
        "precision",
    ),
    "bias in float16": (
        symbolic("float16"),
        {"bias": zeros(1, 1, 6, 6, dtype="float16")},
        "float16",
    ),
    "bias of keys": (symbolic(), {"bias": zeros(2, 1, 1, 6)}, "broadcasts"),
    "bias beside more booleans": (
        symbolic(),
        {
            "bias": zeros(1, 4, 6, 6),
            "mask": masks.Dense(np.ones((2, 1, 6, 6), bool)),
        },
        "more numbers than given",
    ),
    "bias for all rows, padding": (
        symbolic(),
        {"bias": zeros(1, 4, 6, 6), "mask": masks.Padding(SOME)},
        "more numbers than given",
    ),
    "bias, window": (
        symbolic(),
        {"bias": zeros(1, 1, 6, 6), "mask": masks.Causal() & masks.SlidingWindow(2)},
        "no window beside",
    ),
    "window, padding, wide heads": (
        symbolic(width=128),
        {"mask": masks.Causal() & masks.SlidingWindow(2) & masks.Padding(SOME)},
        "hides no keys beside a window",
    ),
    "booleans, padding, negative scale": (
        symbolic(),
        {
            "mask": masks.Dense(np.ones((6, 6), bool)) & masks.Padding(SOME),
            "scale": -1.0,
        },
        "hides no keys beside a window or booleans",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_it_does_not_take(case):
    from keras_mha.kernels.jax_kernels import cudnn

    call, options, why = case
    assert why in cudnn.refusal(call(**options))


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({}, None),
        ({"mask": masks.Padding(SOME)}, 2),
        ({"mask": masks.Causal() & masks.Padding(SOME)}, 2),
        ({"mask": masks.Causal() & masks.Padding(SOME), "scale": -1.0}, 2),
    ],
)
def test_what_it_takes(options, batch):
    from keras_mha.kernels.jax_kernels import cudnn

    assert cudnn.refusal(symbolic(batch=batch, width=128)(**options)) is None


class Gpu:
    """What a machine says of its device."""

    def __init__(self, capability="8.0", platform="cuda 12090"):
        self.compute_capability = capability
        self.client = type("Client", (), {"platform_version": platform})


@pytest.mark.parametrize(
    ("gpu", "version", "why"),
    [
        (Gpu(), 91002, None),
        (Gpu("7.5"), 91002, "8.0"),
        (Gpu(), 90100, "9.2"),
        (Gpu(), None, "no cuDNN"),
    ],
)
def test_a_gpu_that_is_there_is_asked(gpu, version, why, monkeypatch):
    import jax

    from keras_mha.kernels.jax_kernels import cudnn, cudnn_machine

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    monkeypatch.setattr(cudnn_machine, "_version", lambda: version)
    found = cudnn.refusal(symbolic()())
    assert found is None if why is None else why in found


def test_heads_are_wider_on_hoppers(monkeypatch):
    import jax

    from keras_mha.kernels.jax_kernels import cudnn, cudnn_machine

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu("9.0")])
    monkeypatch.setattr(cudnn_machine, "_version", lambda: 91002)
    assert cudnn.refusal(symbolic(width=256)()) is None
    mask = masks.Causal() & masks.Padding(SOME)
    assert cudnn.refusal(symbolic(width=128)(mask=mask)) is None


def test_a_jax_with_other_primitives_is_not_asked(monkeypatch):
    from keras_mha.kernels.jax_kernels import cudnn, cudnn_primitives

    _, backward = cudnn_primitives._kernels()
    monkeypatch.setattr(cudnn_primitives, "_kernels", lambda: (lambda x: x, backward))
    assert "does not hand out" in cudnn.refusal(symbolic()())


# ------------------------------------------------------------- programs that call cuDNN


LONG = {"T": 272, "S": 304}


def exported(function, *arguments):
    """The program of a function that was traced here, for an NVIDIA GPU."""
    import jax

    names = "fmhaSoftmax", "fmhaScaleBiasSoftmax"
    names = [f"__cudnn${name}{way}" for name in names for way in ("", "Backward")]
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
    with kernels_exported():
        export = jax.export.export(
            jax.jit(function), platforms=["cuda"], disabled_checks=unchecked
        )
        return export(*arguments).mlir_module()


def lowered(mask=None, dtype="bfloat16", implementation="auto", **options):
    """The program, for an NVIDIA GPU, of a call of many tokens and its gradients."""
    import jax

    shapes = ((2, LONG["T"], 4, 20), (2, LONG["S"], 2, 20), (2, LONG["S"], 2, 12))
    arrays, _ = a_call(None, shapes, dtype)
    tokens = [to_tensor(x, dtype) for x in arrays]
    options = {name: to_tensor(x, dtype) for name, x in options.items()}

    def step(*tensors):
        def attend(query, key, value, options):
            return keras_mha.dot_product_attention(
                *(query, key, value),
                mask=mask,
                implementation=implementation,
                **options,
            )

        output, pull_back = jax.vjp(attend, *tensors, options)
        return pull_back(output)

    return exported(step, *tokens)


def calls_of(program):
    """The name of each call of cuDNN, its kind of mask and its window."""
    pattern = r"@__cudnn\$(\w+).*?mask_type\\22: \\22(\w+).*?window_length\\22: (\d+)"
    return re.findall(pattern, program)


VALID = RNG.uniform(size=(2, LONG["S"])) < 0.7
LONG_BIAS = np.zeros((1, 4, LONG["T"], LONG["S"]))
PROGRAMS = {
    "no mask": (lambda: None, {}, "fmhaSoftmax", "NO_MASK", "0"),
    "causal": (causal(), {}, "fmhaSoftmax", "CAUSAL", "0"),
    "window": (causal(window(50)), {}, "fmhaSoftmax", "CAUSAL", "50"),
    "padding": (padding(VALID), {}, "fmhaSoftmax", "PADDING", "0"),
    "padding, causal": (causal(padding(VALID)), {}, "fmhaSoftmax", "CAUSAL", "0"),
    "padding, window": (
        causal(padding(VALID), window(50)),
        {},
        "fmhaSoftmax",
        "CAUSAL",
        "50",
    ),
    "sinks": (lambda: None, {"sink": np.zeros(4)}, "fmhaSoftmax", "NO_MASK", "0"),
    "bias": (
        lambda: None,
        {"bias": LONG_BIAS},
        "fmhaScaleBiasSoftmax",
        "NO_MASK",
        "0",
    ),
    "bias, causal": (
        causal(),
        {"bias": LONG_BIAS},
        "fmhaScaleBiasSoftmax",
        "CAUSAL",
        "0",
    ),
    "booleans": (
        dense(np.ones((2, 1, LONG["T"], LONG["S"]), bool)),
        {},
        "fmhaScaleBiasSoftmax",
        "NO_MASK",
        "0",
    ),
}


@pytest.mark.parametrize("case", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_programs_for_gpus_call_it(case):
    mask, options, name, kind, size = case
    program = lowered(mask(), **options)
    assert calls_of(program) == [(name, kind, size), (f"{name}Backward", kind, size)]
    assert "dot_general" not in program
    scores = re.findall(r"tensor<(?:\d+x)*272x(?:272|304)x\w+>", program)
    assert bool(scores) == ("Bias" in name)
    # Grouped heads are not repeated, and the sums stay in float32.
    assert "tensor<2x304x4x" not in program and "tensor<2x272x4x24xbf16>" in program
    assert "tensor<2x4x272xf32>" in program


def test_programs_ask_for_padding_on_the_right_where_heads_are_too_wide():
    x = to_tensor(np.zeros((2, 140, 4, 128)), "bfloat16")
    mask = masks.Causal() & masks.Padding(to_tensor(np.ones((2, 140), bool)))

    def attend(x):
        return keras_mha.dot_product_attention(x, x, x, mask=mask)

    program = exported(attend, x)
    assert calls_of(program) == [("fmhaSoftmax", "PADDING_CAUSAL", "0")]
    assert "stablehlo.case" in program


def test_the_gradient_of_a_bias_of_all_rows_comes_of_tiles_if_it_would_be_large(
    monkeypatch,
):
    from keras_mha.kernels.jax_kernels import cudnn

    monkeypatch.setattr(cudnn, "_FEW_BYTES", 2**10)
    sink = np.zeros(4)  # no other test's call has both: programs are kept
    calls = calls_of(lowered(bias=LONG_BIAS, sink=sink))
    assert [name for name, *_ in calls] == ["fmhaScaleBiasSoftmax"]
    of_all = np.zeros((2, 4, LONG["T"], LONG["S"]))
    calls = calls_of(lowered(bias=of_all, sink=sink))
    assert [name for name, *_ in calls][1:] == ["fmhaScaleBiasSoftmaxBackward"]


def test_the_gradient_of_a_large_bias_is_exact(cudnn, monkeypatch):
    monkeypatch.setattr(cudnn, "_FEW_BYTES", 0)
    mask, seen, options = CASES["bias of heads, causal"]
    check(cudnn, mask(), seen, options)
    assert len(cudnn.received) == 1


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "float16"])
def test_a_layer_calls_it_where_its_program_is_lowered_for_a_gpu(dtype):
    layer = keras_mha.MultiHeadAttention(4, 20, dtype=dtype)
    layer.build((2, LONG["T"], 12))
    x = to_tensor(np.ones((2, LONG["T"], 12)))
    valid = to_tensor(np.ones((2, LONG["T"]), bool))

    def call(x, valid):
        return layer(x, query_mask=valid, value_mask=valid, use_causal_mask=True)

    assert calls_of(exported(call, x, valid)) == [("fmhaSoftmax", "CAUSAL", "0")]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {"implementation": "flash"}),
        ("bfloat16", {"mask": masks.SlidingWindow(20)}),
        ("bfloat16", {"mask": masks.Causal() | masks.Prefix(9)}),
    ],
)
def test_other_programs_for_gpus_do_not(dtype, options):
    assert calls_of(lowered(dtype=dtype, **options)) == []


def test_the_plan_for_a_gpu_says_so():
    x = keras.KerasTensor((2, LONG["T"], 4, 20), "bfloat16")
    plan = keras_mha.plan_attention(x, x, x, device="gpu")
    assert plan.implementation == "fused"
    plan = keras_mha.plan_attention(
        x, x, x, mask=masks.SlidingWindow(9), device="gpu", implementation="flash"
    )
    assert plan.implementation == "blockwise" and "both sides" in plan.reason


def test_what_is_mapped_is_one_call_in_programs_too():
    import jax

    tensors = [to_tensor(np.zeros((3, 2, 8, 4, 8)), "bfloat16") for _ in range(3)]
    bias = to_tensor(np.zeros((3, 1, 4, 8, 8)), "bfloat16")

    def attend(*tensors):
        *tokens, bias = tensors
        return keras_mha.dot_product_attention(
            *tokens, bias=bias, implementation="flash"
        )

    def step(*tensors):
        output, pull_back = jax.vjp(jax.vmap(attend), *tensors)
        return pull_back(output)

    program = exported(step, *tensors, bias)
    assert len(calls_of(program)) == 2 and "tensor<6x8x4x8xbf16>" in program


# ------------------------------------------------------------------ on several devices


@pytest.fixture(scope="module")
def on_devices():
    """Of a process that has four devices, which this one cannot have."""
    worker = Path(__file__).with_name("cudnn_worker.py")
    path = os.pathsep.join([str(worker.parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(worker)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


OWN_SHARE = [
    *("rows", "rows, bias for all", "heads", "rows and heads"),
    *("one key head", "two devices for a key head", "segments"),
]
GATHERED = ["keys not shared", "positions"]


@pytest.mark.parametrize("layout", OWN_SHARE + GATHERED)
def test_devices_share_a_call(layout, on_devices):
    assert on_devices[layout]["error"] < 1e-5


@pytest.mark.parametrize("layout", OWN_SHARE)
def test_devices_get_no_more_than_their_share(layout, on_devices):
    assert set(on_devices[layout]["sent"]) <= {"all-reduce"}
