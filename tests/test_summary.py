"""`attention_summary`: numbers that say what a head does."""

import io

import keras
import numpy as np
import pytest
import rich.console
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_mha
from keras_mha import attention_summary
from tests import oracle
from tests.helpers import to_tensor
from tests.layers.test_multi_head_attention_numbers import weights_of

NUMBERS = ("entropy", "distance", "first_token", "diagonal")


def weights(seed, *shape):
    logits = np.random.default_rng(seed).normal(size=shape) * 3
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(-1, keepdims=True)


def by_hand(scores):
    """The definition, a query at a time, for scores of shape (B, N, T, S)."""
    found = {name: [] for name in NUMBERS}
    for head in range(scores.shape[1]):
        rows = {name: [] for name in NUMBERS}
        for b in range(scores.shape[0]):
            for i, row in enumerate(scores[b, head]):
                if row.sum() == 0:
                    continue
                share = row / row.sum()
                rows["entropy"].append(sum(-p * np.log(p) for p in share if p > 0))
                rows["distance"].append(
                    sum(p * abs(i - j) for j, p in enumerate(share))
                )
                rows["first_token"].append(row[0])
                rows["diagonal"].append(row[i] if i < len(row) else 0)
        for name in NUMBERS:
            found[name].append(np.mean(rows[name]) if rows[name] else np.nan)
    return found


def assert_like_by_hand(summary, scores):
    for name, expected in by_hand(scores).items():
        np.testing.assert_allclose(getattr(summary, name), expected, atol=1e-6)


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*(st.integers(1, n) for n in (3, 4, 6, 6))),
    st.floats(0.1, 1.0),
    st.data(),
)
def test_numbers_are_those_of_the_definition(seed, shape, total, data):
    scores = weights(seed, *shape) * total  # less than 1 in all, as with a sink
    scores[
        data.draw(st.integers(0, shape[0] - 1)), :, : data.draw(st.integers(0, 2))
    ] = 0
    summary = attention_summary(scores)
    assert_like_by_hand(summary, scores)
    assert list(summary.head) == list(range(shape[1]))
    assert list(summary.layer) == [""] * shape[1]


class TestHeadsThatAreKnown:
    def test_an_even_one(self):
        summary = attention_summary(np.full((5, 8), 1 / 8))
        assert summary.entropy[0] == pytest.approx(np.log(8))
        assert summary.first_token[0] == summary.diagonal[0] == 1 / 8

    def test_one_that_looks_at_its_own_token(self):
        summary = attention_summary(np.eye(6))
        assert summary.diagonal[0] == 1
        assert summary.entropy[0] == summary.distance[0] == 0

    def test_one_that_looks_at_the_token_before(self):
        summary = attention_summary(np.eye(6, k=-1)[1:], query_rows=range(1, 6))
        assert summary.distance[0] == 1
        assert summary.diagonal[0] == 0

    def test_a_sink(self):
        scores = np.zeros((3, 7, 7))
        scores[:, :, 0] = 1
        assert (attention_summary(scores).first_token == 1).all()

    def test_one_without_a_query(self):
        summary = attention_summary(np.zeros((1, 2, 4, 4)))
        assert all(np.isnan(getattr(summary, name)).all() for name in NUMBERS)


def test_of_a_model():
    inputs = keras.Input((6, 8))
    x = keras_mha.MultiHeadAttention(2, 4, name="first")(inputs)
    x = keras_mha.MultiHeadAttention(3, 4, name="second")(x)
    model = keras.Model(inputs, x)
    x = np.random.default_rng(0).normal(size=(2, 6, 8)).astype("float32")
    maps = keras_mha.attention_maps(model, x)
    summary = attention_summary(maps)
    assert list(summary.layer) == ["first"] * 2 + ["second"] * 3
    assert list(summary.head) == [0, 1, 0, 1, 2]
    for layer, scores in maps.items():
        part = attention_summary(scores)
        for name in NUMBERS:
            whole = getattr(summary, name)[summary.layer == layer]
            np.testing.assert_array_equal(getattr(part, name), whole)


X = np.random.default_rng(4).normal(size=(2, 6, 8)).astype("float32")
VALID = np.arange(6) < np.array([[4], [6]])
BIAS = np.random.default_rng(5).normal(size=(4, 6, 6)).astype("float32")
# What a layer is made with, what it is called with, and both for the definition.
MODELS = {
    "plain": ({}, {}, {}),
    "causal": ({}, {"use_causal_mask": True}, {}),
    "padding": ({"sliding_window": 2}, {"query_mask": VALID, "value_mask": VALID}, {}),
    "grouped heads": ({"num_key_value_heads": 2, "qk_norm": "rms"}, {}, {}),
    "soft cap": ({"logit_soft_cap": 0.5, "attention_sink": "learned"}, {}, {}),
    "bias": ({}, {"attention_bias": BIAS, "use_causal_mask": True}, {}),
    "ALiBi": (
        {"position": keras_mha.ALiBi},
        {"use_causal_mask": True},
        {"position": {"kind": "alibi"}},
    ),
    "rotary": (
        {"position": keras_mha.RotaryEmbedding},
        {},
        {"position": {"kind": "rotary"}},
    ),
    "talking heads": ({"talking_heads": "pre", "logit_soft_cap": 2.0}, {}, {}),
    "learned keys": (
        {"num_memory_key_values": 2, "logit_soft_cap": 0.5, "use_gate": True},
        {"use_causal_mask": True},
        {},
    ),
}


