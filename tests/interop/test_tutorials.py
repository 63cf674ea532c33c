"""The weights of tutorials' layers, brought into ours.

The letters are those of `tests/test_errata.py`. Each layer is written anew here, with
what it gets wrong where that changes its numbers.
"""

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha.interop import set_projections
from tests.helpers import call_at_once, to_numpy, to_tensor

torch = pytest.importorskip("torch", reason="runs layers written for PyTorch")

BATCH, QUERIES, KEYS = 2, 4, 6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def run(layer, *inputs, **masks):
    tensors = [to_tensor(x) for x in inputs]
    return to_numpy(call_at_once(lambda *x: layer(*x, **masks), tensors))


def run_torch(module, *inputs):
    with torch.no_grad():
        return module(*map(torch.tensor, inputs)).numpy()


def pairs(**modules):
    """The kernel and bias of each `torch.nn.Linear`."""
    return {name: (x.weight, x.bias) for name, x in modules.items()}


class TestA:
    """Written for TensorFlow: `num_heads` is not used, scores are not scaled."""

    D_MODEL, D_K = 6, 4

    def its_projections(self):
        """Keras's Dense layers; the value's is as wide as the output, or it fails."""
        widths = {
            "query": self.D_K,
            "key": self.D_K,
            "value": self.D_MODEL,
            "output": self.D_MODEL,
        }
        found = {}
        for name, width in widths.items():
            found[name] = keras.layers.Dense(width, kernel_initializer="zeros")
            found[name].build((None, self.D_MODEL))
            shapes = [x.shape for x in found[name].get_weights()]
            found[name].set_weights([normal(*x, seed=len(found)) / 2 for x in shapes])
        return found

    def its_numbers(self, projections, x):
        weights = {name: x.get_weights() for name, x in projections.items()}
        q, k, v = (x @ weights[y][0] + weights[y][1] for y in ("query", "key", "value"))
        heads = softmax(q @ k.swapaxes(1, 2)) @ v
        kernel, bias = weights["output"]
        return heads.reshape(-1, self.D_MODEL) @ kernel + bias

    def our_layer(self, projections, **options):
        layer = keras_mha.MultiHeadAttention(
            1, key_dim=self.D_K, value_dim=self.D_MODEL, **options
        )
        weights = {name: x.get_weights() for name, x in projections.items()}
        set_projections(layer, **weights, layout="dense")
        return layer

    def test_what_it_really_computes_is_one_head_without_a_scale(self):
        projections, x = self.its_projections(), normal(BATCH, QUERIES, self.D_MODEL)
        output = run(self.our_layer(projections, scale=1.0), x)
        expected = self.its_numbers(projections, x)
        np.testing.assert_allclose(
            output.reshape(-1, self.D_MODEL), expected, atol=1e-5
        )

    def test_batch_and_time_stay_apart(self):
        layer = self.our_layer(self.its_projections(), scale=1.0)
        x = normal(BATCH, QUERIES, self.D_MODEL)
        assert run(layer, x).shape == x.shape

    def test_the_scale_that_it_forgot_makes_a_difference(self):
        projections, x = self.its_projections(), normal(BATCH, QUERIES, self.D_MODEL)
        output = run(self.our_layer(projections), x)
        expected = self.its_numbers(projections, x).reshape(x.shape)
        assert np.abs(output - expected).max() > 1e-3


