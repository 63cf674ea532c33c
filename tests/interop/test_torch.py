"""`torch.nn.MultiheadAttention` beside ours, both ways, whatever Keras runs on."""

import importlib.util

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha.info import MissingExtra
from keras_mha.interop import from_torch, to_torch
from tests.helpers import outputs_and_gradients, to_numpy, to_tensor, with_variables

torch = pytest.importorskip("torch", reason="compares with torch.nn")

BATCH, QUERIES, KEYS, WIDTH, HEADS = 2, 3, 4, 8, 2


def make_module(**options):
    """A module in evaluation mode; its biases, which start at zero, are random too."""
    options = {"batch_first": True, **options}
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(
        WIDTH, options.pop("num_heads", HEADS), **options
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 2)
    return module.eval()


def make_layer(widths=(WIDTH, WIDTH, WIDTH), **options):
    """A built layer of random weights for query, value and key of these widths."""
    options = {"num_heads": HEADS, "key_dim": WIDTH // HEADS, **options}
    layer = keras_mha.MultiHeadAttention(**options)
    layer.build(*((None, None, width) for width in widths))
    rng = np.random.default_rng(1)
    layer.set_weights([rng.normal(size=x.shape) / 2 for x in layer.get_weights()])
    return layer


def inputs_for(module):
    """Query, key and value, in torch's order."""
    rng = np.random.default_rng(2)
    shapes = (QUERIES, WIDTH), (KEYS, module.kdim), (KEYS, module.vdim)
    return [rng.normal(size=(BATCH, *shape)).astype("float32") for shape in shapes]


def run_module(module, query, key, value, **masks):
    """The module's output and its scores, a set for each head, batch first."""
    inputs = [torch.tensor(x) for x in (query, key, value)]
    if not module.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    masks = {
        name: torch.tensor(x) if isinstance(x, np.ndarray) else x
        for name, x in masks.items()
    }
    with torch.no_grad():
        output, scores = module(*inputs, average_attn_weights=False, **masks)
    output = output if module.batch_first else output.transpose(0, 1)
    return output.numpy(), scores.numpy()


def run_layer(layer, query, key, value, **masks):
    """The layer's output and scores; the inputs come in torch's order."""
    output, scores = layer(
        *map(to_tensor, (query, value, key)), return_attention_scores=True, **masks
    )
    return to_numpy(output), to_numpy(scores)


def assert_same(module, layer, torch_masks=None, masks=None):
    inputs = inputs_for(module)
    expected, expected_scores = run_module(module, *inputs, **torch_masks or {})
    output, scores = run_layer(layer, *inputs, **masks or {})
    np.testing.assert_allclose(output, expected, atol=1e-5)
    # torch shows the weights of what it adds, too.
    np.testing.assert_allclose(scores, expected_scores[..., :KEYS], atol=1e-5)


OPTIONS = {
    "plain": {},
    "one head": {"num_heads": 1},
    "no bias": {"bias": False},
    "key's width": {"kdim": 5},
    "value's width": {"vdim": 6},
    "both widths": {"kdim": 5, "vdim": 6},
    "widths without bias": {"kdim": 5, "vdim": 6, "bias": False},
    "zero attention": {"add_zero_attn": True},
    "learned key and value": {"add_bias_kv": True},
    "learned key and value of other widths": {
        "add_bias_kv": True,
        "kdim": 5,
        "vdim": 6,
        "bias": False,
    },
    "sequence first": {"batch_first": False},
    "all": {
        "kdim": 5,
        "vdim": 6,
        "add_bias_kv": True,
        "add_zero_attn": True,
        "dropout": 0.3,
    },
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def module(request):
    return make_module(**request.param)


# ------------------------------------------------------------------ from torch


def test_imported_layer_has_the_modules_numbers(module):
    assert_same(module, from_torch(module))


def test_imported_layer_has_no_more_than_the_module_has():
    config = from_torch(make_module()).get_config()
    plain = keras_mha.MultiHeadAttention(HEADS, WIDTH // HEADS).get_config()
    plain.pop("name"), config.pop("name")
    assert config == plain


def test_dropout_is_taken_over():
    assert from_torch(make_module(dropout=0.3)).dropout == 0.3


def test_missing_biases_are_missing_here_too():
    layer = from_torch(make_module(bias=False))
    assert not layer.use_bias
    assert len(layer.weights) == 4


def test_names_and_dtypes_are_as_for_any_layer():
    layer = from_torch(
        make_module(), name="attention", dtype="mixed_bfloat16", trainable=False
    )
    assert layer.name == "attention"
    assert layer.compute_dtype == "bfloat16"
    assert not layer.trainable_weights


# What torch's module learns beside the sequence's keys is seen through every mask.
learns = pytest.mark.parametrize("add_bias_kv", [False, True])


@learns
def test_key_padding_mask_is_true_where_ours_is_false(add_bias_kv):
    module = make_module(add_bias_kv=add_bias_kv)
    padding = np.array([[False, False, True, True], [False, True, False, False]])
    assert_same(
        module,
        from_torch(module),
        {"key_padding_mask": padding},
        {"value_mask": ~padding},
    )


def test_attention_mask_is_true_where_ours_is_false():
    module = make_module()
    hidden = np.array([[False, True, True, True], [True, False] * 2, [False] * 4])
    assert_same(
        module, from_torch(module), {"attn_mask": hidden}, {"attention_mask": ~hidden}
    )


def test_attention_mask_of_every_head_is_folded_into_the_batch_there():
    module = make_module()
    hidden = np.random.default_rng(3).random((BATCH * HEADS, QUERIES, KEYS)) < 0.5
    hidden[..., 1] = False
    ours = ~hidden.reshape(BATCH, HEADS, QUERIES, KEYS)
    assert_same(
        module, from_torch(module), {"attn_mask": hidden}, {"attention_mask": ours}
    )


@learns
def test_attention_mask_of_numbers_is_a_bias_here(add_bias_kv):
    module = make_module(add_bias_kv=add_bias_kv)
    bias = np.random.default_rng(4).normal(size=(QUERIES, KEYS)).astype("float32")
    assert_same(
        module, from_torch(module), {"attn_mask": bias}, {"attention_bias": bias}
    )


@learns
def test_causal_mask_and_padding_together(add_bias_kv):
    module = make_module(add_bias_kv=add_bias_kv)
    future = np.arange(KEYS) > np.arange(QUERIES)[:, None]
    padding = np.array([[False, True, True, False], [False] * 4])
    assert_same(
        module,
        from_torch(module),
        {"attn_mask": future, "is_causal": True, "key_padding_mask": padding},
        {"use_causal_mask": True, "value_mask": ~padding},
    )


@pytest.mark.parametrize("option", ["add_zero_attn", "add_bias_kv"])
def test_query_that_sees_nothing_but_what_is_added(option):
    module = make_module(**{option: True})
    padding = np.array([[True] * 4, [False] * 4])
    layer = from_torch(module)
    assert_same(module, layer, {"key_padding_mask": padding}, {"value_mask": ~padding})


def test_query_that_sees_nothing_gives_zeros_here_and_nan_there():
    module = make_module()
    padding = np.array([[True] * 4, [False] * 4])
    expected, _ = run_module(module, *inputs_for(module), key_padding_mask=padding)
    output, _ = run_layer(from_torch(module), *inputs_for(module), value_mask=~padding)
    bias = module.out_proj.bias.detach().numpy()
    assert np.isnan(expected[0]).all()
    np.testing.assert_allclose(output[0], np.tile(bias, (QUERIES, 1)), atol=1e-6)
    np.testing.assert_allclose(output[1], expected[1], atol=1e-5)


def test_gradients_of_the_inputs_are_the_modules():
    module = make_module(kdim=5, vdim=6)
    arrays, cotangent = inputs_for(module), make_cotangent()
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    expected = torch.autograd.grad(module(*tensors)[0], tensors, cotangent)
    layer = from_torch(module)
    _, found = outputs_and_gradients(
        lambda query, key, value: layer(query, value, key), arrays, [cotangent.numpy()]
    )
    for gradient, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(gradient, theirs.numpy(), atol=1e-5)


def test_gradients_of_the_learned_key_and_value_are_the_modules():
    module = make_module(add_bias_kv=True)
    arrays, cotangent = inputs_for(module), make_cotangent()
    padding = np.array([[True] * KEYS, [False, True, False, False]])
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    output, _ = module(*tensors, key_padding_mask=torch.tensor(padding))
    wanted = [*tensors, module.bias_k, module.bias_v]
    expected = torch.autograd.grad(output, wanted, cotangent)
    layer = from_torch(module)
    variables = [layer.memory_key, layer.memory_value]
    _, found = outputs_and_gradients(
        with_variables(
            lambda query, key, value: layer(query, value, key, value_mask=~padding),
            variables,
        ),
        [*arrays, *(to_numpy(x.value) for x in variables)],
        [cotangent.numpy()],
    )
    for gradient, theirs in zip(found, expected, strict=True):
        theirs = theirs.numpy().reshape(gradient.shape)
        np.testing.assert_allclose(gradient, theirs, atol=1e-5)


def make_cotangent():
    draws = np.random.default_rng(5).normal(size=(BATCH, QUERIES, WIDTH))
    return torch.tensor(draws).float()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_module_of_another_dtype(dtype):
    module = make_module()
    module.to(getattr(torch, dtype))
    layer = from_torch(module)
    kernel = module.in_proj_weight[:WIDTH].detach().double().numpy()
    found = to_numpy(layer.query_dense.kernel).reshape(WIDTH, -1).T
    np.testing.assert_array_equal(found, kernel.astype("float32"))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_module_stays_as_it_was(mode):
    module = getattr(make_module(dropout=0.5), mode)()
    state = {name: x.clone() for name, x in module.state_dict().items()}
    layer = from_torch(module)
    layer.set_weights([np.zeros_like(x) for x in layer.get_weights()])
    assert module.training == (mode == "train")
    assert all(x.requires_grad for x in module.parameters())
    for name, x in module.state_dict().items():
        assert torch.equal(x, state[name])


def test_parametrized_module_gives_the_weights_it_uses():
    class Doubled(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    module = make_module()
    torch.nn.utils.parametrize.register_parametrization(
        module, "in_proj_weight", Doubled()
    )
    assert_same(module, from_torch(module))


def test_module_that_has_no_gradients():
    module = make_module().requires_grad_(False)
    assert_same(module, from_torch(module))


def test_imported_layer_is_saved_and_loaded(tmp_path):
    module = make_module(kdim=5, vdim=5, add_zero_attn=True)
    inputs = keras.Input((QUERIES, WIDTH)), keras.Input((KEYS, 5))
    model = keras.Model(inputs, from_torch(module)(*inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    query, key, _ = inputs_for(module)
    expected, _ = run_module(module, query, key, key)
    output = loaded([to_tensor(query), to_tensor(key)])
    np.testing.assert_allclose(to_numpy(output), expected, atol=1e-5)


# ------------------------------------------------------------------ to torch

LAYERS = {
    "plain": {},
    "one head": {"num_heads": 1, "key_dim": WIDTH},
    "no bias": {"use_bias": False},
    "widths": {"widths": (WIDTH, 6, 5)},
    "widths without bias": {"widths": (WIDTH, 6, 5), "use_bias": False},
    "sink": {"attention_sink": "zero"},
    "learned key and value": {"num_memory_key_values": 1},
    "learned key and value of other widths": {
        "num_memory_key_values": 1,
        "attention_sink": "zero",
        "widths": (WIDTH, 6, 5),
        "use_bias": False,
    },
    "options at what they are anyway": {
        "value_dim": WIDTH // HEADS,
        "output_shape": WIDTH,
        "scale": (WIDTH // HEADS) ** -0.5,
        "num_key_value_heads": HEADS,
        "attention_axes": 1,
    },
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request):
    return make_layer(**request.param)


def test_exported_module_has_the_layers_numbers(layer):
    assert_same(to_torch(layer), layer)


def test_exported_module_comes_back_as_the_same_layer(layer):
    back = from_torch(to_torch(layer))
    for weight, other in zip(back.get_weights(), layer.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, other)


def test_imported_layer_goes_back_as_the_same_module(module):
    back = to_torch(from_torch(module)).state_dict()
    state = module.state_dict()
    assert list(back) == list(state)
    for name, weight in state.items():
        assert torch.equal(back[name], weight), name


def test_exported_module_has_the_batch_first_and_evaluates():
    module = to_torch(make_layer(dropout=0.25))
    assert module.batch_first
    assert not module.training
    assert module.dropout == 0.25


def test_exported_module_can_be_trained():
    module = to_torch(make_layer())
    assert all(x.requires_grad and x.is_leaf for x in module.parameters())
    assert {x.device.type for x in module.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float64", "float64"),
        ("float32", "float32"),
        ("mixed_bfloat16", "float32"),
        ("float16", "float32"),
        ("bfloat16", "float32"),
    ],
)
def test_exported_modules_dtype(dtype, expected):
    layer = make_layer(dtype=dtype)
    module = to_torch(layer)
    assert {str(x.dtype) for x in module.parameters()} == {f"torch.{expected}"}
    kernel = to_numpy(layer.output_dense.kernel).reshape(WIDTH, WIDTH).T
    np.testing.assert_array_equal(module.out_proj.weight.detach().numpy(), kernel)


def test_layer_stays_as_it_was():
    layer = make_layer()
    before = layer.get_weights()
    module = to_torch(layer)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    for weight, copy in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, copy)


@pytest.mark.parametrize("name", ["query", "key", "value", "output"])
def test_lora_is_merged(name):
    layer = make_layer(use_bias=False)
    dense = getattr(layer, f"{name}_dense")
    dense.enable_lora(2)
    rng = np.random.default_rng(6)
    for part in (dense.lora_kernel_a, dense.lora_kernel_b):
        part.assign(rng.normal(size=part.shape))
    assert_same(to_torch(layer), layer)


# Each line: what the layer has that torch's module has not, and how it is named.
MISSING_THERE = [
    ({"use_gate": True}, "use_gate"),
    ({"sliding_window": 3}, "sliding_window"),
    ({"position": keras_mha.RotaryEmbedding()}, "position"),
    ({"position": keras_mha.ALiBi()}, "position"),
    ({"qk_norm": "rms"}, "qk_norm"),
    ({"qk_norm": "l2", "scale": 0.5}, "qk_norm"),
    ({"attention_sink": "learned"}, "attention_sink"),
    ({"logit_soft_cap": 30.0}, "logit_soft_cap"),
    ({"num_memory_key_values": 2}, "num_memory_key_values"),
    ({"talking_heads": "pre"}, "talking_heads"),
    ({"num_memory_key_values": 1, "qk_norm": "rms"}, "qk_norm"),
    ({"scale": 1.0}, "scale"),
    ({"num_key_value_heads": 1}, "num_key_value_heads"),
    ({"value_dim": 3}, "value_dim"),
    ({"key_dim": 3}, "key_dim"),
    ({"output_shape": 5}, "output_shape"),
    ({"output_shape": (2, 4)}, "output_shape"),
]


@pytest.mark.parametrize(("options", "name"), MISSING_THERE)
def test_what_torch_has_not_is_named(options, name):
    with pytest.raises(ValueError, match=rf"Received: a layer that differs by {name}$"):
        to_torch(make_layer(**options))


def test_several_attention_axes_are_named():
    layer = keras_mha.MultiHeadAttention(HEADS, WIDTH // HEADS)
    layer.build((None, 2, 3, WIDTH))
    with pytest.raises(ValueError, match=r"differs by attention_axes$"):
        to_torch(layer)


def test_int8_is_named():
    layer = make_layer()
    layer.key_dense.quantize("int8")
    with pytest.raises(ValueError, match=r"differs by quantize$"):
        to_torch(layer)


def test_all_that_is_in_the_way_is_named():
    layer = make_layer(use_gate=True, scale=1.0, logit_soft_cap=2.0)
    with pytest.raises(ValueError, match=r"use_gate, logit_soft_cap, scale$"):
        to_torch(layer)


# ------------------------------------------------------------------ wrong use


def test_module_that_keeps_its_weights_elsewhere_is_refused():
    module = torch.ao.nn.quantizable.MultiheadAttention(WIDTH, HEADS)
    with pytest.raises(TypeError, match=r"`module`.*subclass.*Quantizable"):
        from_torch(module)


@pytest.mark.parametrize(
    "module", [torch.nn.Linear(2, 2), None, torch.nn.MultiheadAttention], ids=str
)
def test_module_of_another_kind(module):
    with pytest.raises(TypeError, match=r"`module`.*torch.nn.MultiheadAttention.*type"):
        from_torch(module)


@pytest.mark.parametrize("layer", [keras.layers.Dense(2), None], ids=str)
def test_layer_of_another_kind(layer):
    with pytest.raises(TypeError, match=r"`layer`.*keras_mha.MultiHeadAttention.*type"):
        to_torch(layer)


def test_layer_without_weights():
    layer = keras_mha.MultiHeadAttention(HEADS, 4, name="fresh")
    with pytest.raises(ValueError, match=r"`layer` has no weights.*build.*'fresh'"):
        to_torch(layer)


@pytest.mark.parametrize("function", [from_torch, to_torch])
def test_missing_torch_is_named_with_its_install_line(function, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "torch" else find_spec(name, *rest),
    )
    message = rf'{function.__name__} needs torch.*pip install "keras-mha\[torch\]"'
    with pytest.raises(MissingExtra, match=message):
        function(None)