def layer_of(config):
    position = config.get("position", lambda: None)()
    layer = keras_mha.MultiHeadAttention(4, 4, **{**config, "position": position})
    layer.build((2, 6, 8))
    draws = np.random.default_rng(6)
    layer.set_weights([draws.normal(size=w.shape) for w in layer.get_weights()])
    return layer


def largest_by_definition(monkeypatch, layer, config, call):
    """The largest products and logits, by what the definition softens into weights."""
    seen = []
    attend = oracle.dot_product_attention

    def watch(query, key, value, *, mask, bias, logit_soft_cap, talking_heads, **rest):
        groups = query.shape[2] // key.shape[2]
        key_of_head = np.repeat(key, groups, axis=2)
        products = rest["scale"] * np.einsum("btnh,bsnh->bnts", query, key_of_head)
        cap = logit_soft_cap
        logits = np.stack([oracle.mixed(row, talking_heads[0]) for row in products])
        logits = logits if cap is None else cap * np.tanh(logits / cap)
        logits = logits if bias is None else logits + bias
        for x in (products, logits):
            seen.append(np.where(mask, x, -np.inf).max(axis=(0, 2, 3)))
        rest |= {"logit_soft_cap": cap, "talking_heads": talking_heads}
        return attend(query, key, value, mask=mask, bias=bias, **rest)

    monkeypatch.setattr(oracle, "dot_product_attention", watch)
    oracle.multi_head_attention(weights_of(layer), config, X, **call)
    return seen


@pytest.mark.parametrize("at_once", [1, 2 * 4 * 8 * 4, 2**20])
@pytest.mark.parametrize("name", MODELS)
def test_of_a_layers_call_without_its_scores(name, at_once, monkeypatch):
    config, call, by_definition = MODELS[name]
    layer = layer_of(config)
    monkeypatch.setattr("keras_mha.summary._AT_ONCE", at_once)
    summary = attention_summary(layer, X, **call)
    expected = attention_summary(keras_mha.attention_maps(layer, X, **call))
    assert list(summary.layer) == [layer.path] * 4
    assert list(summary.head) == [0, 1, 2, 3]
    for number in NUMBERS:
        found = getattr(summary, number)
        np.testing.assert_allclose(found, getattr(expected, number), atol=1e-5)
    assert np.isnan(expected.largest_logit).all()  # weights do not tell
    products, logits = largest_by_definition(
        monkeypatch, layer, {**config, **by_definition}, call
    )
    np.testing.assert_allclose(summary.largest_product, products, rtol=1e-5)
    np.testing.assert_allclose(summary.largest_logit, logits, rtol=1e-5)


def test_of_heads_that_talk_after_softmax_before_they_do():
    """What is mixed is no distribution: it may be negative."""
    layer = layer_of({"talking_heads": "post"})
    summary = attention_summary(layer, X)
    layer.talking_heads_post.assign(np.eye(4))
    expected = attention_summary(keras_mha.attention_maps(layer, X))
    for number in NUMBERS:
        found = getattr(summary, number)
        np.testing.assert_allclose(found, getattr(expected, number), atol=1e-5)


def test_of_a_call_with_a_cache():
    layer = layer_of({})
    cache = layer.init_cache(2, 9)
    summary = attention_summary(layer, X, cache=cache, use_causal_mask=True)
    expected = attention_summary(layer, X, use_causal_mask=True)
    for name in (*NUMBERS, "largest_product", "largest_logit"):
        found = getattr(summary, name)
        np.testing.assert_allclose(found, getattr(expected, name), rtol=1e-5)


def test_of_chosen_layers_heads_and_rows_of_a_model():
    inputs = keras.Input((6, 8))
    x = keras_mha.MultiHeadAttention(2, 4, name="first")(inputs)
    model = keras.Model(inputs, keras_mha.MultiHeadAttention(3, 4, name="last")(x))
    wishes = {"layers": "last", "heads": [2, 0], "query_rows": [5, 1]}
    summary = attention_summary(model, X, **wishes)
    scores = keras_mha.attention_maps(model, X, **wishes)["last"]
    expected = attention_summary(scores, heads=[2, 0], query_rows=[5, 1])
    assert list(summary.layer) == ["last", "last"]
    for name in ("head", *NUMBERS):
        found = getattr(summary, name)
        np.testing.assert_allclose(found, getattr(expected, name), atol=1e-6)


