"""Wrong use raises early, and says which argument, what came and what is expected."""

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from tests.helpers import to_tensor


def floats(*shape):
    return to_tensor(np.random.default_rng(0).normal(size=shape))


def booleans(*shape):
    return to_tensor(np.ones(shape, "bool"))


def integers(*shape):
    return to_tensor(np.zeros(shape, "int32"))


def construct(**arguments):
    return lambda: keras_mha.MultiHeadAttention(
        **{"num_heads": 4, "key_dim": 8, **arguments}
    )


def build(*shapes, **arguments):
    return lambda: construct(**arguments)().build(*shapes)


def call(*inputs, layer=None, **arguments):
    """Calls a layer that attends from (2, 5, 16) to (2, 7, 12), or as given."""
    layer = layer or {}
    inputs = inputs or (floats(2, 5, 16), floats(2, 7, 12))
    return lambda: construct(**layer)()(*inputs, **arguments)


def built():
    layer = construct()()
    layer.build((2, 5, 16))
    return layer


def call_built(*inputs, **arguments):
    def run():
        layer = construct()()
        layer.build((None, 5, 16), (None, 7, 12))
        return layer(*inputs, **arguments)

    return run


def attend(query=(2, 5, 4, 8), key=(2, 7, 4, 8), value=(2, 7, 4, 8), **arguments):
    query, key, value = (
        floats(*x) if isinstance(x, tuple) else x for x in (query, key, value)
    )
    return lambda: keras_mha.dot_product_attention(query, key, value, **arguments)


class WrongShape(masks.Mask):
    def allowed(self, rows, columns):
        return keras.ops.transpose(rows >= columns)


def mask_attend(mask):
    return lambda: keras_mha.dot_product_attention(
        floats(2, 5, 4, 8), floats(2, 7, 4, 8), floats(2, 7, 4, 8), mask=mask()
    )


COMPLEX = np.zeros((2, 7, 16), "complex64")

# An additive mask: as booleans it says "may attend" of all that it should hide.
ADDITIVE = np.where(np.eye(5, 7) > 0, 0.0, -1e9).astype("float32")

