"""One of two processes that train models by torch's engines, over loopback.

    RANK=0 python -m tests.distribution.torch_parallel_worker FOLDER

The first process writes, as `found.json`, by how much losses and gradients differ from
those of one process, for each case of each engine, and what else was looked at.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import keras_mha
from keras_mha import distribution, masks

B, T, D, N, H = 4, 10, 16, 4, 8
RANK, PROCESSES = int(os.environ["RANK"]), 2
RNG = np.random.default_rng(0)
X = torch.tensor(RNG.normal(size=(B, T, D)).astype("float32"))
TARGETS = torch.tensor(RNG.normal(size=(B, T, D)).astype("float32"))
VALID = torch.arange(T)[None] < torch.tensor([10, 7, 0, 1])[:, None]
ALLOWED = torch.tensor(RNG.random((B, N, T, T)) < 0.6)
BIAS = torch.tensor(RNG.normal(size=(N, T, T)).astype("float32"))
IMAGES = {"shape": (B, 5, 2, D)}


class OfHeads(masks.Mask):
    """A user's mask, another one for each head."""

    def block(self, tile):
        values = tile.cut_rows(tile.cut_batch(ALLOWED), 2)
        return tile.cut_columns(values, 3)


# Of each case the layer's further options, and the call's.
TENSOR_PARALLEL = {
    "plain": ({}, {}),
    "causal": ({}, {"use_causal_mask": True}),
    "padding": ({}, {"query_mask": VALID, "use_causal_mask": True}),
    "tiles": ({"flash_attention": True, "logit_soft_cap": 3.0}, {"query_mask": VALID}),
    "rotary": ({"position": keras_mha.RotaryEmbedding}, {"use_causal_mask": True}),
    "ALiBi": ({"position": keras_mha.ALiBi}, {}),
    "ALiBi in tiles": (
        {
            "position": keras_mha.ALiBi,
            "flash_attention": True,
            "attention_sink": "zero",
        },
        {},
    ),
    "T5": ({"position": keras_mha.RelativePositionBias}, {}),
    "2 key heads": ({"num_key_value_heads": 2, "value_dim": 6}, {}),
    "1 key head": (
        {"num_key_value_heads": 1, "qk_norm": "rms", "num_memory_key_values": 2},
        {"use_causal_mask": True},
    ),
    "3 key heads": ({"num_heads": 6, "num_key_value_heads": 3}, {}),
    "dropout": ({"dropout": 0.3}, {"training": True}),
    "dropout in tiles": (
        {"dropout": 0.3, "flash_attention": True, "num_key_value_heads": 2},
        {"training": True},
    ),
    "gate and sinks": ({"use_gate": True, "attention_sink": "learned"}, {}),
    "learned keys": ({"num_memory_key_values": 2, "qk_norm": "layer"}, {}),
    "scores": ({}, {"return_attention_scores": True}),
    "bias": ({"use_bias": False}, {"attention_bias": BIAS}),
    "mask": ({}, {"attention_mask": ALLOWED}),
    "own mask": ({}, {"attention_mask": OfHeads() & masks.Causal()}),
    "own mask in tiles": (
        {"flash_attention": True},
        {"attention_mask": ~OfHeads() | masks.Causal()},
    ),
    "axes": ({}, {**IMAGES, "attention_mask": ALLOWED.reshape(B, N, 5, 2, 5, 2)}),
    "RoPE-Mixed": (
        {"position": keras_mha.MixedRotaryEmbedding, "num_key_value_heads": 2},
        IMAGES,
    ),
    "RoPE-Mixed of 1 key head": (
        {"position": keras_mha.MixedRotaryEmbedding, "num_key_value_heads": 1},
        IMAGES,
    ),
    "LoRA": ({"lora": True}, {}),
}