@pytest.mark.parametrize("learned", [None, 2])
def test_of_rows_of_a_masked_call_with_gaps_between_them(learned):
    layer = layer_of({"num_memory_key_values": learned})
    call = {"use_causal_mask": True}
    # One at a time they are no rows of one tile.
    each = [attention_summary(layer, X, query_rows=[row], **call) for row in (0, 3, 4)]
    summary = attention_summary(layer, X, query_rows=[0, 3, 4], **call)
    for name in ("largest_product", "largest_logit"):
        expected = np.max([getattr(x, name) for x in each], axis=0)
        np.testing.assert_allclose(getattr(summary, name), expected, rtol=1e-5)
    expected = np.mean([x.entropy for x in each], axis=0)
    np.testing.assert_allclose(summary.entropy, expected, rtol=1e-5)


def test_a_head_that_sees_nothing_has_no_numbers():
    layer = layer_of({})
    nothing = np.zeros((6, 6), dtype=bool)
    summary = attention_summary(layer, X, attention_mask=nothing)
    for name in (*NUMBERS, "largest_product", "largest_logit"):
        assert np.isnan(getattr(summary, name)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_of_a_tensor(dtype):
    scores = weights(1, 2, 3, 4, 4)
    summary = attention_summary(to_tensor(scores, dtype))
    expected = attention_summary(scores)
    for name in NUMBERS:
        found = getattr(summary, name)
        np.testing.assert_allclose(found, getattr(expected, name), rtol=2e-2)


def test_of_chosen_rows():
    scores = weights(2, 1, 2, 6, 6)
    expected = attention_summary(scores[:, :, [1, 4]], query_rows=[1, 4])
    distances = abs(np.array([[1], [4]]) - np.arange(6))
    by_rows = (scores[0][:, [1, 4]] * distances).sum(-1).mean(-1)
    np.testing.assert_allclose(expected.distance, by_rows)


def test_of_chosen_heads():
    scores = weights(2, 1, 2, 6, 6)
    assert list(attention_summary(scores, heads=[5, 3]).head) == [5, 3]
    assert list(attention_summary(scores[:, :1], heads=-1).head) == [-1]
    with pytest.raises(ValueError, match=r"`heads` must be as many .*, 2.*: 1"):
        attention_summary(scores, heads=3)


class TestTable:
    def shown(self, summary):
        file = io.StringIO()
        rich.console.Console(file=file, width=100).print(summary)
        return file.getvalue()

    def test_has_a_row_for_each_head_and_names_each_layer_once(self):
        scores = weights(3, 1, 2, 5, 5)
        summary = attention_summary({"model/first": scores, "model/second": scores})
        text = self.shown(summary)
        assert text.count("model/first") == text.count("model/second") == 1
        assert summary.table().row_count == 4
        assert f"{summary.entropy[1]:.2f}" in text
        assert f"{summary.diagonal[0]:.1%}" in text

    def test_shows_the_largest_logits_of_a_model(self):
        summary = attention_summary(layer_of({"logit_soft_cap": 0.5}), X)
        text = self.shown(summary)
        headers = [column.header for column in summary.table().columns]
        assert headers[-2:] == ["largest product", "largest logit"]
        assert f"{summary.largest_product[0]:.2f}" in text
        assert f"{summary.largest_logit[0]:.2f}" in text

    def test_has_no_column_of_layers_that_have_no_names(self):
        table = attention_summary(weights(3, 2, 5, 5)).table()
        assert [column.header for column in table.columns] == [
            "head",
            "entropy",
            "distance",
            "first token",
            "diagonal",
        ]


class TestWrongUse:
    @pytest.mark.parametrize("name", ["inputs", "layers", "use_causal_mask"])
    def test_what_belongs_to_a_model(self, name):
        with pytest.raises(TypeError, match=rf"`{name}` belongs to a model.*ndarray"):
            attention_summary(np.eye(4), **{name: True})

    def test_scores(self):
        with pytest.raises(ValueError, match=r"`scores` must have the shape.*\(5,\)"):
            attention_summary(np.ones(5))
        with pytest.raises(ValueError, match="`scores` must be attention weights"):
            attention_summary(np.array([[0.5, -0.5]]))
        with pytest.raises(ValueError, match="`scores` must be attention weights"):
            attention_summary(np.array([[0.5, np.nan]]))
        with pytest.raises(ValueError, match="`scores` must be attention weights"):
            attention_summary(np.array([[0.5, np.inf]]))
        with pytest.raises(TypeError, match="`scores` must be numbers"):
            attention_summary(np.array([["a", "b"]]))

    def test_query_rows(self):
        scores = np.eye(4)
        with pytest.raises(
            ValueError, match=r"`query_rows` must be as many .*, 4.*: 2"
        ):
            attention_summary(scores, query_rows=[0, 1])
        with pytest.raises(ValueError, match=r"`query_rows` must be .*at least 0"):
            attention_summary(scores, query_rows=[0, 1, 2, -1])