# Each line: a name, the wrong use, the error, and what its message must say, in order.
CONSTRUCTOR = [
    ("no heads", construct(num_heads=0), ValueError, "num_heads.*at least 1.*0"),
    ("negative heads", construct(num_heads=-2), ValueError, "num_heads.*-2"),
    ("heads as text", construct(num_heads="8"), TypeError, "num_heads.*integer.*'8'"),
    ("heads a float", construct(num_heads=2.0), TypeError, "num_heads.*2.0.*float"),
    ("heads a bool", construct(num_heads=True), TypeError, "num_heads.*True.*bool"),
    ("no width", construct(key_dim=0), ValueError, "key_dim.*at least 1.*0"),
    ("no width at all", construct(key_dim=None), TypeError, "key_dim.*None"),
    ("no value width", construct(value_dim=0), ValueError, "value_dim.*at least 1"),
    ("value width a list", construct(value_dim=[8]), TypeError, r"value_dim.*\[8\]"),
    ("dropout in percent", construct(dropout=10), ValueError, "dropout.*0 to 1.*10"),
    ("negative dropout", construct(dropout=-0.1), ValueError, "dropout.*-0.1"),
    ("dropout NaN", construct(dropout=float("nan")), ValueError, "dropout.*finite"),
    ("dropout as text", construct(dropout="0.1"), TypeError, "dropout.*number.*'0.1'"),
    (
        "use_bias as text",
        construct(use_bias="no"),
        TypeError,
        "use_bias.*True or F.*no",
    ),
    ("use_gate as text", construct(use_gate="yes"), TypeError, "use_gate.*yes"),
    ("output_shape 0", construct(output_shape=0), ValueError, "output_shape.*least 1"),
    (
        "output_shape -1",
        construct(output_shape=(3, -1)),
        ValueError,
        "output_shape.*-1",
    ),
    (
        "output_shape text",
        construct(output_shape="16"),
        TypeError,
        "output_shape.*'16'",
    ),
    ("axes text", construct(attention_axes="1"), TypeError, "attention_axes.*'1'"),
    (
        "axes twice",
        construct(attention_axes=(1, 1)),
        ValueError,
        "attention_axes.*dist",
    ),
    ("no axes", construct(attention_axes=()), ValueError, "attention_axes"),
    ("window 0", construct(sliding_window=0), ValueError, "sliding_window.*at least 1"),
    ("window float", construct(sliding_window=2.5), TypeError, "sliding_window.*2.5"),
    ("flash as text", construct(flash_attention="on"), TypeError, "flash_att.*'on'"),
    ("seed float", construct(seed=1.5), TypeError, "seed.*integer.*1.5"),
    (
        "groups that do not divide",
        construct(num_key_value_heads=3),
        ValueError,
        "num_key_value_heads.*divide.*3.*num_heads=4",
    ),
    ("no groups", construct(num_key_value_heads=0), ValueError, "num_key_value_heads"),
    ("unknown norm", construct(qk_norm="batch"), ValueError, "qk_norm.*'rms'.*'batch'"),
    ("norm an array", construct(qk_norm=np.ones(2)), ValueError, "qk_norm.*one of"),
    ("norm a bool", construct(qk_norm=True), ValueError, "qk_norm.*one of.*True"),
    ("epsilon 0", construct(qk_norm_epsilon=0), ValueError, "qk_norm_epsilon.*above 0"),
    (
        "unknown sink",
        construct(attention_sink="one"),
        ValueError,
        "attention_sink.*'zero', 'learned'.*'one'",
    ),
    ("cap 0", construct(logit_soft_cap=0), ValueError, "logit_soft_cap.*above 0.*0"),
    ("cap text", construct(logit_soft_cap="50"), TypeError, "logit_soft_cap.*'50'"),
    ("scale inf", construct(scale=float("inf")), ValueError, "scale.*finite.*inf"),
    ("scale text", construct(scale="auto"), TypeError, "scale.*number.*'auto'"),
    (
        "no learned keys",
        construct(num_memory_key_values=0),
        ValueError,
        "num_memory_key_values.*at least 1.*0",
    ),
    (
        "learned keys float",
        construct(num_memory_key_values=2.0),
        TypeError,
        "num_memory_key_values.*integer.*2.0",
    ),
    (
        "learned keys a bool",
        construct(num_memory_key_values=True),
        TypeError,
        "num_memory_key_values.*integer.*True",
    ),
    (
        "talking heads a bool",
        construct(talking_heads=True),
        ValueError,
        "talking_heads.*'pre', 'post', 'both'.*True",
    ),
    (
        "talking heads of a flash kernel",
        construct(talking_heads="post", flash_attention=True),
        ValueError,
        "talking_heads.*None with `flash_attention=True`.*all heads.*'post'",
    ),
    ("unknown argument", construct(head_size=8), ValueError, "head_size"),
]

BUILD = [
    ("two axes", build((None, 16)), ValueError, "query_shape.*three axes.*None, 16"),
    (
        "unknown features",
        build((None, 5, None)),
        ValueError,
        "query_shape.*features.*known",
    ),
    (
        "ranks differ",
        build((None, 5, 16), (None, 7, 3, 12)),
        ValueError,
        "same number of axes.*7, 3, 12",
    ),
    (
        "key and value lengths differ",
        build((None, 5, 16), (None, 7, 12), (None, 6, 12)),
        ValueError,
        "value.*key.*7, 12.*6, 12",
    ),
    (
        "attention over the batch",
        build((None, 5, 16), attention_axes=0),
        ValueError,
        r"attention_axes.*batch.*\(0,\)",
    ),
    (
        "attention over the features",
        build((None, 5, 16), attention_axes=-1),
        ValueError,
        r"attention_axes.*features.*\(-1,\)",
    ),
    (
        "an axis that is not there",
        build((None, 5, 16), attention_axes=(1, 2, 3)),
        ValueError,
        "attention_axes.*3 axes",
    ),
    (
        "one axis by two names",
        build((None, 4, 5, 16), attention_axes=(1, -3)),
        ValueError,
        "attention_axes.*distinct",
    ),
    (
        "lengths differ off the attention axes",
        build((None, 4, 5, 16), (None, 3, 5, 16), attention_axes=2),
        ValueError,
        "length of axis 1.*4, 5, 16.*3, 5, 16",
    ),
]

