"""Modules of transformers, each run beside the layer that is made of it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from keras_mha.interop import from_huggingface
from tests.helpers import call_at_once, to_numpy, to_tensor

torch = pytest.importorskip("torch", reason="the modules are torch's")
pytest.importorskip("transformers", reason="runs the modules of transformers")

WIDTH, TOKENS, MEMORY, WINDOW, TRAINED = 48, 12, 7, 5, 8
TOLERANCE = 1e-4


class Case(NamedTuple):
    """A module and how it is run.

    Attributes:
        module: The module of transformers, in evaluation mode.
        expected: What gives the module's output for inputs, query and maybe memory.
        options: Those that the layer must have.
        memory: Whether there is a memory, for cross-attention.
        call: Arguments of the layer's call.
    """

    module: Any
    expected: Callable[..., Any]
    options: dict[str, Any]
    memory: bool = False
    call: dict[str, Any] = {}  # noqa: RUF012  never changed


def modeling(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def config_of(family, name, **options):
    package = importlib.import_module(f"transformers.models.{family}")
    config = getattr(package, name)(**options)
    config._attn_implementation = "eager"
    return config


def random(module, seed=0):
    """Every weight at random: norms' scales, biases and sinks hide mistakes else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            deviation = 0.2 if weight.ndim == 2 and "relative" not in name else 0.5
            weight.normal_(0.0, deviation, generator=generator)
    return module.eval()


def inputs(memory=False):
    generator = np.random.default_rng(1)
    shapes = [(2, TOKENS, WIDTH)] + [(2, MEMORY, WIDTH)] * memory
    return [generator.normal(size=shape).astype("float32") for shape in shapes]


def causal_mask(tokens=TOKENS):
    return torch.full((tokens, tokens), -torch.inf).triu(1)[None, None]


CAUSAL = {"use_causal_mask": True}


# ---------------------------------------------------------------------- the modules


def rotary_decoder(family, prefix, options, layer=0, config_name=None, **configuration):
    """A decoder's module, with the positions and the mask that its model makes."""
    package = modeling(family)
    configuration = {
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": TRAINED,
        "attention_dropout": 0.25,
        **configuration,
    }
    options = {
        "num_heads": 4,
        "num_key_value_heads": 2,
        "key_dim": 12,
        "dropout": 0.25,
        "sliding_window": None,
        "logit_soft_cap": None,
        "qk_norm": None,
        "attention_sink": None,
        "scale": None,
        "use_bias": False,
        "scaling": None,
        **options,
    }
    config = config_of(family, config_name or f"{prefix}Config", **configuration)
    module = random(getattr(package, f"{prefix}Attention")(config, layer))

    def expected(x):
        ids = torch.arange(x.shape[1])[None]
        rotary = getattr(package, f"{prefix}RotaryEmbedding")(config)
        by_type = (module.layer_type,) if family == "gemma3" else ()
        windowed = options["sliding_window"] is not None
        make_mask = (
            package.create_sliding_window_causal_mask
            if windowed
            else package.create_causal_mask
        )
        mask = make_mask(
            config=config,
            inputs_embeds=x,
            attention_mask=None,
            past_key_values=None,
            position_ids=ids,
        )
        places = rotary(x, ids, *by_type)
        return module(x, position_embeddings=places, attention_mask=mask)[0]

    return Case(module, expected, options, call=CAUSAL)


def llama(options=(), **configuration):
    options = dict(options)
    return rotary_decoder("llama", "Llama", options, **configuration)


def scaled_llama(**rope):
    rope = {"rope_theta": 500.0, **rope}
    scaling = {**rope}
    del scaling["rope_theta"]
    if rope["rope_type"] == "dynamic":
        scaling["original_max_position_embeddings"] = TRAINED
    options = {"max_wavelength": 500.0, "scaling": scaling}
    return llama(options, rope_parameters=rope)


def mistral():
    options = {"use_bias": False, "sliding_window": WINDOW}
    return rotary_decoder("mistral", "Mistral", options, sliding_window=WINDOW)


def qwen2(layer):
    return rotary_decoder(
        "qwen2",
        "Qwen2",
        {"use_bias": True, "sliding_window": WINDOW if layer else None},
        layer,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    )