def made(options, shape):
    """Returns a layer with weights that are the same in all processes."""
    keras.backend.clear_session()  # for equal names
    options = {"num_heads": N, "key_dim": H, "seed": 3, **options}
    if "position" in options:
        options["position"] = options["position"]()
    lora = options.pop("lora", False)
    layer = keras_mha.MultiHeadAttention(**options)
    layer.build(shape)
    if lora:
        for dense in (layer.query_dense, layer.value_dense, layer.output_dense):
            dense.enable_lora(2)
    draws = np.random.default_rng(1)
    for weight in layer.weights:
        weight.assign(0.3 * draws.normal(size=weight.shape))
    return layer


def run(layer, call, shape):
    """Returns what a call gives, its loss and all gradients."""
    x = X.reshape(shape).clone().requires_grad_()
    results = layer(x, **call)
    results = results if isinstance(results, tuple) else (results,)
    loss = sum((y**3).sum() for y in results)
    loss.backward()
    gradients = [x.grad, *(whole(v.value.grad) for v in layer.trainable_variables)]
    return {
        "output": [y.detach() for y in results],
        "loss": [loss.detach()],
        "gradients": gradients,
    }


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def errors(found, expected):
    return {name: error(found[name], expected[name]) for name in expected}


def error(found, expected):
    """Returns the largest difference in any process, relative to the largest number of
    its tensor, but for tensors that are nothing beside the others."""
    if isinstance(expected, dict):
        found, expected = [found[name] for name in expected], [*expected.values()]
    assert len(found) == len(expected)
    least = max(x.abs().max() for x in expected) / 10
    worst = max(
        (a - b).abs().max() / b.abs().max().clamp(min=least)
        for a, b in zip(found, expected, strict=True)
    )
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def spoil(model):
    """Gives all processes but the first other weights and seeds, which do not count."""
    with torch.no_grad():
        for parameter in model.parameters() if RANK else ():
            parameter.mul_(0).add_(1)


def tensor_parallel(mesh):
    found = {}
    for name, (options, call) in TENSOR_PARALLEL.items():
        call = dict(call)
        shape = call.pop("shape", (B, T, D))
        expected = run(made(options, shape), call, shape)
        layer = made(options, shape)
        spoil(layer)
        distribution.parallelize(layer, mesh)
        parts = {
            "/".join(v.path.split("/")[1:]): list(v.value.to_local().shape)
            for v in layer.weights
        }
        found[name] = {
            "errors": errors(run(layer, call, shape), expected),
            "parts": parts,
        }
    return found