CALL = [
    ("text", call("a sentence"), ValueError, "positional"),
    (
        "batch sizes differ",
        call(floats(2, 5, 16), floats(3, 7, 12)),
        ValueError,
        "same batch size.*2, 5, 16.*3, 7, 12",
    ),
    (
        "lengths of key and value differ",
        call(floats(2, 5, 16), floats(2, 7, 12), floats(2, 6, 12)),
        ValueError,
        "value.*key.*7, 12.*6, 12",
    ),
    (
        "other query width than built for",
        call_built(floats(2, 5, 15), floats(2, 7, 12)),
        ValueError,
        "query.*16 features.*2, 5, 15",
    ),
    (
        "other value width than built for",
        call_built(floats(2, 5, 16), floats(2, 7, 16)),
        ValueError,
        "value.*12 features.*2, 7, 16",
    ),
    (
        "self-attention in a layer built for cross-attention",
        call_built(floats(2, 5, 16)),
        ValueError,
        "value.*12 features.*2, 5, 16",
    ),
    (
        "other rank than built for",
        call_built(floats(2, 5, 3, 16), floats(2, 7, 3, 12)),
        ValueError,
        "query.*3 axes.*2, 5, 3, 16",
    ),
    (
        "mask of the wrong length",
        call(attention_mask=booleans(2, 5, 6)),
        ValueError,
        "attention_mask.*2, 4, 5, 7.*2, 5, 6",
    ),
    (
        "mask transposed",
        call(attention_mask=booleans(2, 7, 5)),
        ValueError,
        "attention_mask.*2, 7, 5",
    ),
    (
        "padding given as attention_mask",
        call(attention_mask=booleans(2, 7)),
        ValueError,
        r"attention_mask.*\(T, S\).*\(2, 7\)",
    ),
    (
        "mask with the heads first",
        call(attention_mask=booleans(4, 5, 7)),
        ValueError,
        "attention_mask.*no heads axis.*4, 5, 7",
    ),
    (
        "mask with too many axes",
        call(attention_mask=booleans(1, 2, 4, 5, 7)),
        ValueError,
        "attention_mask.*1, 2, 4, 5, 7",
    ),
    (
        "mask as text",
        call(attention_mask="causal"),
        TypeError,
        "attention_mask.*'causal'.*str",
    ),
    (
        "mask as a class",
        call(attention_mask=masks.Causal),
        TypeError,
        "attention_mask.*Causal",
    ),
    (
        "mask object of another batch",
        call(attention_mask=masks.Padding(np.ones((3, 7), "bool"))),
        ValueError,
        r"valid.*Padding.*\(2, 7\).*\(3, 7\)",
    ),
    (
        "query_mask of the key's length",
        call(query_mask=booleans(2, 7)),
        ValueError,
        r"query_mask.*query.*\(2, 5\).*\(2, 7\)",
    ),
    (
        "value_mask of the query's length",
        call(value_mask=booleans(2, 5)),
        ValueError,
        r"value_mask.*value.*\(2, 7\).*\(2, 5\)",
    ),
    (
        "key_mask with three axes",
        call(key_mask=booleans(2, 1, 7)),
        ValueError,
        r"key_mask.*key.*\(2, 7\).*\(2, 1, 7\)",
    ),
    (
        "query_mask as True",
        call(query_mask=True),
        TypeError,
        "query_mask.*tensor.*True",
    ),
    (
        "boolean bias",
        call(attention_bias=booleans(5, 7)),
        TypeError,
        "attention_bias.*floating.*attention_mask.*bool",
    ),
    (
        "bias with the batch where heads belong",
        call(attention_bias=floats(2, 5, 7)),
        ValueError,
        r"attention_bias.*\(N, T, S\).*2, 5, 7",
    ),
    ("bias as a number", call(attention_bias=1.0), TypeError, "attention_bias.*1.0"),
    (
        "one array of segment ids for two lengths",
        call(segment_ids=integers(2, 5)),
        ValueError,
        "segment_ids.*value.*pair.*2, 5",
    ),
    (
        "three arrays of segment ids",
        call(segment_ids=(integers(2, 5), integers(2, 7), integers(2, 7))),
        ValueError,
        "segment_ids.*pair.*3 tensors",
    ),
    (
        "segment ids as floats",
        call(segment_ids=(floats(2, 5), floats(2, 7))),
        TypeError,
        "segment_ids.*whole numbers.*float32",
    ),
    (
        "segment ids without a batch",
        call(segment_ids=(integers(5), integers(7))),
        ValueError,
        r"segment_ids.*query.*\(2, 5\).*\(5,\)",
    ),
    (
        "scores and no memory for them",
        call(layer={"flash_attention": True}, return_attention_scores=True),
        ValueError,
        "return_attention_scores.*flash_attention",
    ),
    (
        "causal as text",
        call(use_causal_mask="no"),
        TypeError,
        "use_causal_mask.*True or False.*'no'",
    ),
    (
        "a causal mask as the flag",
        call(use_causal_mask=np.ones((5, 7), "bool")),
        TypeError,
        "use_causal_mask.*True or False",
    ),
    (
        "scores as text",
        call(return_attention_scores="no"),
        TypeError,
        "return_attention_scores.*'no'",
    ),
    ("unknown call argument", call(mask=booleans(2, 7)), TypeError, "mask"),
]

