"""What torch's processes share of a layer's heads; what they cannot: said by name."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha.distribution import parallelize
from keras_mha.kernels import backends
from tests.helpers import only_torch, to_tensor


def shard_heads(layer, mesh):
    """Shards all projections of a layer over their heads."""
    import torch
    from torch.distributed.tensor import Shard, distribute_tensor

    for dense, axis in (
        (layer.query_dense, 1),
        (layer.key_dense, 1),
        (layer.value_dense, 1),
        (layer.output_dense, 0),
    ):
        kernel = distribute_tensor(dense.kernel.value.detach(), mesh, [Shard(axis)])
        dense._kernel._value = torch.nn.Parameter(kernel)


@pytest.fixture
def mesh():
    """Two devices, of which this process stands for the first."""
    distributed = pytest.importorskip("torch.distributed")
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh

    yield init_device_mesh("cpu", (2,))
    distributed.destroy_process_group()


@only_torch
def test_one_key_head_cannot_be_shared_by_two_devices(mesh):
    layer = keras_mha.MultiHeadAttention(4, 4, num_key_value_heads=1, use_bias=False)
    layer.build((2, 5, 8))
    shard_heads(layer, mesh)
    from torch.distributed.tensor import Replicate, distribute_tensor

    x = distribute_tensor(to_tensor(np.zeros((2, 5, 8))), mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"`num_key_value_heads` must.*=1, .* 2 devi"):
        layer(x)


def test_weights_that_are_whole_are_on_one_device():
    assert backends.current().devices_along(to_tensor(np.zeros((3, 2))), 1) == 1


@only_torch
def test_heads_that_devices_share_are_known(mesh):
    """A step of decoding then does not read them all in one product."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    key = to_tensor(np.zeros((2, 5, 4, 3)))
    assert not backends.current().may_share_heads(key)
    for placement, may_share in ((Shard(2), True), (Replicate(), False)):
        sharded = distribute_tensor(key, mesh, [placement])
        assert backends.current().may_share_heads(sharded) == may_share


class TestParallelize:
    """Wrong use says what to do."""

    def made(self, heads=4, is_built=True, **options):
        layer = keras_mha.MultiHeadAttention(heads, 4, name="attention", **options)
        if is_built:
            layer.build((2, 5, 8))
        return layer

    @only_torch
    def test_heads_that_do_not_divide(self, mesh):
        with pytest.raises(ValueError, match=r"`num_heads` must.*2 proc.*num_heads=3"):
            parallelize(self.made(3), mesh)

    @only_torch
    def test_a_mesh_without_the_axis(self, mesh):
        with pytest.raises(ValueError, match=r"`model_axis` must.*'model'.*1 axes"):
            parallelize(self.made(), mesh, "model")

    @only_torch
    def test_several_axes_of_which_none_is_named(self, mesh):
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
        with pytest.raises(ValueError, match=r"\['data', 'model'\].*=None.*2 axes"):
            parallelize(self.made(), mesh)
        layer = parallelize(self.made(), mesh, "model")
        assert layer.query_dense.kernel.value.to_local().shape == (8, 2, 4)

    @only_torch
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"talking_heads": "pre"}, "`talking_heads` must be None.*'pre'"),
            ({"kernel_regularizer": "l2"}, "`kernel_regularizer` must be None"),
            ({"bias_regularizer": "l2"}, "`bias_regularizer` must be None"),
            ({"activity_regularizer": "l2"}, "`activity_regularizer` must be None"),
            ({"is_built": False}, "`model` must have its weights.*'attention'"),
        ],
    )
    def test_what_cannot_be_shared(self, mesh, options, message):
        with pytest.raises(ValueError, match=message):
            parallelize(self.made(**options), mesh)

    @only_torch
    def test_quantized_weights(self, mesh):
        layer = self.made()
        layer.query_dense.quantize("int8")
        with pytest.raises(ValueError, match=r"must not be quantized.*'query' in int8"):
            parallelize(layer, mesh)

    @only_torch
    def test_a_model_without_attention(self, mesh):
        dense = keras.layers.Dense(3)
        dense.build((2, 8))
        with pytest.raises(ValueError, match=r"`model` must hold a .*a Dense without"):
            parallelize(dense, mesh)

    @only_torch
    def test_twice(self, mesh):
        layer = parallelize(self.made(), mesh)
        with pytest.raises(ValueError, match="`model` must not be parallel already"):
            parallelize(layer, mesh)

    @only_torch
    def test_no_model_or_no_mesh(self, mesh):
        with pytest.raises(TypeError, match=r"`model` must be a Keras.*model='it'"):
            parallelize("it", mesh)
        with pytest.raises(TypeError, match=r"`device_mesh` must be a .*=\(2,\)"):
            parallelize(self.made(), (2,))

    @only_torch
    def test_lora_that_comes_later(self, mesh):
        layer = parallelize(self.made(), mesh)
        layer.query_dense.enable_lora(2)
        with pytest.raises(ValueError, match=r"enabled.*before `parallelize`"):
            layer(to_tensor(np.zeros((2, 5, 8))))

    @only_torch
    def test_a_cache(self, mesh):
        layer = parallelize(self.made(), mesh)
        with pytest.raises(ValueError, match="`cache` must be None"):
            layer(to_tensor(np.zeros((2, 5, 8))), cache=layer.init_cache(2, 5))

    @only_torch
    def test_attention_maps(self, mesh):
        layer = parallelize(self.made(), mesh)
        with pytest.raises(ValueError, match="`return_attention_scores=True`"):
            keras_mha.attention_maps(layer, to_tensor(np.zeros((2, 5, 8))))

    @pytest.mark.skipif(keras.backend.backend() == "torch", reason="speaks of others")
    @pytest.mark.parametrize("name", ["parallelize", "fully_shard", "gathered"])
    def test_other_backends(self, name):
        function = getattr(keras_mha.distribution, name)
        arguments = (None, None) if name == "parallelize" else (None,)
        with (
            pytest.raises(ValueError, match=f"`{name}` is for the PyTorch backend"),
            contextlib.ExitStack() as stack,
        ):
            stack.enter_context(function(*arguments))
