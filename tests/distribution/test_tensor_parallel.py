"""Heads that torch's DTensor shares out, or cannot: said by name."""

from __future__ import annotations

import numpy as np
import pytest

import keras_mha
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