class Split(torch.nn.Module):
    """B and C, which agree where both work: projections, split heads, projection."""

    def __init__(self, d_model, num_heads):
        super().__init__()
        torch.manual_seed(0)
        self.num_heads = num_heads
        linear = (torch.nn.Linear(d_model, d_model) for _ in range(4))
        self.query, self.key, self.value, self.output = linear

    def split(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, q, k, v, mask=None):
        q, k, v = self.query(q), self.key(k), self.value(v)
        q, k, v = map(self.split, (q, k, v))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        return self.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def ours_of_split(module, d_model):
    layer = keras_mha.MultiHeadAttention(module.num_heads, d_model // module.num_heads)
    linear = pairs(
        query=module.query, key=module.key, value=module.value, output=module.output
    )
    set_projections(layer, **linear, layout="torch")
    return layer


class TestB:
    """Written for PyTorch: `forward(q, k, v, mask)`, a mask of zeros and ones."""

    def inputs(self, width):
        return (
            normal(BATCH, QUERIES, width),
            normal(BATCH, KEYS, width, seed=1),
            normal(BATCH, KEYS, width, seed=2),
        )

    def test_its_examples_numbers(self):
        module = Split(512, 8)
        q, k, v = self.inputs(512)
        output = run(ours_of_split(module, 512), q, v, k)
        np.testing.assert_allclose(output, run_torch(module, q, k, v), atol=1e-5)

    def test_its_numbers_with_its_mask(self):
        module = Split(8, 2)
        q, k, v = self.inputs(8)
        mask = np.tri(QUERIES, KEYS, dtype="int32")[None, None].repeat(BATCH, 0)
        output = run(ours_of_split(module, 8), q, v, k, attention_mask=mask)
        np.testing.assert_allclose(output, run_torch(module, q, k, v, mask), atol=1e-5)


class TestC:
    """Written for PyTorch: `forward(query, key, value)` of (2, 3, 4)."""

    def test_its_numbers_with_its_heads_split_along_the_features(self):
        module, x = Split(4, 2), normal(2, 3, 4)
        output = run(ours_of_split(module, 4), x, x, x)
        assert output.shape == (2, 3, 4)
        np.testing.assert_allclose(output, run_torch(module, x, x, x), atol=1e-5)


class Shared(torch.nn.Module):
    """E: a projection of one head each, which all heads share; scaled by all features.

    `forward(values, keys, query, mask)`, and `mask == 0` is hidden.
    """

    def __init__(self, embed_size, heads, bias=False):
        super().__init__()
        torch.manual_seed(1)
        self.embed_size, self.heads = embed_size, heads
        width = embed_size // heads
        linear = (torch.nn.Linear(width, width, bias=bias) for _ in range(3))
        self.values, self.keys, self.queries = linear
        self.fc_out = torch.nn.Linear(embed_size, embed_size)

    def forward(self, values, keys, query, mask=None):
        split = (x.unflatten(-1, (self.heads, -1)) for x in (values, keys, query))
        values, keys, query = split
        values, keys, query = (
            self.values(values), self.keys(keys), self.queries(query)
        )  # fmt: skip
        energy = torch.einsum("bqhd,bkhd->bhqk", query, keys)
        if mask is not None:
            energy = energy.masked_fill(mask == 0, -1e20)
        weights = (energy / self.embed_size**0.5).softmax(-1)
        output = torch.einsum("bhqk,bkhd->bqhd", weights, values)
        return self.fc_out(output.flatten(2))


class TestE:
    EMBED_SIZE, HEADS = 12, 3

    def our_layer(self, module, is_built=False, **options):
        layer = keras_mha.MultiHeadAttention(
            self.HEADS, self.EMBED_SIZE // self.HEADS, **options
        )
        if is_built:
            layer.build((None, None, self.EMBED_SIZE))
        linear = pairs(
            query=module.queries,
            key=module.keys,
            value=module.values,
            output=module.fc_out,
        )
        set_projections(layer, **linear, layout="torch")
        return layer

    def inputs(self):
        """Values, keys and query, in its order."""
        return (
            normal(BATCH, KEYS, self.EMBED_SIZE),
            normal(BATCH, KEYS, self.EMBED_SIZE, seed=1),
            normal(BATCH, QUERIES, self.EMBED_SIZE, seed=2),
        )

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("is_built", [False, True])
    def test_its_numbers_with_its_scale(self, bias, is_built):
        module = Shared(self.EMBED_SIZE, self.HEADS, bias)
        layer = self.our_layer(module, is_built, scale=self.EMBED_SIZE**-0.5)
        values, keys, query = self.inputs()
        np.testing.assert_allclose(
            run(layer, query, values, keys),
            run_torch(module, values, keys, query),
            atol=1e-5,
        )

    def test_its_numbers_with_its_mask_of_padding(self):
        module = Shared(self.EMBED_SIZE, self.HEADS)
        layer = self.our_layer(module, scale=self.EMBED_SIZE**-0.5)
        values, keys, query = self.inputs()
        mask = np.array([[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])[:, None, None]
        np.testing.assert_allclose(
            run(layer, query, values, keys, attention_mask=mask),
            run_torch(module, values, keys, query, mask),
            atol=1e-5,
        )

    def test_its_numbers_with_its_mask_of_the_future(self):
        module = Shared(self.EMBED_SIZE, self.HEADS)
        layer = self.our_layer(module, scale=self.EMBED_SIZE**-0.5)
        x = normal(BATCH, KEYS, self.EMBED_SIZE)
        mask = np.tri(KEYS, dtype="int32")[None, None].repeat(BATCH, 0)
        expected = run_torch(module, x, x, x, mask)
        for masks in ({"attention_mask": mask}, {"use_causal_mask": True}):
            np.testing.assert_allclose(
                run(layer, x, x, x, **masks), expected, atol=1e-5
            )

    def test_its_scale_makes_a_difference(self):
        module = Shared(self.EMBED_SIZE, self.HEADS)
        values, keys, query = self.inputs()
        output = run(self.our_layer(module), query, values, keys)
        expected = run_torch(module, values, keys, query)
        assert np.abs(output - expected).max() > 1e-3

    def test_heads_share_their_projection_at_first_only(self):
        layer = self.our_layer(Shared(self.EMBED_SIZE, self.HEADS))
        kernel = to_numpy(layer.query_dense.kernel)
        np.testing.assert_array_equal(kernel[:4, 0], kernel[4:8, 1])
        assert layer.query_dense.kernel.shape == (self.EMBED_SIZE, self.HEADS, 4)
