"""What popular tutorials' layers get wrong, and how this one behaves instead.

The letters are the tutorials': A is written for TensorFlow, B, C and E for PyTorch, D
is a text whose code breaks off.
"""

import keras
import numpy as np
import pytest

import keras_mha
from tests.helpers import to_numpy, to_tensor

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


def identity_layer(width):
    """One head whose projections change nothing."""
    layer = keras_mha.MultiHeadAttention(num_heads=1, key_dim=width, use_bias=False)
    layer.build((None, None, width))
    eye = np.eye(width, dtype="float32")
    layer.set_weights([eye[:, None], eye[:, None], eye[:, None], eye[None]])
    return layer


class TestA:
    def layer(self, num_heads=2, d_model=16, d_k=8, d_v=8, dropout_rate=0.1):
        return keras_mha.MultiHeadAttention(
            num_heads,
            key_dim=d_k,
            value_dim=d_v,
            output_shape=d_model,
            dropout=dropout_rate,
        )

    def test_the_number_of_heads_is_used(self):
        layer = self.layer(num_heads=2)
        _, scores = layer(to_tensor(normal(2, 5, 16)), return_attention_scores=True)
        first, second = to_numpy(scores)[:, 0], to_numpy(scores)[:, 1]
        assert np.abs(first - second).max() > 1e-3

    def test_scores_are_divided_by_the_root_of_the_heads_width(self):
        x = normal(1, 4, 9)
        _, scores = identity_layer(9)(to_tensor(x), return_attention_scores=True)
        logits = x[0] @ x[0].T / 3
        expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(to_numpy(scores)[0, 0], expected, atol=1e-6)

    def test_batch_and_time_stay_apart(self):
        assert tuple(self.layer()(to_tensor(normal(2, 5, 16))).shape) == (2, 5, 16)
        assert self.layer()(keras.Input((5, 16))).shape == (None, 5, 16)

    def test_the_papers_value_width_runs(self):
        layer = self.layer(num_heads=4, d_model=16, d_k=4, d_v=4)
        assert tuple(layer(to_tensor(normal(2, 5, 16))).shape) == (2, 5, 16)

    def test_a_saved_model_loads(self, tmp_path):
        inputs = keras.Input((5, 16))
        model = keras.Model(inputs, self.layer()(inputs))
        model.save(tmp_path / "model.keras")
        revived = keras.saving.load_model(tmp_path / "model.keras")
        x = to_tensor(normal(2, 5, 16))
        np.testing.assert_allclose(to_numpy(revived(x)), to_numpy(model(x)), atol=1e-6)


class TestB:
    def test_its_example_runs(self):
        layer = keras_mha.MultiHeadAttention(num_heads=8, key_dim=64)
        q, k, v = normal(2, 4, 512), normal(2, 6, 512), normal(2, 6, 512)
        assert tuple(layer(*map(to_tensor, (q, v, k))).shape) == (2, 4, 512)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_a_mask_works_in_every_dtype(self, dtype):
        layer = keras_mha.MultiHeadAttention(num_heads=2, key_dim=4, dtype=dtype)
        mask = np.array([[True, False, True], [False] * 3, [True] * 3])
        _, scores = layer(
            to_tensor(normal(1, 3, 8)),
            attention_mask=mask,
            return_attention_scores=True,
        )
        scores = to_numpy(scores)[0]
        assert (scores[:, ~mask] == 0).all()
        np.testing.assert_allclose(scores.sum(-1), [[1, 0, 1]] * 2, atol=1e-2)

    def test_a_mask_that_does_not_fit_says_so(self):
        layer = keras_mha.MultiHeadAttention(num_heads=2, key_dim=4)
        mask = np.ones((1, 2, 2), "bool")
        with pytest.raises(ValueError, match="attention_mask"):
            layer(to_tensor(normal(1, 3, 8)), attention_mask=mask)


