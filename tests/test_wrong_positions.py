"""Wrong use of positions and of the cache raises early and says what is wrong."""

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import (
    ALiBi,
    MixedRotaryEmbedding,
    RelativePositionBias,
    RotaryEmbedding,
)
from tests.helpers import to_numpy, to_tensor


def floats(*shape):
    return to_tensor(np.random.default_rng(0).normal(size=shape))


def booleans(*shape):
    return to_tensor(np.ones(shape, "bool"))


def integers(*shape):
    return to_tensor(np.zeros(shape, "int32"))


def made(**arguments):
    return keras_mha.MultiHeadAttention(**{"num_heads": 4, "key_dim": 8, **arguments})


def construct(**arguments):
    return lambda: made(**arguments)


def rotary(*inputs, ids=None, **arguments):
    return lambda: RotaryEmbedding(**arguments)(*inputs, position_ids=ids)


def call(*inputs, position=RotaryEmbedding, layer=None, **arguments):
    """Calls a layer that attends from (2, 5, 16) to (2, 7, 12), or as given."""
    inputs = inputs or (floats(2, 5, 16), floats(2, 7, 12))
    return lambda: made(position=position and position(), **(layer or {}))(
        *inputs, **arguments
    )


def scaled(**scaling):
    return lambda: RotaryEmbedding(scaling=scaling)


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    **YARN,
    "rope_type": "llama3",
    "low_freq_factor": 4.0,
    "high_freq_factor": 1.0,
}

# Each line: a name, the wrong use, the error, and what its message must say, in order.
POSITIONS = [
    ("a class", construct(position=RotaryEmbedding), TypeError, "position.*not its cl"),
    ("a name", construct(position="rotary"), TypeError, "position.*Rotary.*'rotary'"),
    ("odd rotary_dim", rotary(rotary_dim=3), ValueError, "rotary_dim.*even.*3"),
    (
        "odd heads",
        construct(key_dim=7, position=RotaryEmbedding()),
        ValueError,
        "rotary_dim.*even.*key_dim.*7",
    ),
    (
        "more rotary_dim than features",
        construct(position=RotaryEmbedding(10)),
        ValueError,
        "rotary_dim.*at most.*rotary_dim=10, width 8",
    ),
    ("no rotary_dim", rotary(rotary_dim=0), ValueError, "rotary_dim.*at least 1.*0"),
    ("rotary_dim float", rotary(rotary_dim=4.0), TypeError, "rotary_dim.*4.0"),
    ("wavelength 1", rotary(max_wavelength=1), ValueError, "max_wavelength.*above 1"),
    ("interleaved text", rotary(interleaved="y"), TypeError, "interleaved.*'y'"),
    ("scaling a number", rotary(scaling=2.0), TypeError, "scaling.*dictionary.*2.0"),
    ("no kind", scaled(factor=2.0), ValueError, "rope_type.*'linear'.*None"),
    ("unknown kind", scaled(rope_type="ntk"), ValueError, "'dynamic'.*'ntk'"),
    ("no factor", scaled(rope_type="linear"), ValueError, r"Missing: \['factor'\]"),
    (
        "unknown key",
        scaled(rope_type="linear", factor=2.0, beta=1),
        ValueError,
        r"Unknown: \['beta'\]",
    ),
    ("factor 0", scaled(rope_type="linear", factor=0), ValueError, "factor.*above 0"),
    ("no length", scaled(rope_type="dynamic", factor=2.0), ValueError, "Missing.*orig"),
    ("llama's bounds", scaled(**LLAMA3), ValueError, "low_freq_factor.*below"),
    ("yarn's truncate", scaled(**YARN, truncate="no"), TypeError, "truncate.*'no'"),
    ("three axes", rotary(floats(2, 5, 8)), ValueError, "inputs.*B, T, N, H.*2, 5, 8"),
    (
        "ids of another length",
        rotary(floats(2, 5, 4, 8), ids=integers(6)),
        ValueError,
        r"position_ids.*\(5,\).*\(2, 5\).*\(6,\)",
    ),
    (
        "whole numbers for heads",
        rotary(integers(2, 5, 4, 8)),
        TypeError,
        "inputs.*floating-point.*int32",
    ),
    ("no heads", lambda: ALiBi()(integers(5)), ValueError, "num_heads.*of ALiBi"),
    ("heads 0", lambda: ALiBi(0), ValueError, "num_heads.*at least 1"),
    (
        "other heads",
        construct(position=ALiBi(8)),
        ValueError,
        "num_heads.*ALiBi.*num_heads=8 and 4",
    ),
    (
        "other heads than the scores'",
        lambda: keras_mha.dot_product_attention(
            *[floats(2, 5, 4, 8)] * 3, position_bias=ALiBi(3).bias()
        ),
        ValueError,
        "ALiBi.*3 heads.*4 heads",
    ),
    (
        "a tensor for a bias object",
        lambda: keras_mha.dot_product_attention(
            *[floats(2, 5, 4, 8)] * 3, position_bias=floats(5, 5)
        ),
        TypeError,
        "position_bias.*`bias`",
    ),
    (
        "positions of a bias object without batch",
        lambda: keras_mha.dot_product_attention(
            *[floats(2, 5, 4, 8)] * 3, position_bias=ALiBi(4).bias(integers(5))
        ),
        ValueError,
        r"positions of the query.*\(2, 5\).*\(5,\)",
    ),
    ("odd buckets", lambda: RelativePositionBias(4, 7), ValueError, "buckets.*even.*7"),
    ("few buckets", lambda: RelativePositionBias(4, 2), ValueError, "buckets.*least 4"),
    (
        "near max_distance",
        lambda: RelativePositionBias(4, 32, 8),
        ValueError,
        "max_distance.*more than.*8.*max_distance=8",
    ),
    (
        "several axes",
        construct(attention_axes=(1, 2), position=ALiBi()),
        ValueError,
        r"position.*one axis.*\(1, 2\)",
    ),
    (
        "several axes of an image",
        call(floats(2, 3, 4, 16)),
        ValueError,
        r"position.*one axis.*attention_axes=\(1, 2\)",
    ),
    (
        "ids of neither side",
        call(position_ids=integers(6)),
        ValueError,
        r"position_ids.*\(5,\) or \(2, 5\).*pair.*\(6,\)",
    ),
    (
        "ids of one side only",
        call(position_ids=integers(2, 5)),
        ValueError,
        r"position_ids.*\(7,\) or \(2, 7\).*pair.*\(2, 5\)",
    ),
    (
        "ids of another batch",
        call(position_ids=(integers(3, 5), integers(7))),
        ValueError,
        r"position_ids.*\(2, 5\).*\(3, 5\)",
    ),
    ("three ids", call(position_ids=(integers(5),) * 3), ValueError, "pair.*3 tensors"),
    ("ids floats", call(position_ids=floats(5)), TypeError, "position_ids.*whole.*flo"),
    ("ids text", call(position_ids="first"), TypeError, "position_ids.*'first'"),
    (
        "ids without position",
        call(position=None, position_ids=integers(5)),
        ValueError,
        "position_ids.*made with `position",
    ),
]