def qwen3(layer):
    return rotary_decoder(
        "qwen3",
        "Qwen3",
        {
            "key_dim": 16,
            "qk_norm": "rms",
            "qk_norm_epsilon": 0.01,
            "use_bias": True,
            "sliding_window": WINDOW if layer else None,
        },
        layer,
        head_dim=16,
        rms_norm_eps=0.01,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    )


def gemma():
    options = {"key_dim": 16}
    return rotary_decoder("gemma", "Gemma", options, head_dim=16)


def gemma2(layer, cap=3.0):
    return rotary_decoder(
        "gemma2",
        "Gemma2",
        {
            "key_dim": 16,
            "logit_soft_cap": cap,
            "scale": 20**-0.5,
            "sliding_window": None if layer else WINDOW,
        },
        layer,
        head_dim=16,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=cap,
        sliding_window=WINDOW,
    )


def gemma3(layer):
    scaling = {"rope_type": "linear", "factor": 8.0}
    return rotary_decoder(
        "gemma3",
        "Gemma3",
        {
            "key_dim": 16,
            "logit_soft_cap": None,  # the module does not apply its own
            "scale": 20**-0.5,
            "qk_norm": "rms",
            "qk_norm_epsilon": 0.01,
            "sliding_window": None if layer else WINDOW,
            "max_wavelength": 900.0 if layer else 100.0,
            "scaling": scaling if layer else None,
        },
        layer,
        config_name="Gemma3TextConfig",
        head_dim=16,
        query_pre_attn_scalar=20,
        rms_norm_eps=0.01,
        attn_logit_softcapping=3.0,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {**scaling, "rope_theta": 900.0},
        },
    )


def gpt_oss(layer):
    yarn = {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": TRAINED,
    }
    return rotary_decoder(
        "gpt_oss",
        "GptOss",
        {
            "key_dim": 8,
            "attention_sink": "learned",
            "use_bias": True,
            "sliding_window": None if layer else WINDOW,
            "max_wavelength": 700.0,
            "scaling": yarn,
        },
        layer,
        head_dim=8,
        max_position_embeddings=32 * TRAINED,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={**yarn, "rope_theta": 700.0},
    )


def phi3(share, window):
    return rotary_decoder(
        "phi3",
        "Phi3",
        {
            "use_bias": False,
            "rotary_dim": None if share == 1 else 6,
            "sliding_window": window,
        },
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 300.0,
            "partial_rotary_factor": share,
        },
        sliding_window=window,
        pad_token_id=0,
    )


def gpt2(memory=False, **configuration):
    configuration = {"n_embd": WIDTH, "n_head": 4, "attn_pdrop": 0.2, **configuration}
    config = config_of("gpt2", "GPT2Config", **configuration)
    module = modeling("gpt2").GPT2Attention(
        config, is_cross_attention=memory, layer_idx=2
    )
    random(module)
    scale = 12**-0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale = scale / 3
    options = {"num_heads": 4, "use_bias": True, "dropout": 0.2, "position": None}
    options |= {"scale": None if scale == 12**-0.5 else scale}
    if memory:
        return Case(
            module,
            lambda x, y: module(x, encoder_hidden_states=y)[0],
            options,
            memory=True,
        )
    return Case(
        module,
        lambda x: module(x, attention_mask=causal_mask())[0],
        options,
        call=CAUSAL,
    )


def bloom(heads):
    config = config_of(
        "bloom",
        "BloomConfig",
        hidden_size=WIDTH,
        n_head=heads,
        attention_dropout=0.2,
    )
    package = modeling("bloom")
    module = random(package.BloomAttention(config, 0))

    def expected(x):
        alibi = package.build_alibi_tensor(torch.ones(x.shape[:2]), heads, x.dtype)
        # With nothing to add: the residual is the caller's.
        nothing = torch.zeros_like(x)
        return module(x, nothing, alibi, causal_mask())[0]

    options = {"num_heads": heads, "dropout": 0.2, "use_bias": True}
    return Case(module, expected, options, call=CAUSAL)


def bert_config(family, prefix):
    return config_of(
        family,
        f"{prefix}Config",
        hidden_size=WIDTH,
        num_attention_heads=4,
        attention_probs_dropout_prob=0.2,
    )


BERT = {"num_heads": 4, "use_bias": True, "dropout": 0.2, "position": None}