FUNCTION = [
    ("three axes", attend(query=(2, 5, 32)), ValueError, r"query.*\(B, .*2, 5, 32"),
    (
        "batch sizes differ",
        attend(key=(3, 7, 4, 8), value=(3, 7, 4, 8)),
        ValueError,
        "same batch size.*3, 7, 4, 8",
    ),
    ("lengths differ", attend(value=(2, 6, 4, 8)), ValueError, "same length.*2, 6, 4"),
    (
        "key and value heads differ",
        attend(value=(2, 7, 2, 8)),
        ValueError,
        "same number of heads.*2, 7, 2, 8",
    ),
    (
        "heads that do not divide",
        attend(key=(2, 7, 3, 8), value=(2, 7, 3, 8)),
        ValueError,
        "multiple.*2, 7, 3, 8",
    ),
    ("widths differ", attend(key=(2, 7, 4, 6)), ValueError, "same width.*2, 7, 4, 6"),
    ("whole numbers", attend(query=integers(2, 5, 4, 8)), TypeError, "query.*int32"),
    ("nothing", attend(query=None), TypeError, "query.*tensor.*None"),
    ("text", attend(query="x"), TypeError, "query.*tensor.*'x'"),
    ("bias too long", attend(bias=floats(5, 8)), ValueError, "bias.*2, 4, 5, 7.*5, 8"),
    (
        "bias with five axes",
        attend(bias=floats(1, 1, 1, 5, 7)),
        ValueError,
        "bias.*four axes.*1, 1, 1, 5, 7",
    ),
    ("boolean bias", attend(bias=booleans(5, 7)), TypeError, "bias.*bool"),
    (
        "mask too long",
        attend(mask=booleans(5, 8)),
        ValueError,
        "mask.*2, 4, 5, 7.*5, 8",
    ),
    ("mask with one axis", attend(mask=booleans(7)), ValueError, r"mask.*\(T, S\).*7"),
    ("mask as text", attend(mask="causal"), TypeError, "causal"),
    ("scale as text", attend(scale="big"), TypeError, "scale.*'big'"),
    ("cap below zero", attend(logit_soft_cap=-1), ValueError, "logit_soft_cap.*-1"),
    (
        "sink for other heads",
        attend(sink=floats(3)),
        ValueError,
        r"sink.*\(4,\).*\(3,\)",
    ),
    ("sink as text", attend(sink="zero"), TypeError, "sink.*'zero'"),
    ("lse as text", attend(return_lse="yes"), TypeError, "return_lse.*'yes'"),
    (
        "sums of rows that are mixed",
        attend(return_lse=True, talking_heads=(None, floats(4, 4))),
        ValueError,
        "return_lse.*False with `talking_heads` after softmax",
    ),
    (
        "no parts to merge",
        lambda: keras_mha.merge_attention([]),
        ValueError,
        "parts.*at least one.*\\[\\]",
    ),
    (
        "a part by itself",
        lambda: keras_mha.merge_attention([floats(1, 5, 4, 2)]),
        TypeError,
        "parts.*pairs of floating.*return_lse=True",
    ),
    (
        "parts of no list",
        lambda: keras_mha.merge_attention(floats(1, 5, 4, 2)),
        TypeError,
        "parts.*list of pairs",
    ),
    (
        "parts of other queries",
        lambda: keras_mha.merge_attention(
            [
                (floats(1, 5, 4, 2), floats(1, 4, 5)),
                (floats(1, 6, 4, 2), floats(1, 4, 6)),
            ]
        ),
        ValueError,
        r"parts.*one shape \(B, T, N, V\).*\(1, 6, 4, 2\)",
    ),
    (
        "logarithms in the order of tokens",
        lambda: keras_mha.merge_attention([(floats(1, 5, 4, 2), floats(1, 5, 4))]),
        ValueError,
        r"logarithms of shape \(B, N, T\).*\(1, 5, 4\)",
    ),
    (
        "one matrix for talking heads",
        attend(talking_heads=floats(4, 4)),
        TypeError,
        "talking_heads.*pair of matrices.*before.*after",
    ),
    (
        "talking heads as text",
        attend(talking_heads=("pre", None)),
        TypeError,
        "talking_heads.*'pre'",
    ),
    (
        "talking heads of other heads",
        attend(talking_heads=(None, floats(3, 4))),
        ValueError,
        r"talking_heads.*\(4, 4\).*\(3, 4\)",
    ),
    ("dropout 1.5", attend(dropout=1.5), ValueError, "dropout.*0 to 1.*1.5"),
    ("seed as text", attend(dropout=0.1, seed="s"), TypeError, "seed.*'s'"),
    (
        "seed below 0",
        attend(dropout=0.1, seed=-1),
        ValueError,
        r"seed.*from 0 to 2\*\*32 - 1.*-1",
    ),
    ("return_scores text", attend(return_scores="y"), TypeError, "return_scores.*'y'"),
    (
        "unknown implementation",
        attend(implementation="tiled"),
        ValueError,
        "implementation.*'auto', 'flash', 'fused'.*'tiled'",
    ),
    (
        "fused scores",
        attend(implementation="fused", return_scores=True),
        ValueError,
        "implementation='fused'.*Use implementation='auto'",
    ),
    (
        "scores in linear memory",
        attend(implementation="flash", return_scores=True),
        ValueError,
        "flash_attention=True.*only the reference.*Use implementation='auto'",
    ),
    (
        "scores in tiles",
        attend(implementation="blockwise", return_scores=True),
        ValueError,
        "implementation='blockwise'.*only the reference.*Use implementation='auto'",
    ),
]