class Block(torch.nn.Module):
    """A module of torch's with a Keras layer in it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(D)
        options = {"position": keras_mha.RelativePositionBias, "use_gate": True}
        self.attention = made(options, (B, T, D))
        self.up = torch.nn.Linear(D, D)

    def forward(self, x):
        return x + self.up(self.attention(self.norm(x), use_causal_mask=True))


def functional(attention=keras_mha.MultiHeadAttention):
    keras.backend.clear_session()  # for equal names
    keras.utils.set_random_seed(0)
    inputs = keras.Input((T, D))
    x = keras.layers.LayerNormalization()(inputs)
    x = inputs + attention(N, H)(x, x)
    return keras.Model(inputs, keras.layers.Dense(D)(x))


def trained(model, part=slice(None), share=1):
    """Returns the losses of three steps, the last gradients, and the weights.

    Args:
        model: The model.
        part: Which rows of the batch this process has.
        share: Of how many processes the losses' mean is to be taken.
    """
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(X[part]) - TARGETS[part]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    if share > 1:
        dist.all_reduce(losses)
    parameters = trained_ones(model)
    return {
        "losses": [losses / share],
        "gradients": {name: whole(p.grad) for name, p in parameters.items()},
        "weights": {name: whole(p.detach()) for name, p in parameters.items()},
    }


def trained_ones(model):
    """Returns the parameters that are trained, by names that all engines give."""
    return {
        name.removeprefix("module.").rpartition("_torch_params.")[2]: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def sharded(model, mesh):
    """Shards layers one by one, and then the rest."""
    if isinstance(model, Block):
        parts = [model.attention, model.up]
    else:
        parts = [layer for layer in model.layers if layer.weights]
    for part in parts:
        distribution.fully_shard(part, mesh=mesh)
    return distribution.fully_shard(model, mesh=mesh)


MODELS = {
    "module": Block,
    "functional": functional,
    "Keras's layer": lambda: functional(keras.layers.MultiHeadAttention),
}
ENGINES = {
    "DDP": lambda model, mesh: DistributedDataParallel(model),
    "FSDP": lambda model, mesh: distribution.fully_shard(model, mesh=mesh),
    "FSDP by layers": sharded,
    "tensor parallel": lambda model, mesh: distribution.parallelize(model, mesh),
}


PART = slice(RANK * B // PROCESSES, (RANK + 1) * B // PROCESSES)


def trained_by_engines(mesh):
    found = {}
    for kind, make in MODELS.items():
        one = trained(make())
        for engine, share in ENGINES.items():
            if engine != "tensor parallel":
                model = share(make(), mesh)
                several = trained(model, PART, PROCESSES)
            elif kind != "Keras's layer":
                model = make()
                spoil(model)
                several = trained(share(model, mesh))
            else:
                continue
            found[f"{engine}: {kind}"] = {
                "errors": errors(several, one),
                "share": size(trained_ones(model)) / size(one["weights"]),
            }
    return found


def size(tensors):
    """Returns how many numbers this process has."""
    local = (x.to_local() if isinstance(x, DTensor) else x for x in tensors.values())
    return sum(x.numel() for x in local)


def both_axes():
    """Tensor parallel, and the weights' parts sharded along the batch."""
    mesh = init_device_mesh("cpu", (PROCESSES, 1), mesh_dim_names=("data", "model"))
    model = distribution.parallelize(Block(), mesh, "model")
    sharded(model, mesh["data"])
    return errors(trained(model, PART, PROCESSES), trained(Block()))


def archives(mesh, folder):
    """Saves models that are shared, loads them in one process, and loads weights."""
    found = {}
    for engine in ("FSDP by layers", "tensor parallel"):
        path = folder / f"{engine}.keras"
        model = ENGINES[engine](functional(), mesh)
        trained(model)
        with torch.no_grad():
            expected = model(X)
        with distribution.gathered(model):
            if RANK == 0:
                model.save(path)
                model.save_weights(path.with_suffix(".weights.h5"))
        dist.barrier()
        loaded = keras.saving.load_model(path)
        again = ENGINES[engine](functional(), mesh)
        with distribution.gathered(again):
            again.load_weights(path.with_suffix(".weights.h5"))
        with torch.no_grad():
            found[engine] = {
                "loaded": error([loaded(X)], [expected]),
                "weights loaded": error([again(X)], [expected]),
            }
    return found


def refused(mesh):
    """What is said where weights are shared and somebody does not know it."""
    said = {}

    @contextlib.contextmanager
    def saying(name):
        try:
            yield
        except (ValueError, NotImplementedError) as error:
            said[name] = str(error)

    for engine in ("FSDP", "tensor parallel"):
        model = ENGINES[engine](functional(), mesh)
        with saying(f"{engine}: get_weights"):
            model.get_weights()
        with saying(f"{engine}: set_weights"):
            model.set_weights(functional().get_weights())
        model.compile("adam", "mse")
        with saying(f"{engine}: fit"):
            model.fit(X, TARGETS, verbose=0)
    for kind, make in (("module", Block), ("functional", functional)):
        with saying(f"torch's fully_shard: {kind}"):
            fully_shard(make(), mesh=mesh)(X)
    model = functional()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    with saying("torch's fully_shard: layers"):
        model(X)
    return said


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=RANK,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=200),
    )
    mesh = init_device_mesh("cpu", (PROCESSES,))
    found = {
        "tensor parallel": tensor_parallel(mesh),
        "engines": trained_by_engines(mesh),
        "both axes": both_axes(),
        "archives": archives(mesh, folder),
        "refused": refused(mesh),
    }
    if RANK == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
