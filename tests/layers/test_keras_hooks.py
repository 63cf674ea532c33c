"""Subclasses written for Keras's layer, after the import was changed."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import keras_mha

HOOKS = [
    "_masked_softmax",
    "_compute_attention",
    "_compute_attention_mask",
    "_compute_causal_mask",
    "_build_attention",
    "_make_output_dense",
    "_get_common_kwargs_for_sublayer",
]


@pytest.mark.parametrize("hook", HOOKS)
def test_an_overridden_hook_of_keras_is_refused_by_name(hook):
    assert hasattr(keras.layers.MultiHeadAttention, hook)  # as people override it
    with pytest.raises(TypeError, match=rf"`Mine\.{hook}` would never.*Instead, "):
        type("Mine", (keras_mha.MultiHeadAttention,), {hook: lambda self: None})


def test_a_hook_from_a_mixin_counts_too():
    class Mixin:
        def _masked_softmax(self, scores, mask=None):
            return scores

    with pytest.raises(TypeError, match="the method of Mixin"):
        type("Mine", (Mixin, keras_mha.MultiHeadAttention), {})


def test_each_message_says_what_takes_the_place():
    with pytest.raises(TypeError, match=r"`attention_bias=`.*`logit_soft_cap=`"):

        class Mine(keras_mha.MultiHeadAttention):
            def _masked_softmax(self, scores, mask=None):
                return scores


def test_other_methods_are_free():
    class Mine(keras_mha.MultiHeadAttention):
        def call(self, query, *args, **kwargs):
            return 2 * super().call(query, *args, **kwargs)

        def _helper(self):
            return None

    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(1, 3, 4)).astype("float32")
    layer, mine = (
        kind(num_heads=1, key_dim=2) for kind in (keras_mha.MultiHeadAttention, Mine)
    )
    layer.build(x.shape)
    mine.build(x.shape)
    mine.set_weights(layer.get_weights())
    expected = 2 * keras.ops.convert_to_numpy(layer(x))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(mine(x)), expected, atol=1e-6)
