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
from tests.helpers import to_tensor

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