def axial(**arguments):
    return lambda: RotaryEmbedding(**arguments)


def two_axes():
    return RotaryEmbedding(axes=2)


def in_window(*sizes, **arguments):
    return lambda: RelativePositionBias(window=sizes, **arguments)


IMAGES = floats(2, 3, 4, 16)

SEVERAL_AXES = [
    ("axes 0", axial(axes=0), ValueError, "axes.*at least 1.*0"),
    ("axes float", axial(axes=2.0), TypeError, "axes.*integer.*2.0"),
    ("axes True", axial(axes=True), TypeError, "axes.*integer.*True"),
    ("one section", axial(sections=4), TypeError, "sections.*tuple.*sections=4"),
    ("no sections", axial(sections=()), ValueError, "sections.*each of `axes`"),
    ("section 0", axial(sections=(4, 0)), ValueError, "sections.*at least 1.*0"),
    ("sections floats", axial(sections=(4.0, 2)), TypeError, "sections.*4.0"),
    (
        "sections of other axes",
        axial(axes=3, sections=(2, 2)),
        ValueError,
        r"sections.*each of `axes`.*\(2, 2\), axes=3",
    ),
    (
        "sections of another rotary_dim",
        axial(rotary_dim=8, sections=(2, 1)),
        ValueError,
        r"sections.*add up.*rotary_dim.*4.*\(2, 1\), 8 features",
    ),
    (
        "sections of other heads",
        construct(position=RotaryEmbedding(sections=(4, 4))),
        ValueError,
        r"sections.*add up.*key_dim.*4.*\(4, 4\)",
    ),
    (
        "uneven shares",
        construct(position=RotaryEmbedding(axes=3)),
        ValueError,
        r"multiple of 2 \* `axes`.*sections.*axes=3 and 8 features, 4 pairs",
    ),
    (
        "shared_frequencies text",
        axial(axes=2, shared_frequencies="yes"),
        TypeError,
        "shared_frequencies.*'yes'",
    ),
    (
        "alone and without ids",
        rotary(floats(2, 5, 4, 8), axes=2),
        ValueError,
        r"position_ids.*given.*\(5, 2\) or \(2, 5, 2\)",
    ),
    (
        "alone with ids of one axis",
        rotary(floats(2, 5, 4, 8), axes=2, ids=integers(2, 5)),
        ValueError,
        r"position_ids.*\(5, 2\) or \(2, 5, 2\).*\(2, 5\)",
    ),
    (
        "a row without ids",
        call(position=two_axes),
        ValueError,
        r"position_ids.*given.*\(5, 2\).*2 axes.*over 1.*\(2, 5, 16\)",
    ),
    (
        "video for images",
        call(floats(2, 2, 3, 4, 16), position=two_axes),
        ValueError,
        r"position_ids.*given.*\(2, 3, 4, 2\).*2 axes.*over 3",
    ),
    (
        "ids of another grid",
        call(IMAGES, position=two_axes, position_ids=integers(4, 3, 2)),
        ValueError,
        r"position_ids.*\(3, 4, 2\) or \(2, 3, 4, 2\).*\(4, 3, 2\)",
    ),
    (
        "ids of one coordinate",
        call(IMAGES, position=two_axes, position_ids=integers(2, 3, 4)),
        ValueError,
        r"position_ids.*\(3, 4, 2\).*2 axes.*\(2, 3, 4\)",
    ),
    (
        "ids of another batch",
        call(IMAGES, position=two_axes, position_ids=integers(3, 3, 4, 2)),
        ValueError,
        r"position_ids.*\(2, 3, 4, 2\).*\(3, 3, 4, 2\)",
    ),
    (
        "ids of the query for the key's side",
        call(
            IMAGES,
            floats(2, 2, 2, 16),
            position=two_axes,
            position_ids=integers(3, 4, 2),
        ),
        ValueError,
        r"position_ids.*\(2, 2, 2\).*pair.*\(3, 4, 2\)",
    ),
    (
        "three sides",
        call(IMAGES, position=two_axes, position_ids=(integers(3, 4, 2),) * 3),
        ValueError,
        "position_ids.*pair.*3 tensors",
    ),
    (
        "floats for coordinates",
        call(IMAGES, position=two_axes, position_ids=floats(3, 4, 2)),
        TypeError,
        "position_ids.*whole.*float32",
    ),
    (
        "mixed of one axis",
        lambda: MixedRotaryEmbedding(axes=1),
        ValueError,
        "axes.*at least 2.*1",
    ),
    (
        "mixed of other heads",
        construct(position=MixedRotaryEmbedding(3)),
        ValueError,
        "num_heads.*key heads.*num_heads=3 and 4",
    ),
    (
        "mixed of another width",
        lambda: [
            made(key_dim=width, position=position)
            for position in [MixedRotaryEmbedding()]
            for width in (8, 16)
        ],
        ValueError,
        "one width.*16, after 8",
    ),
    (
        "mixed of heads that do not share evenly",
        lambda: MixedRotaryEmbedding(3)(floats(2, 5, 4, 8), integers(5, 2)),
        ValueError,
        r"inputs.*3 heads.*\(2, 5, 4, 8\)",
    ),
    (
        "mixed without coordinates",
        lambda: MixedRotaryEmbedding(4)(floats(2, 5, 4, 8)),
        ValueError,
        r"position_ids.*given.*\(5, 2\)",
    ),
    ("ALiBi of no axes", lambda: ALiBi(4, axes=0), ValueError, "axes.*at least 1"),
    (
        "ALiBi of another distance",
        lambda: ALiBi(4, axes=2, distance="cosine"),
        ValueError,
        "distance.*'manhattan', 'euclidean'.*'cosine'",
    ),
    (
        "ALiBi without coordinates",
        lambda: ALiBi(4, axes=2).bias(),
        ValueError,
        r"Positions.*ALiBi of 2 axes.*\(B, T, 2\)",
    ),
    (
        "ALiBi alone on ids of one axis",
        lambda: ALiBi(4, axes=2)(integers(5)),
        ValueError,
        r"position_ids.*\(None, 2\) or \(None, None, 2\).*\(5,\)",
    ),
    (
        "a bias object's coordinates without batch",
        lambda: keras_mha.dot_product_attention(
            *[floats(2, 5, 4, 8)] * 3,
            position_bias=ALiBi(4, axes=2).bias(integers(5, 2), integers(1, 5, 2)),
        ),
        ValueError,
        r"positions of the query.*\(2, 5, 2\).*\(5, 2\)",
    ),
    (
        "a bias object's coordinates of other axes",
        lambda: keras_mha.dot_product_attention(
            *[floats(2, 5, 4, 8)] * 3,
            position_bias=ALiBi(4, axes=2).bias(*[integers(2, 5, 3)] * 2),
        ),
        ValueError,
        r"positions of the query.*\(2, 5, 2\).*\(2, 5, 3\)",
    ),
    ("window 7", lambda: RelativePositionBias(window=7), TypeError, "window.*7, 7.*=7"),
    ("window of one axis", in_window(7), ValueError, r"window.*two axes.*\(7,\)"),
    ("window of floats", in_window(7.0, 7), TypeError, "window.*integer.*7.0"),
    ("window of nothing", in_window(0, 7), ValueError, "window.*at least 1.*0"),
    (
        "window with buckets",
        in_window(7, 7, num_buckets=16),
        ValueError,
        r"window.*buckets.*by default.*\(7, 7\).*'num_buckets': 16",
    ),
    (
        "an image beyond the window",
        call(IMAGES, position=in_window(3, 3)),
        ValueError,
        r"query.*at most.*window.*\(3, 3\).*\(2, 3, 4, 16\), \(3, 4\)",
    ),
    (
        "keys beyond the window",
        call(floats(2, 3, 3, 16), IMAGES, position=in_window(3, 3)),
        ValueError,
        r"value.*at most.*window.*\(3, 3\).*\(2, 3, 4",
    ),
    (
        "a row that is not the window",
        call(floats(2, 10, 16), position=in_window(3, 3)),
        ValueError,
        r"position_ids.*given.*\(10, 2\).*\(2, 10, 16\)",
    ),
    (
        "a window over three axes, as long as the first of two",
        call(floats(2, 8, 3, 16), position=in_window(2, 2, 2)),
        ValueError,
        r"position_ids.*given.*3 axes.*over 2",
    ),
    (
        "a window over three axes",
        call(IMAGES, position=in_window(3, 4, 2)),
        ValueError,
        r"position_ids.*given.*3 axes.*over 2",
    ),
    (
        "a cache",
        lambda: made(position=two_axes()).init_cache(2, 9),
        ValueError,
        "cache.*one axis.*position of 2 axes",
    ),
    (
        "a cache of another layer",
        call(
            floats(2, 5, 16),
            position=two_axes,
            position_ids=integers(5, 2),
            cache=made().init_cache(2, 9),
        ),
        ValueError,
        "cache.*one axis.*position of 2 axes",
    ),
]


