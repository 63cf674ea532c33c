"""Positions over several axes beside those of transformers, from the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import keras_mha
from keras_mha.interop import set_projections
from tests.helpers import to_numpy, to_tensor

torch = pytest.importorskip("torch", reason="the modules are torch's")
pytest.importorskip("transformers", reason="runs the modules of transformers")

# That module skips itself without these two, and then has nothing to import.
from tests.interop.test_huggingface import config_of, modeling, random  # noqa: E402

WIDTH, HEADS, TOLERANCE = 48, 4, 1e-4


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def linear(module: Any) -> Any:
    return module.weight if module.bias is None else (module.weight, module.bias)


def assert_close(found, expected) -> None:
    expected = expected.detach().numpy()
    np.testing.assert_allclose(
        to_numpy(found), expected, rtol=TOLERANCE, atol=TOLERANCE
    )


def test_patches_of_qwen2_vl():
    """Two images of different sizes in one row, each attending to itself."""
    package = modeling("qwen2_vl")
    config = config_of(
        "qwen2_vl", "Qwen2VLVisionConfig", embed_dim=WIDTH, num_heads=HEADS
    )
    module = random(package.VisionAttention(config))
    sizes = torch.tensor([[1, 4, 6], [1, 6, 2]])
    ids = package.get_vision_position_ids(sizes, config.spatial_merge_size)
    x, ends = draw(len(ids), WIDTH), torch.tensor([0, 24, 36])
    places = package.Qwen2VLVisionRotaryEmbedding(config)(torch.tensor(x), ids)
    expected = module(torch.tensor(x), cu_seqlens=ends, position_embeddings=places)

    layer = keras_mha.MultiHeadAttention(
        HEADS, WIDTH // HEADS, position=keras_mha.RotaryEmbedding(axes=2)
    )
    set_projections(
        layer, qkv=linear(module.qkv), output=linear(module.proj), layout="torch"
    )
    found = layer(
        to_tensor(x[None]),
        position_ids=to_tensor(ids.numpy(), "int32"),
        segment_ids=to_tensor(np.repeat([0, 1], [24, 12])[None], "int32"),
    )
    assert_close(found[0], expected)


def test_text_and_images_of_qwen2_vl():
    """M-RoPE: time, row and column, by sections of one sequence of frequencies."""
    package, sections = modeling("qwen2_vl"), (1, 2, 3)
    config = config_of(
        "qwen2_vl",
        "Qwen2VLTextConfig",
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        num_hidden_layers=1,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": list(sections),
        },
    )
    module = random(package.Qwen2VLAttention(config, 0))
    x = draw(2, 7, WIDTH)
    ids = np.random.default_rng(0).integers(0, 40, size=(2, 7, 3))
    rotary = package.Qwen2VLRotaryEmbedding(config)
    places = rotary(torch.tensor(x), torch.tensor(np.moveaxis(ids, -1, 0)))
    mask = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    expected = module(torch.tensor(x), attention_mask=mask, position_embeddings=places)[
        0
    ]

    position = keras_mha.RotaryEmbedding(
        sections=sections, shared_frequencies=True, max_wavelength=1e6
    )
    layer = keras_mha.MultiHeadAttention(
        HEADS, WIDTH // HEADS, num_key_value_heads=2, position=position
    )
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    given = {name: linear(getattr(module, old)) for name, old in names.items()}
    set_projections(layer, **given, layout="torch")
    found = layer(
        to_tensor(x), position_ids=to_tensor(ids, "int32"), use_causal_mask=True
    )
    assert_close(found, expected)


def test_shifted_windows_of_swin():
    """The layer made of the module, with the mask of a block whose windows shift."""
    package = modeling("swin")
    config = config_of("swin", "SwinConfig", window_size=3)
    block = random(package.SwinLayer(config, WIDTH, (6, 6), HEADS, shift_size=1))
    x = draw(2 * 4, 9, WIDTH)  # four windows of 3x3 in each of two images
    mask = block.get_attn_mask(6, 6, torch.float32, torch.device("cpu"))
    expected = block.attention(torch.tensor(x), attention_mask=mask)[0]

    layer = keras_mha.interop.from_huggingface(block.attention)
    allowed = np.tile(mask.numpy() == 0, (2, 1, 1))
    assert_close(layer(to_tensor(x), attention_mask=to_tensor(allowed)), expected)
    grid = keras_mha.MultiHeadAttention.from_config(layer.get_config())
    grid.build((8, 3, 3, WIDTH))
    grid.set_weights(layer.get_weights())
    found = grid(
        to_tensor(x.reshape(8, 3, 3, WIDTH)),
        attention_mask=to_tensor(allowed.reshape(8, 3, 3, 3, 3)),
    )
    assert_close(found, expected.reshape(8, 3, 3, WIDTH))