MASKS = [
    ("window 0", lambda: masks.SlidingWindow(0), ValueError, "size.*at least 1.*0"),
    (
        "where text",
        lambda: masks.Where("i > j"),
        TypeError,
        "function. of Where.*i > j",
    ),
    ("window float", lambda: masks.SlidingWindow(1.5), TypeError, "size.*1.5"),
    ("offset text", lambda: masks.Causal("left"), TypeError, "offset.*'left'"),
    ("offset floats", lambda: masks.Causal(floats(2)), TypeError, "offset.*float32"),
    ("prefix below 0", lambda: masks.Prefix(-1), ValueError, "n.*at least 0.*-1"),
    (
        "padding with one axis",
        lambda: masks.Padding(np.ones(7, "bool")),
        ValueError,
        r"valid.*Padding.*2 axes.*\(7,\)",
    ),
    ("padding text", lambda: masks.Padding("x"), TypeError, "valid.*Padding.*'x'"),
    (
        "segments of floats",
        lambda: masks.Segments(np.zeros((2, 5), "float32")),
        TypeError,
        "query_ids.*whole numbers.*float32",
    ),
    (
        "dense with one axis",
        lambda: masks.Dense([True]),
        ValueError,
        r"\(T, S\).*\(1,\)",
    ),
    ("& text", lambda: masks.Causal() & "window", TypeError, "'window'"),
    (
        "a placeholder inside a mask",
        lambda: masks.Padding(keras.Input((7,), dtype="bool")),
        TypeError,
        "valid.*Padding.*KerasTensor.*attention_mask",
    ),
    (
        "a mask that answers nothing",
        mask_attend(masks.Mask),
        NotImplementedError,
        "Mask must implement `allowed",
    ),
    (
        "a mask that answers in another shape",
        mask_attend(WrongShape),
        ValueError,
        r"WrongShape.*broadcast to \(2, 4, 5, 7\).*\(7, 5\)",
    ),
    (
        "offsets of another batch",
        mask_attend(lambda: masks.Causal(np.zeros(3, "int32"))),
        ValueError,
        r"offset.*Causal.*\(2,\).*\(3,\)",
    ),
    (
        "segments of another length",
        mask_attend(lambda: masks.Segments(np.zeros((2, 5), "int32"))),
        ValueError,
        r"key_ids.*Segments.*\(2, 7\).*\(2, 5\)",
    ),
    (
        "wrong inside a composition",
        mask_attend(lambda: masks.Causal() | ~masks.Dense(np.ones((5, 6), "bool"))),
        ValueError,
        r"mask.*\(5, 6\)",
    ),
]