def with_cache(
    *inputs, layer=None, cache=None, batch_size=2, max_length=9, change=None, **call
):
    """Calls a layer with a cache, made as given and then changed."""

    def run():
        attention = made(**(layer or {}))
        given = cache
        if given is None:
            given = attention.init_cache(batch_size, max_length)
        given = {**given, **(change or {})} if isinstance(given, dict) else given
        return attention(*(inputs or (floats(2, 5, 16),)), cache=given, **call)

    return run


def init_cache(*arguments, layer=None, built=False, **keywords):
    def run():
        attention = made(**(layer or {}))
        if built:
            attention.build((None, None, 16), (None, None, 12))
        return attention.init_cache(*arguments, **keywords)

    return run


def with_memory(**arguments):
    def run():
        layer = made()
        layer.build((None, None, 16), (None, None, 12))
        return layer(
            floats(2, 5, 16),
            cache=layer.init_cache(memory=floats(2, 7, 12)),
            **arguments,
        )

    return run


WINDOW = {"sliding_window": 4}
CACHE = [
    ("training", with_cache(training=True), ValueError, "cache.*training=True"),
    (
        "another batch",
        with_cache(batch_size=3),
        ValueError,
        r"cache\['key'\].*\(2, 9, 4, 8\).*\(3, 9, 4, 8\)",
    ),
    (
        "other heads",
        with_cache(layer={"num_key_value_heads": 2}, cache=made().init_cache(2, 9)),
        ValueError,
        r"cache\['key'\].*\(2, 9, 2, 8\).*\(2, 9, 4, 8\)",
    ),
    (
        "another width",
        with_cache(cache=made(value_dim=5).init_cache(2, 9)),
        ValueError,
        r"cache\['value'\].*\(2, 9, 4, 8\).*\(2, 9, 4, 5\)",
    ),
    (
        "whole numbers",
        with_cache(change={"key": integers(2, 9, 4, 8)}),
        TypeError,
        r"cache\['key'\].*floating-point.*int32",
    ),
    (
        "length a float",
        with_cache(change={"length": floats(2)}),
        TypeError,
        r"cache\['length'\].*int32.*float32",
    ),
    (
        "one length for all",
        with_cache(change={"length": integers(1)}),
        ValueError,
        r"cache\['length'\].*\(2,\).*\(1,\)",
    ),
    ("a tuple", with_cache(cache=(floats(2), floats(2))), ValueError, "cache.*tuple"),
    (
        "no value",
        with_cache(cache={"key": floats(2, 9, 4, 8)}),
        ValueError,
        r"cache.*'key', 'length', 'value'.*\['key'\]",
    ),
    (
        "longer than the cache",
        with_cache(max_length=4),
        ValueError,
        "cache.*max_length=4 positions.*5",
    ),
    (
        "a memory as value",
        with_cache(floats(2, 5, 16), floats(2, 7, 12)),
        ValueError,
        r"cache.*value.*as long as.*memory.*\(2, 7, 12\)",
    ),
    (
        "segments",
        with_cache(segment_ids=integers(2, 5)),
        ValueError,
        "segment_ids.*cache",
    ),
    (
        "images",
        with_cache(floats(2, 3, 4, 16), layer={"attention_axes": 1}),
        ValueError,
        r"cache.*one axis of positions.*\(2, 3, 4, 16\)",
    ),
    (
        "mask of a ring",
        with_cache(layer=WINDOW, attention_mask=booleans(5, 4)),
        ValueError,
        "attention_mask.*sliding_window",
    ),
    (
        "bias of a ring",
        with_cache(layer=WINDOW, attention_bias=floats(5, 4)),
        ValueError,
        "attention_bias.*sliding_window",
    ),
    (
        "mask of the tokens only",
        with_cache(attention_mask=booleans(5, 5)),
        ValueError,
        r"attention_mask.*\(2, 4, 5, 9\).*\(5, 5\)",
    ),
    (
        "a mask object",
        with_cache(attention_mask=keras_mha.masks.Prefix(2)),
        ValueError,
        "attention_mask.*booleans.*slot.*Prefix",
    ),
    (
        "ids beside ALiBi",
        with_cache(layer={"position": ALiBi()}, position_ids=integers(5)),
        ValueError,
        "position_ids.*cache.*counted",
    ),
    (
        "a pair of ids",
        with_cache(
            layer={"position": RotaryEmbedding()},
            position_ids=(integers(5), integers(5)),
        ),
        ValueError,
        "position_ids.*one tensor.*2 tensors",
    ),
    (
        "linear memory and scores",
        with_cache(layer={"flash_attention": True}, return_attention_scores=True),
        ValueError,
        "return_attention_scores.*flash_attention",
    ),
    (
        "a memory twice",
        with_memory(value=floats(2, 7, 12)),
        ValueError,
        "memory.*value",
    ),
    (
        "a memory's mask too late",
        with_memory(value_mask=booleans(2, 7)),
        ValueError,
        "memory.*init_cache.*value_mask",
    ),
    (
        "before and after in a memory",
        with_memory(use_causal_mask=True),
        ValueError,
        "use_causal_mask.*memory.*use_causal_mask=True",
    ),
    (
        "a window over a memory",
        init_cache(layer=WINDOW, memory=floats(2, 7, 12), built=True),
        ValueError,
        "memory.*sliding_window=4",
    ),
    ("no batch size", init_cache(), TypeError, "batch_size.*integer.*None"),
    ("no length", init_cache(2), TypeError, "max_length.*integer.*None"),
    ("length 0", init_cache(2, 0), ValueError, "max_length.*at least 1.*0"),
    ("dtype int", init_cache(2, 9, "int8"), TypeError, "dtype.*floating-point.*int8"),
    ("dtype text", init_cache(2, 9, "half"), (TypeError, ValueError), "half"),
    (
        "a memory of an unbuilt layer",
        init_cache(memory=floats(2, 7, 12)),
        ValueError,
        "memory.*built",
    ),
    (
        "both kinds",
        init_cache(2, memory=floats(2, 7, 12), built=True),
        ValueError,
        "memory.*batch_size=2",
    ),
    (
        "a memory of another width",
        init_cache(memory=floats(2, 7, 16), built=True),
        ValueError,
        r"value.*12 features.*\(2, 7, 16\)",
    ),
    (
        "a memory of three",
        init_cache(memory=(floats(2, 7, 12),) * 3, built=True),
        ValueError,
        "memory.*pair.*3 tensors",
    ),
    (
        "key and value of other lengths",
        init_cache(memory=(floats(2, 7, 12), floats(2, 6, 12)), built=True),
        ValueError,
        r"value.*key.*\(2, 7, 12\).*\(2, 6, 12\)",
    ),
    (
        "a mask of another length",
        init_cache(memory=floats(2, 7, 12), value_mask=booleans(2, 6), built=True),
        ValueError,
        r"value_mask.*\(2, 7\).*\(2, 6\)",
    ),
    (
        "a mask without a memory",
        init_cache(2, 9, value_mask=booleans(2, 9)),
        ValueError,
        "value_mask.*memory",
    ),
]


