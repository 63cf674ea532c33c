"""Modules of transformers, each run beside the layer that is made of it."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha.info import MissingExtra
from keras_mha.interop import from_huggingface
from keras_mha.interop.huggingface import READERS
from tests.helpers import to_numpy, to_tensor

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
            "key_dim": 16,
            "attention_sink": "learned",
            "use_bias": True,
            "sliding_window": None if layer else WINDOW,
            "max_wavelength": 700.0,
            "scaling": yarn,
        },
        layer,
        head_dim=16,
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


def swin():
    """Of a window that is no square, which would hide what the axes are."""
    package = modeling("swin")
    config = config_of("swin", "SwinConfig", attention_probs_dropout_prob=0.2)
    module = package.SwinAttention(config, WIDTH, 4, window_size=2)
    module.relative_position_bias = package.SwinRelativePositionBias(4, (3, 4))
    random(module)
    options = {**BERT, "window": (3, 4)}
    del options["position"]  # it has one
    return Case(module, lambda x: module(x)[0], options)


def t5(family="t5", prefix="T5", table=True, memory=False, **configuration):
    configuration = {
        "d_model": WIDTH,
        "d_kv": 16,
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
        "key_dim": 16,
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
    "llama wide heads": lambda: llama({"key_dim": 16}, head_dim=16),
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
    "swin": swin,
}


@pytest.fixture(params=CASES)
def case(request):
    return built(request.param)


@functools.cache
def built(name):
    return CASES[name]()


def output_of(layer, arrays, **call):
    # One op at a time: most cases have shapes that JAX has compiled for another.
    return to_numpy(layer(*map(to_tensor, arrays), **call))


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


def test_every_known_module_is_run():
    run = {type(built(name).module).__name__ for name in CASES}
    assert run == set(READERS)


def test_position_is_of_its_kind():
    kinds = {
        "bert": type(None),
        "llama": keras_mha.RotaryEmbedding,
        "bloom": keras_mha.ALiBi,
        "t5 encoder": keras_mha.RelativePositionBias,
        "t5 cross": type(None),
    }
    for name, kind in kinds.items():
        assert type(from_huggingface(built(name).module).position) is kind


@pytest.mark.parametrize("name", ["bert", "roberta", "bert cross"])
def test_layer_norm_and_residual_of_bert_stay_outside(name):
    family = {"roberta": "roberta"}.get(name, "bert")
    prefix = family.capitalize()
    case = bert(family, prefix, memory=name == "bert cross")
    arrays = inputs(case.memory)
    output = output_of(from_huggingface(case.module), arrays)
    norm = case.module.output.LayerNorm
    with torch.no_grad():
        x, *memory = map(torch.tensor, arrays)
        wanted = case.module(x, encoder_hidden_states=(memory or [None])[0])[0]
        found = norm(torch.tensor(output).float() + x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_residual_of_bloom_stays_outside():
    module = built("bloom").module
    x, residual = inputs()[0], inputs()[0][::-1].copy()
    output = output_of(from_huggingface(module), [x], **CAUSAL)
    alibi = modeling("bloom").build_alibi_tensor(
        torch.ones(x.shape[:2]), module.num_heads, torch.float32
    )
    with torch.no_grad():
        wanted = module(torch.tensor(x), torch.tensor(residual), alibi, causal_mask())
    np.testing.assert_allclose(output + residual, wanted[0], rtol=0, atol=TOLERANCE)


# ---------------------------------------------------------------------- t5's table


@pytest.mark.parametrize("is_decoder", [False, True])
def test_blocks_of_t5_share_the_first_ones_table(is_decoder):
    options = {
        "d_model": WIDTH,
        "d_kv": 16,
        "d_ff": 8,
        "num_heads": 4,
        "num_layers": 2,
        "vocab_size": 8,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 10,
    }
    config = config_of("t5", "T5Config", is_decoder=is_decoder, **options)
    stack = random(modeling("t5").T5Stack(config))
    modules = [block.layer[0].SelfAttention for block in stack.block]
    first = from_huggingface(modules[0])
    second = from_huggingface(modules[1], position=first.position)
    assert second.position is first.position
    x = inputs()[0]
    mask = causal_mask() if is_decoder else None
    with torch.no_grad():
        hidden, bias, _ = modules[0](torch.tensor(x), mask=mask)
        # What the stack hands on from block to block.
        wanted = modules[1](hidden, mask=mask, position_bias=bias)[0]
    call = CAUSAL if is_decoder else {}
    found = output_of(second, [output_of(first, [x], **call)], **call)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_module_with_a_position_of_its_own_takes_no_other():
    position = from_huggingface(built("t5 encoder").module).position
    with pytest.raises(ValueError, match="relative_attention_bias"):
        from_huggingface(built("t5 encoder").module, position=position)
    for name in ("llama", "bloom", "bert"):
        with pytest.raises(ValueError, match="take theirs from another one"):
            from_huggingface(built(name).module, position=position)


def test_position_of_another_stack_is_refused():
    encoder = from_huggingface(built("t5 encoder").module)
    decoder = t5(table=False, is_decoder=True).module
    with pytest.raises(ValueError, match=r"'bidirectional': False.* a position with"):
        from_huggingface(decoder, position=encoder.position)
    with pytest.raises(TypeError, match="must be a RelativePositionBias"):
        from_huggingface(decoder, position=keras_mha.RotaryEmbedding())
    other_heads = keras_mha.RelativePositionBias(5, 8, 10, bidirectional=False)
    with pytest.raises(ValueError, match="num_heads=5 and 4"):
        from_huggingface(decoder, position=other_heads)


# ---------------------------------------------------------------------- configurations


def with_configuration(case, **changes):
    """A copy of the module that has another configuration."""
    module = copy.deepcopy(case.module)
    kept = {"max_position_embeddings": TRAINED, "sliding_window": WINDOW}
    module.config = types.SimpleNamespace(**kept, **changes)
    return module


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ("llama", {"rope_theta": 10_000.0, "rope_scaling": None}),
        (
            "llama linear",
            {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        ),
        (
            "llama dynamic",
            {"rope_theta": 500.0, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        ),
        (
            "llama 3",
            {"rope_theta": 500.0, "rope_scaling": LLAMA3},
        ),
        (
            "gemma3 window",
            {
                "rope_theta": 900.0,
                "rope_local_base_freq": 100.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (
            "gemma3 full",
            {
                "rope_theta": 900.0,
                "rope_local_base_freq": 100.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (
            "phi3 partial window",
            {"rope_theta": 300.0, "rope_scaling": None, "partial_rotary_factor": 0.5},
        ),
    ],
)
def test_configuration_of_version_4(new, old):
    case = built(new)
    layer = from_huggingface(with_configuration(case, **old))
    assert found_options(layer, case.options) == case.options
    wanted = from_huggingface(case.module).position.max_wavelength
    assert layer.position.max_wavelength == wanted


@pytest.mark.parametrize("rope_type", ["longrope", "proportional", "made_up"])
def test_unknown_scaling_of_rotary_positions_is_refused(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 100.0}
    module = with_configuration(built("llama"), rope_parameters=rope)
    with pytest.raises(ValueError, match=f"rope_type='{rope_type}'"):
        from_huggingface(module)


def test_rotary_part_of_the_features_is_refused_where_all_rotate():
    rope = {"rope_type": "default", "partial_rotary_factor": 0.5}
    module = with_configuration(built("llama"), rope_parameters=rope)
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.5"):
        from_huggingface(module)


def test_window_that_transformers_counts_otherwise_is_refused():
    module = copy.deepcopy(built("mistral").module)
    module.config.is_causal = False
    with pytest.raises(ValueError, match="is_causal=False"):
        from_huggingface(module)


def test_relative_positions_of_bert_are_refused():
    module = copy.deepcopy(built("bert").module)
    module.self.position_embedding_type = "relative_key"
    with pytest.raises(ValueError, match="position_embedding_type='relative_key'"):
        from_huggingface(module)


def test_adapters_are_refused():
    class Adapted(torch.nn.Linear):
        pass

    module = copy.deepcopy(built("llama").module)
    module.k_proj = Adapted(WIDTH, 24)
    with pytest.raises(ValueError, match=r"k_proj must be a torch\.nn\.Linear"):
        from_huggingface(module)


def test_module_built_otherwise_is_refused():
    module = copy.deepcopy(built("vit").module)
    del module.q_proj
    with pytest.raises(ValueError, match=r"(?s)not as transformers 5.*set_projections"):
        from_huggingface(module)


# ---------------------------------------------------------------------- other modules


def subclass_of_llama():
    parent = type(built("llama").module)
    module = copy.deepcopy(built("llama").module)
    module.__class__ = type("LlamaAttention", (parent,), {"__module__": __name__})
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.Linear(2, 2),
        lambda: torch.nn.MultiheadAttention(4, 2),
        lambda: built("bert").module.output,
        subclass_of_llama,
        lambda: None,
    ],
)
def test_unknown_module_is_refused_with_the_known_ones(make):
    module = make()
    with pytest.raises(TypeError) as refusal:
        from_huggingface(module)
    message = str(refusal.value)
    assert f"Received: a {type(module).__module__}.{type(module).__name__}" in message
    assert "keras_mha.interop.set_projections" in message
    assert all(name in message for name in READERS)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_missing_package_is_named_with_its_install_line(missing, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == missing else find(name, *more),
    )
    with pytest.raises(MissingExtra) as refusal:
        from_huggingface(built("bert").module)
    message = f"from_huggingface needs {missing}, pip install "
    assert message + '"keras-mha[huggingface]" installs it' in str(refusal.value)


# ---------------------------------------------------------------------- the layer


def test_module_and_layer_do_not_share_memory():
    case = gpt2()
    before = {name: x.clone() for name, x in case.module.state_dict().items()}
    layer = from_huggingface(case.module)
    for weight in layer.weights:
        weight.assign(np.zeros(weight.shape))
    after = case.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    layer = from_huggingface(case.module)
    weights = [np.array(x) for x in layer.get_weights()]
    random(case.module, seed=3)
    for weight, kept in zip(layer.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(weight, kept)


def test_module_stays_in_its_mode_and_device():
    module = copy.deepcopy(built("llama").module).train()
    module.q_proj.weight.requires_grad_(False)
    from_huggingface(module)
    assert module.training
    assert not module.q_proj.weight.requires_grad
    assert module.k_proj.weight.requires_grad
    assert module.k_proj.weight.grad is None


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss window"])
def test_module_in_bfloat16(name):
    case = CASES[name]()
    arrays = inputs()
    layer = from_huggingface(case.module.bfloat16())
    assert layer.compute_dtype == "float32"
    rounded = case._replace(module=case.module.float())
    np.testing.assert_allclose(
        output_of(layer, arrays, **case.call),
        output_of_module(rounded.expected, arrays),
        rtol=0,
        atol=TOLERANCE,
    )
    half = from_huggingface(case.module.bfloat16(), dtype="bfloat16")
    assert half.compute_dtype == "bfloat16"
    wanted = output_of_module(case.expected, arrays, torch.bfloat16)
    assert np.abs(output_of(half, arrays, **case.call) - wanted).max() < 0.1


def test_further_arguments_are_those_of_any_keras_layer():
    layer = from_huggingface(
        built("bert").module, name="heads", dtype="float16", trainable=False
    )
    assert layer.name == "heads"
    assert layer.compute_dtype == "float16"
    assert not layer.trainable_weights


@pytest.mark.parametrize("name", ["t5 encoder", "gpt_oss window", "gemma3 full"])
def test_layer_is_saved_and_loaded(name, tmp_path):
    case = built(name)
    x = keras.Input((None, WIDTH))
    model = keras.Model(x, from_huggingface(case.module)(x, **case.call))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    arrays = inputs()
    np.testing.assert_allclose(
        output_of(loaded, arrays),
        output_of_module(case.expected, arrays),
        rtol=0,
        atol=TOLERANCE,
    )