def bert_heads(family, prefix, memory=False):
    """The heads alone, without an output projection."""
    name = f"{prefix}{'Cross' if memory else 'Self'}Attention"
    module = random(getattr(modeling(family), name)(bert_config(family, prefix)))
    return Case(module, lambda *given: module(*given)[0], BERT, memory)


def bert(family, prefix, memory=False):
    """Without its residual and LayerNorm, which stay outside."""
    module = getattr(modeling(family), f"{prefix}Attention")(
        bert_config(family, prefix), is_cross_attention=memory
    )
    random(module)

    def expected(x, y=None):
        return module.output.dense(module.self(x, encoder_hidden_states=y)[0])

    return Case(module, expected, BERT, memory)


def distilbert():
    config = config_of(
        "distilbert", "DistilBertConfig", dim=WIDTH, n_heads=4, attention_dropout=0.2
    )
    module = random(modeling("distilbert").DistilBertSelfAttention(config))
    return Case(module, lambda x: module(x)[0], BERT)


def bart(family, prefix, memory=False, is_decoder=False):
    config = config_of(family, f"{prefix}Config", d_model=WIDTH)
    module = getattr(modeling(family), f"{prefix}Attention")(
        embed_dim=WIDTH,
        num_heads=4,
        dropout=0.2,
        is_decoder=is_decoder or memory,
        layer_idx=0,
        config=config,
    )
    random(module)
    if memory:
        return Case(module, lambda x, y: module(x, y)[0], BERT, memory=True)
    mask = causal_mask() if is_decoder else None
    call = CAUSAL if is_decoder else {}
    return Case(module, lambda x: module(x, attention_mask=mask)[0], BERT, call=call)


def vision(family, prefix, config_name=None, dropout="attention_dropout", **more):
    config = config_of(
        family,
        config_name or f"{prefix}VisionConfig",
        hidden_size=WIDTH,
        num_attention_heads=4,
        **{dropout: 0.2},
        **more,
    )
    module = random(getattr(modeling(family), f"{prefix}Attention")(config))
    return Case(module, lambda x: module(x)[0], BERT)


def t5(family="t5", prefix="T5", table=True, memory=False, **configuration):
    configuration = {
        "d_model": WIDTH,
        "d_kv": 10,
        "num_heads": 4,
        "dropout_rate": 0.2,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 10,
        **configuration,
    }
    config = config_of(family, f"{prefix}Config", **configuration)
    module = getattr(modeling(family), f"{prefix}Attention")(
        config, has_relative_attention_bias=table, layer_idx=0
    )
    random(module)
    is_causal = config.is_decoder and not memory
    mask = causal_mask() if is_causal else None
    options = {
        "num_heads": 4,
        "key_dim": 10,
        "scale": 1.0,
        "use_bias": False,
        "dropout": 0.2,
    }
    return Case(
        module,
        lambda x, y=None: module(x, mask=mask, key_value_states=y)[0],
        options,
        memory,
        CAUSAL if is_causal else {},
    )


YARN = {"rope_type": "yarn", "original_max_position_embeddings": TRAINED}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": TRAINED,
}

