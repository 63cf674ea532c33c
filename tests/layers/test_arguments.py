"""What was checked of a call is remembered, and only what was right."""

import numpy as np
import pytest

import keras_mha
from keras_mha.layers import input_checks
from keras_mha.layers.arguments import Remembered
from tests.helpers import to_tensor


def x(*shape, dtype="float32"):
    return to_tensor(np.ones(shape), dtype)


def test_shapes_are_checked_once(monkeypatch):
    checked, check = [], input_checks.check_feature_widths

    def counted(expected, shapes):
        checked.append(shapes["query"])
        return check(expected, shapes)

    monkeypatch.setattr(input_checks, "check_feature_widths", counted)
    layer = keras_mha.MultiHeadAttention(2, 4)
    for _ in range(3):
        layer(x(2, 5, 8))
    layer(x(2, 6, 8))
    assert checked == [(2, 5, 8), (2, 6, 8)]


def test_a_wrong_call_is_told_each_time():
    layer = keras_mha.MultiHeadAttention(2, 4)
    layer(x(2, 5, 8))
    for _ in range(2):
        with pytest.raises(ValueError, match="`query` must have 8 features"):
            layer(x(2, 5, 7))
        with pytest.raises(ValueError, match="the same batch size"):
            layer(x(2, 5, 8), x(3, 5, 8))


def test_masks_are_checked_beside_shapes_that_are_known():
    layer = keras_mha.MultiHeadAttention(2, 4)
    layer(x(2, 5, 8))
    with pytest.raises(ValueError, match="`attention_mask` must broadcast"):
        layer(x(2, 5, 8), attention_mask=x(2, 4, 5, dtype="bool"))


def test_a_layer_that_is_built_anew_forgets():
    layer = keras_mha.MultiHeadAttention(2, 4)
    layer.build((2, 5, 8))
    layer(x(2, 5, 8))
    other = keras_mha.MultiHeadAttention.from_config(layer.get_config())
    other.build((2, 5, 7))
    with pytest.raises(ValueError, match="`query` must have 7 features"):
        other(x(2, 5, 8))


def test_not_more_is_remembered_than_some(monkeypatch):
    monkeypatch.setattr(Remembered, "MOST", 2)
    remembered, worked_out = Remembered(), []

    def of(length):
        return remembered.of((x(1, length),), lambda: worked_out.append(length) or 1)

    for length in (1, 2, 1, 3, 3, 1):
        of(length)
    assert worked_out == [1, 2, 3, 1]


def test_dtypes_tell_inputs_apart():
    remembered = Remembered()
    assert remembered.of((x(1),), lambda: "float32") == "float32"
    assert remembered.of((x(1, dtype="int32"),), lambda: "int32") == "int32"
    assert remembered.of((x(1), None), lambda: "two") == "two"
