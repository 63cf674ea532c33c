"""Lengths are numbers where they are known, and what a graph works out where not."""

import keras
import numpy as np
from keras import ops

import keras_mha
from keras_mha._lengths import shape_of
from tests.helpers import only_tensorflow, to_tensor


def test_a_known_shape_is_one_of_numbers():
    shape = shape_of(to_tensor(np.zeros((2, 0, 3))))
    assert shape == (2, 0, 3)
    assert all(type(length) is int for length in shape)
    assert shape_of(to_tensor(np.zeros(()))) == ()


@only_tensorflow
def test_of_an_unknown_length_it_has_what_the_graph_will_find():
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec((None, 3))])
    def function(x):
        length, width = shape_of(x)
        assert width == 3
        return length * 2

    assert int(function(tf.zeros((5, 3)))) == 10


@only_tensorflow
def test_eagerly_no_operation_asks_for_a_shape(monkeypatch):
    """Each would take as long as one that computes."""
    import tensorflow as tf

    layer = keras_mha.MultiHeadAttention(2, 4)
    embedding = keras.layers.Embedding(5, 8, mask_zero=True)
    x = embedding(np.array([[1, 2, 0], [3, 0, 0]]))
    expected = layer(x)
    asked, shape = [], tf.shape
    monkeypatch.setattr(tf, "shape", lambda *a, **k: asked.append(a) or shape(*a, **k))
    found = layer(x)
    assert not asked
    assert ops.all(found == expected)