@pytest.mark.parametrize(
    ("wrong_use", "error", "message"),
    [pytest.param(*line[1:], id=line[0]) for line in POSITIONS + SEVERAL_AXES + CACHE],
)
def test_wrong_use_says_what_is_wrong(wrong_use, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        wrong_use()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_ids": ((6,), "int32")}, r"position_ids.*\(None, 6\)"),
        ({"position_ids": ((5,), "float32")}, "position_ids.*whole.*float32"),
        (
            {"value": ((7, 16), "float32"), "position_ids": ((5,), "int32")},
            r"position_ids.*\(None, 7\).*pair",
        ),
    ],
)
def test_a_functional_model_says_it_while_it_is_made(arguments, message):
    inputs = {
        name: keras.Input(shape, dtype=dtype)
        for name, (shape, dtype) in arguments.items()
    }
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        made(position=RotaryEmbedding())(keras.Input((5, 16)), **inputs)


@pytest.mark.parametrize("ids", [None, (5, 3)])
def test_a_functional_model_says_what_coordinates_it_lacks(ids):
    given = {} if ids is None else {"position_ids": keras.Input(ids, dtype="int32")}
    with pytest.raises(ValueError, match=r"position_ids.*\(5, 2\)"):
        made(position=two_axes())(keras.Input((5, 16)), **given)


