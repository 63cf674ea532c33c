"""One of the two processes that share each sequence in torch's `context_parallel`.

    RANK=0 python -m tests.distribution.context_parallel_worker FOLDER

For each case the first process records, as `<case>.npz`, the output and the kernels'
gradients, joined, beside what a single process makes of the whole sequences; or the
message of the error that the call ends in.
"""

import os
import sys
from pathlib import Path

import keras
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel

import keras_mha
from keras_mha import masks

B, T, D = 2, 16, 8
RANK, PROCESSES = int(os.environ["RANK"]), 2
OPTIONS = {"num_heads": 4, "key_dim": 4}

# Of each case the layer's further options, the call's, and the sequences' length.
CASES = {
    "self-attention": ({}, {}, T),
    # Each process has more than the kernel takes slices from.
    "long": ({}, {}, 1200),
    "grouped heads": ({"num_key_value_heads": 2}, {}, T),
    "another value width": ({"value_dim": 6}, {}, T),
    "rotary with ids": ({"position": keras_mha.RotaryEmbedding}, {"ids": True}, T),
    "rotary": ({"position": keras_mha.RotaryEmbedding}, {}, T),
    "alibi": ({"position": keras_mha.ALiBi}, {}, T),
    "dropout": ({"dropout": 0.1}, {"training": True}, T),
    "soft cap": ({"logit_soft_cap": 5.0}, {}, T),
    "sink": ({"attention_sink": "zero"}, {}, T),
    "window": ({"sliding_window": 3}, {}, T),
    "long window": ({"sliding_window": 3}, {}, 1200),
    "mask": ({}, {"attention_mask": masks.Prefix(3)}, T),
    "bias": ({}, {"attention_bias": np.zeros((1, 1, 1, 1), "float32")}, T),
    "scores": ({}, {"return_attention_scores": True}, T),
    "reference": ({"flash_attention": False}, {}, T),
}


def make_layer(options):
    options = {**OPTIONS, **options}
    if "position" in options:
        options["position"] = options["position"]()
    keras.utils.set_random_seed(0)
    layer = keras_mha.MultiHeadAttention(**options)
    layer.build((B, T, D), (B, T, D))
    return layer


def run(options, arguments, x, ids):
    """Returns the output and the kernels' gradients of a call in this process."""
    layer = make_layer(options)
    arguments = dict(arguments)
    if arguments.pop("ids", False):
        arguments["position_ids"] = ids
    output = layer(x, **arguments)
    output = output[0] if isinstance(output, tuple) else output
    output.square().sum().backward()
    kernels = [w.value.grad for w in layer.trainable_weights if w.name == "kernel"]
    return output.detach(), kernels


def joined(output, kernels, ids):
    """Each process has some positions, in an order of torch's own, and their share in
    the gradients."""
    for kernel in kernels:
        dist.all_reduce(kernel)
    order = torch.argsort(gathered(ids, axis=0))
    return gathered(output, axis=1)[:, order], kernels


def gathered(x, axis):
    parts = [torch.empty_like(x) for _ in range(PROCESSES)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=axis)


def record(options, arguments, length, mesh):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(B, length, D)).astype("float32")
    whole = run(options, arguments, torch.tensor(x), torch.arange(length))
    buffers = [torch.tensor(x), torch.arange(length)]
    try:
        # On a CPU torch spreads this one of its kernels only, and no causal mask.
        with (
            sdpa_kernel(SDPBackend.MATH),
            context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1, 0]),
        ):
            parts = joined(*run(options, arguments, *buffers), buffers[1])
    except ValueError as error:
        return {"error": str(error)}
    return {
        "output": parts[0],
        "expected_output": whole[0],
        **{f"gradient_{i}": x for i, x in enumerate(parts[1])},
        **{f"expected_gradient_{i}": x for i, x in enumerate(whole[1])},
    }


def main(folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=RANK, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for name, case in CASES.items():
        found = record(*case, mesh)
        if RANK == 0:
            np.savez(folder / f"{name}.npz", **found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