WRONG_NUMBERS = [
    *(
        (
            f"complex {name}",
            call(*inputs),
            TypeError,
            f"^`{name}` must hold floating-point.*integers or booleans.*complex64",
        )
        for name, inputs in (
            ("query", (COMPLEX[:, :5], floats(2, 7, 16))),
            ("value", (floats(2, 5, 16), COMPLEX)),
            ("key", (floats(2, 5, 16), floats(2, 7, 16), COMPLEX)),
        )
    ),
    (
        "a complex memory",
        lambda: built().init_cache(memory=COMPLEX),
        TypeError,
        "^`memory` must hold floating-point.*complex64",
    ),
    (
        "an additive mask of a memory",
        lambda: built().init_cache(
            memory=floats(2, 7, 16), value_mask=np.full((2, 7), -1e9, "float32")
        ),
        ValueError,
        "^`value_mask` must not.*negative",
    ),
    *(
        (
            f"a query of {dtype} for the function",
            attend(query=np.zeros((2, 5, 4, 8), dtype)),
            TypeError,
            f"^`query` must hold floating-point.*{dtype}",
        )
        for dtype in ("int32", "bool", "complex64")
    ),
    (
        "an additive mask",
        call(attention_mask=ADDITIVE),
        ValueError,
        "^`attention_mask` must not.*negative.*`attention_bias`.*float32.*-1e[+]09",
    ),
    (
        "an additive mask that is infinite in float16",
        call(attention_mask=ADDITIVE, layer={"dtype": "mixed_float16"}),
        ValueError,
        "^`attention_mask` must not.*`attention_bias`.*float16.*-inf",
    ),
    (
        "an additive mask of a layer over images",
        call(
            floats(2, 2, 3, 16),
            attention_mask=np.full((2, 3, 2, 3), -1.0, "float32"),
        ),
        ValueError,
        "^`attention_mask` must not.*negative",
    ),
    *(
        (
            f"an additive {name}",
            call(**{name: np.full((2, length), -1e9, "float32")}),
            ValueError,
            f"^`{name}` must not.*negative.*`attention_bias`",
        )
        for name, length in (("query_mask", 5), ("value_mask", 7), ("key_mask", 7))
    ),
    (
        "an additive mask for the function",
        attend(mask=ADDITIVE),
        ValueError,
        "^`mask` must not.*negative.*`bias` of `dot_product_attention`",
    ),
    (
        "an additive mask as an object",
        lambda: masks.Dense(ADDITIVE),
        ValueError,
        "^`values` must not.*negative.*`attention_bias`",
    ),
    (
        "additive padding",
        lambda: masks.Padding(ADDITIVE),
        ValueError,
        "^`valid` must not.*negative.*`attention_bias`",
    ),
]

ALL = CONSTRUCTOR + BUILD + CALL + FUNCTION + MASKS + WRONG_NUMBERS


@pytest.mark.parametrize(
    ("wrong_use", "error", "message"),
    [case[1:] for case in ALL],
    ids=[case[0] for case in ALL],
)
def test_wrong_use_says_what_is_wrong(wrong_use, error, message):
    with pytest.raises(error, match=f"(?s){message}") as caught:
        wrong_use()
    assert_told_at_once(caught.value)


def assert_told_at_once(error):
    """Nothing comes before what is wrong: Keras would put it into a list of all
    arguments."""
    assert "Exception encountered" not in str(error)
    assert "Arguments received" not in str(error)


def symbolic(layer=None, query=(5, 16), value=(7, 12), **shapes_and_dtypes):
    """Calls the layer while a Functional model is made, when no numbers are there."""

    def run():
        arguments = {
            name: keras.Input(shape, dtype=dtype)
            for name, (shape, dtype) in shapes_and_dtypes.items()
        }
        return construct(**(layer or {}))()(
            keras.Input(query), keras.Input(value), **arguments
        )

    return run