@pytest.mark.skipif(
    keras.__version__.startswith("3.7"),
    reason="Keras 3.7 fails first",
)
def test_a_cache_without_a_tensor_is_refused():
    with pytest.raises(TypeError, match=r"cache\['key'\].*tensor.*None"):
        with_cache(change={"key": None})()


def test_a_cache_of_an_unknown_number_of_slots_is_refused():
    layer = made()
    cache = {
        "key": keras.Input((None, 4, 8)),
        "value": keras.Input((None, 4, 8)),
        "length": keras.Input((), dtype="int32"),
    }
    with pytest.raises(ValueError, match=r"cache.*known number of slots.*None"):
        layer(keras.Input((5, 16)), cache=cache)


def test_a_bias_that_lacked_its_heads_can_still_be_given_to_a_layer():
    position = RelativePositionBias()
    with pytest.raises(ValueError, match=r"num_heads.*RelativePositionBias"):
        position(integers(5))
    layer = made(position=position)
    assert tuple(layer(floats(2, 5, 16)).shape) == (2, 5, 16)


def test_a_bias_object_is_refused_in_a_functional_model():
    x = keras.Input((5, 4, 8))
    with pytest.raises(ValueError, match=r"position_bias.*Functional"):
        keras_mha.dot_product_attention(x, x, x, position_bias=ALiBi(4).bias())


def test_a_refused_call_leaves_the_cache_to_be_used_rightly():
    layer = made(position=RotaryEmbedding())
    x = floats(2, 5, 16)
    cache = layer.init_cache(2, 9)
    expected, _ = layer(x, cache=cache, use_causal_mask=True)
    with pytest.raises(ValueError, match="training"):
        layer(x, cache=cache, use_causal_mask=True, training=True)
    found, _ = layer(x, cache=cache, use_causal_mask=True)
    np.testing.assert_array_equal(to_numpy(found), to_numpy(expected))