class TestC:
    EMBEDDINGS = np.array([[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]]])
    WEIGHTS = np.array(
        [
            [0.2994, 0.3321, 0.3685],
            [0.2514, 0.3260, 0.4227],
            [0.2078, 0.3149, 0.4773],
        ]
    )

    def test_the_worked_examples_true_weights(self):
        x = to_tensor(self.EMBEDDINGS)
        _, scores = identity_layer(3)(x, return_attention_scores=True)
        np.testing.assert_allclose(to_numpy(scores)[0, 0], self.WEIGHTS, atol=1e-4)

    def test_with_one_hot_values_the_outputs_are_the_weights(self):
        x, values = to_tensor(self.EMBEDDINGS), to_tensor(np.eye(3)[None])
        output = identity_layer(3)(x, values, x)
        np.testing.assert_allclose(to_numpy(output)[0], self.WEIGHTS, atol=1e-4)

    def test_the_output_has_a_row_for_each_token_and_not_for_each_head(self):
        layer = keras_mha.MultiHeadAttention(num_heads=2, key_dim=2)
        assert tuple(layer(to_tensor(normal(2, 3, 4))).shape) == (2, 3, 4)

    def test_every_head_sees_the_whole_sequence(self):
        layer = keras_mha.MultiHeadAttention(num_heads=2, key_dim=2)
        x = to_tensor(normal(2, 3, 4))
        _, scores = layer(x, return_attention_scores=True)
        assert tuple(scores.shape) == (2, 2, 3, 3)
        assert (to_numpy(scores) > 0).all()

    def test_more_heads_of_less_width_have_as_many_weights(self):
        def count(heads):
            layer = keras_mha.MultiHeadAttention(heads, key_dim=16 // heads)
            layer.build((None, None, 16))
            return layer.count_params()

        assert count(1) == count(4) == count(16)


class TestD:
    def test_cosine_similarity_does_not_see_the_length_of_a_vector(self):
        layer = keras_mha.MultiHeadAttention(
            num_heads=2, key_dim=4, qk_norm="l2", use_bias=False
        )
        x, value = normal(1, 5, 8), to_tensor(normal(1, 5, 8))
        layer.build(x.shape)
        short, long = (
            to_numpy(layer(to_tensor(scale * x), value, to_tensor(scale * x)))
            for scale in (1.0, 7.0)
        )
        np.testing.assert_allclose(long, short, atol=1e-5)


class TestE:
    EMBED_SIZE, HEADS = 12, 3
    WIDTH = EMBED_SIZE // HEADS

    def its_layer(self, x, shared, output, mask):
        """One matrix each for q, k and v, shared by the heads; float64."""
        heads = x.reshape(*x.shape[:2], self.HEADS, self.WIDTH)
        q, k, v = (heads @ matrix for matrix in shared)
        energy = np.einsum("bqhd,bkhd->bhqk", q, k)
        energy = np.where(mask, energy, -1e20) / np.sqrt(self.EMBED_SIZE)
        weights = np.exp(energy - energy.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        result = np.einsum("bhqk,bkhd->bqhd", weights, v)
        return result.reshape(x.shape) @ output

    def our_kernel(self, shared):
        """Each head's block reads its own features and has the shared matrix."""
        kernel = np.zeros((self.EMBED_SIZE, self.HEADS, self.WIDTH))
        for head in range(self.HEADS):
            rows = slice(head * self.WIDTH, (head + 1) * self.WIDTH)
            kernel[rows, head] = shared
        return kernel

    def test_its_numbers_are_reproduced_when_asked_for(self):
        shared = [normal(self.WIDTH, self.WIDTH) for _ in range(3)]
        output = normal(self.EMBED_SIZE, self.EMBED_SIZE)
        layer = keras_mha.MultiHeadAttention(
            self.HEADS, self.WIDTH, use_bias=False, scale=self.EMBED_SIZE**-0.5
        )
        x, mask = normal(2, 5, self.EMBED_SIZE), np.tril(np.ones((5, 5), "bool"))
        layer.build(x.shape)
        blocks = output.reshape(self.HEADS, self.WIDTH, self.EMBED_SIZE)
        layer.set_weights([*map(self.our_kernel, shared), blocks])
        np.testing.assert_allclose(
            to_numpy(layer(to_tensor(x), attention_mask=mask)),
            self.its_layer(x.astype("float64"), shared, output, mask),
            atol=1e-5,
        )

    def test_heads_learn_projections_of_their_own(self):
        layer = keras_mha.MultiHeadAttention(self.HEADS, self.WIDTH)
        layer.build((None, None, self.EMBED_SIZE))
        kernel = to_numpy(layer.query_dense.kernel)
        assert np.abs(kernel[:, 0] - kernel[:, 1]).max() > 1e-3