@pytest.mark.parametrize(
    ("wrong_use", "message"),
    [
        (symbolic(attention_mask=((5, 6), "bool")), "attention_mask.*5, 6"),
        (symbolic(query_mask=((7,), "bool")), "query_mask.*5.*7"),
        (symbolic(segment_ids=((5,), "int32")), "segment_ids.*pair"),
        (symbolic(attention_bias=((4, 5, 6), "float32")), "attention_bias.*5, 6"),
        (symbolic(value=(7, 3, 12)), "same number of axes"),
        (symbolic(key=((7, 12), "complex64")), "^`key` must hold.*complex64"),
    ],
)
def test_a_functional_model_says_it_while_it_is_made(wrong_use, message):
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}") as caught:
        wrong_use()
    assert_told_at_once(caught.value)


class Block(keras.Model):
    def __init__(self, **arguments):
        super().__init__()
        self.attention = keras_mha.MultiHeadAttention(2, 4, name="attention_3")
        self.arguments = arguments

    def call(self, x):
        return self.attention(x, **self.arguments)


def train(model):
    model.compile("sgd", "mse")
    model.fit(np.zeros((2, 5, 8)), np.zeros((2, 5, 8)), verbose=0)


def in_a_subclass(run):
    return lambda: run(Block(attention_mask=np.ones((9, 9), "bool")))


def in_a_sequence():
    x = floats(2, 5, 8)
    attention = keras_mha.MultiHeadAttention(2, 4, name="attention_3")
    keras.Sequential([keras.layers.Flatten(), attention])(x)


def when_a_model_runs():
    x, mask = keras.Input((None, 8)), keras.Input((None, None), dtype="bool")
    attention = keras_mha.MultiHeadAttention(2, 4, name="attention_3")
    model = keras.Model([x, mask], attention(x, attention_mask=mask))
    model([floats(2, 5, 8), booleans(2, 9, 9)])


def of_a_position():
    keras_mha.RotaryEmbedding(name="attention_3")(floats(2, 5, 8))


@pytest.mark.parametrize(
    "wrong_use",
    [
        in_a_subclass(lambda model: model(floats(2, 5, 8))),
        in_a_subclass(train),
        in_a_sequence,
        when_a_model_runs,
        of_a_position,
    ],
    ids=["subclass", "fit", "sequence", "functional", "position"],
)
def test_models_pass_it_on_and_it_says_which_layer(wrong_use):
    with pytest.raises(ValueError, match=r"^`\w+` must") as caught:
        wrong_use()
    assert_told_at_once(caught.value)
    note = caught.value.__notes__[0]  # JAX may add one of its own
    assert "'attention_3'" in note


def test_without_the_filter_of_tracebacks_it_is_told_alike():
    keras.config.disable_traceback_filtering()
    try:
        with pytest.raises(ValueError, match=r"^`attention_mask` must") as caught:
            Block(attention_mask=np.ones((9, 9), "bool"))(floats(2, 5, 8))
    finally:
        keras.config.enable_traceback_filtering()
    assert "'attention_3'" in caught.value.__notes__[0]


def test_the_errors_of_others_keep_what_keras_says_of_them():
    class Broken(masks.Mask):
        def allowed(self, rows, columns):
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match=r"(?s)encountered.*on purpose.*attention_mas"):
        call(attention_mask=Broken())()


def test_dropout_of_the_function_is_refused_in_a_functional_model():
    x = keras.Input((5, 4, 8))
    with pytest.raises(ValueError, match=r"dropout.*Functional.*MultiHeadAttention"):
        keras_mha.dot_product_attention(x, x, x, dropout=0.1)


def test_a_failed_build_leaves_the_layer_to_be_built_rightly():
    layer = keras_mha.MultiHeadAttention(num_heads=4, key_dim=8)
    with pytest.raises(ValueError, match="same batch size"):
        layer(floats(2, 5, 16), floats(3, 7, 12))
    assert not layer.built
    assert tuple(layer(floats(2, 5, 16), floats(2, 7, 12)).shape) == (2, 5, 16)


def test_a_failed_call_leaves_the_weights_as_they_were():
    layer = keras_mha.MultiHeadAttention(num_heads=4, key_dim=8)
    query, value = floats(2, 5, 16), floats(2, 7, 12)
    before = layer(query, value)
    with pytest.raises(ValueError, match="attention_mask"):
        layer(query, value, attention_mask=booleans(3, 3))
    after = layer(query, value)
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(before), keras.ops.convert_to_numpy(after)
    )