CASES = {
    "bert": lambda: bert("bert", "Bert"),
    "bert cross": lambda: bert("bert", "Bert", memory=True),
    "bert heads": lambda: bert_heads("bert", "Bert"),
    "bert heads cross": lambda: bert_heads("bert", "Bert", memory=True),
    "roberta": lambda: bert("roberta", "Roberta"),
    "roberta heads": lambda: bert_heads("roberta", "Roberta"),
    "roberta heads cross": lambda: bert_heads("roberta", "Roberta", memory=True),
    "distilbert": distilbert,
    "gpt2": gpt2,
    "gpt2 cross": lambda: gpt2(memory=True),
    "gpt2 unscaled": lambda: gpt2(scale_attn_weights=False),
    "gpt2 by layer": lambda: gpt2(scale_attn_by_inverse_layer_idx=True),
    "gpt2 unscaled by layer": lambda: gpt2(
        scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt2 upcast": lambda: gpt2(reorder_and_upcast_attn=True),
    "llama": llama,
    "llama biased": lambda: llama({"use_bias": True}, attention_bias=True),
    "llama wide heads": lambda: llama({"key_dim": 20}, head_dim=20),
    "llama one key head": lambda: llama(
        {"num_key_value_heads": 1}, num_key_value_heads=1
    ),
    "llama linear": lambda: scaled_llama(rope_type="linear", factor=4.0),
    "llama dynamic": lambda: scaled_llama(rope_type="dynamic", factor=4.0),
    "llama dynamic, other length": lambda: scaled_llama(
        rope_type="dynamic", factor=4.0, original_max_position_embeddings=4
    ),
    "llama yarn": lambda: scaled_llama(**YARN, factor=4.0),
    "llama yarn factors": lambda: scaled_llama(
        **YARN, factor=4.0, beta_fast=3.0, beta_slow=0.5, mscale=0.7, mscale_all_dim=0.4
    ),
    "llama yarn attention factor": lambda: scaled_llama(
        **YARN, factor=4.0, attention_factor=1.4, truncate=False
    ),
    "llama yarn of lengths": lambda: llama(
        {"scaling": {**YARN, "factor": 8.0}},
        rope_parameters={**YARN, "factor": None, "rope_theta": 500.0},
        max_position_embeddings=8 * TRAINED,
    ),
    "llama 3": lambda: scaled_llama(**LLAMA3),
    "mistral": mistral,
    "qwen2 full": lambda: qwen2(0),
    "qwen2 window": lambda: qwen2(1),
    "qwen3 full": lambda: qwen3(0),
    "qwen3 window": lambda: qwen3(1),
    "gemma": gemma,
    "gemma2 window": lambda: gemma2(0),
    "gemma2 full": lambda: gemma2(1),
    "gemma2 uncapped": lambda: gemma2(0, cap=None),
    "gemma3 window": lambda: gemma3(0),
    "gemma3 full": lambda: gemma3(1),
    "gpt_oss window": lambda: gpt_oss(0),
    "gpt_oss full": lambda: gpt_oss(1),
    "phi3": lambda: phi3(1.0, None),
    "phi3 partial window": lambda: phi3(0.5, WINDOW),
    "t5 encoder": t5,
    "t5 decoder": lambda: t5(is_decoder=True),
    "t5 cross": lambda: t5(table=False, memory=True, is_decoder=True),
    "mt5": lambda: t5("mt5", "MT5"),
    "bloom": lambda: bloom(4),
    "bloom, no power of two": lambda: bloom(6),
    "bart encoder": lambda: bart("bart", "Bart"),
    "bart decoder": lambda: bart("bart", "Bart", is_decoder=True),
    "bart cross": lambda: bart("bart", "Bart", memory=True),
    "mbart": lambda: bart("mbart", "MBart"),
    "whisper encoder": lambda: bart("whisper", "Whisper"),
    "whisper decoder": lambda: bart("whisper", "Whisper", is_decoder=True),
    "whisper cross": lambda: bart("whisper", "Whisper", memory=True),
    "vit": lambda: vision("vit", "ViT", "ViTConfig", "attention_probs_dropout_prob"),
    "vit without qkv_bias": lambda: vision(
        "vit", "ViT", "ViTConfig", "attention_probs_dropout_prob", qkv_bias=False
    ),
    "clip": lambda: vision("clip", "CLIP"),
    "siglip": lambda: vision("siglip", "Siglip"),
}


@pytest.fixture(params=CASES)
def case(request):
    return built(request.param)


@functools.cache
def built(name):
    return CASES[name]()


def output_of(layer, arrays, **call):
    tensors = list(map(to_tensor, arrays))
    return to_numpy(call_at_once(lambda *given: layer(*given, **call), tensors))


def output_of_module(expected, arrays, dtype=torch.float32):
    with torch.no_grad():
        output = expected(*(torch.tensor(array, dtype=dtype) for array in arrays))
    return output.float().numpy()


def test_numbers_are_those_of_the_module(case):
    arrays = inputs(case.memory)
    layer = from_huggingface(case.module)
    np.testing.assert_allclose(
        output_of(layer, arrays, **case.call),
        output_of_module(case.expected, arrays),
        rtol=0,
        atol=TOLERANCE,
    )
    assert found_options(layer, case.options) == case.options


def found_options(layer, names):
    """Returns a layer's options, and its position's, by name."""
    position = layer.position.get_config() if layer.position else {}
    config = {**layer.get_config(), "position": layer.position}
    config["num_key_value_heads"] = layer.num_key_value_heads
    return {name: {**position, **config}.get(name) for name in names}
