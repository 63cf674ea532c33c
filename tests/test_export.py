"""Models that hold the layer, exported by Keras and run by the file's own runtime.

What is here works under the backend that runs. What Keras or an exporter cannot do is
at the end, as what happens with Keras's own layers too.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest

import keras_mha

RNG = np.random.default_rng(0)
BACKEND = keras.backend.backend()
OURS, KERAS = keras_mha.MultiHeadAttention, keras.layers.MultiHeadAttention
FILES = {
    "tf_saved_model": "model",
    "onnx": "model.onnx",
    "openvino": "model.xml",
    "litert": "model.tflite",
    "torch": "model.pt2",
}
# From which backends Keras exports models of plain layers, whatever the batch.
FORMATS = {
    "tensorflow": ["tf_saved_model", "onnx", "openvino", "litert"],
    "jax": ["tf_saved_model", "onnx"],
    "torch": ["onnx", "openvino", "torch"],
}[BACKEND]
# What an export needs beside the backend, and what its file is run by.
NEEDED = {
    ("tensorflow", "onnx"): ("tf2onnx", "onnxruntime"),
    ("tensorflow", "openvino"): ("openvino",),
    ("tensorflow", "litert"): ("ai_edge_litert",),
    ("jax", "tf_saved_model"): ("tensorflow",),
    ("jax", "onnx"): ("jax2onnx", "onnxruntime"),
    ("torch", "onnx"): ("onnx", "onnxscript", "onnxruntime"),
    ("torch", "openvino"): ("openvino",),
}


# Keras began with SavedModels; what came later its documentation names.
KNOWN = [
    name
    for name in FILES
    if name == "tf_saved_model" or f'"{name}"' in keras.Model.export.__doc__
]
FORMATS = [name for name in FORMATS if name in KNOWN]
EACH_FORMAT = pytest.mark.parametrize("file_format", FORMATS)


def require(file_format):
    for name in NEEDED.get((BACKEND, file_format), ()):
        pytest.importorskip(name, reason=f"exports to {file_format} need {name}")


# ---------------------------------------------------------------------- models


def self_attention(length=6, layer_class=OURS, causal=True, **arguments):
    x = keras.Input((length, 8), name="x")
    layer = layer_class(num_heads=4, key_dim=4, name="attention", **arguments)
    return with_random_weights(keras.Model(x, layer(x, x, use_causal_mask=causal)))


def cross_attention(length=6, **arguments):
    x, y = keras.Input((length, 8), name="x"), keras.Input((length, 5), name="y")
    output = OURS(4, key_dim=4, **arguments)(x, y)
    return with_random_weights(keras.Model([x, y], output))


def masked_attention(length=6, **arguments):
    """Token 0 is padding, which the embedding says and attention hears."""
    tokens = keras.Input((length,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(11, 8, mask_zero=True)(tokens)
    return with_random_weights(keras.Model(tokens, OURS(4, key_dim=4, **arguments)(x)))


def with_random_weights(model):
    for weight in model.weights:
        weight.assign(RNG.normal(size=weight.shape) * 0.5)
    return model


MODELS = {"self": self_attention, "cross": cross_attention, "mask": masked_attention}

# Every option that has code of its own between projections and scores.
OPTIONS = {
    "no bias": {
        "num_key_value_heads": 2,
        "qk_norm": "rms",
        "attention_sink": "learned",
        "logit_soft_cap": 5.0,
        "use_gate": True,
        "num_memory_key_values": 2,
        "position": lambda: keras_mha.RotaryEmbedding(
            scaling={
                "rope_type": "dynamic",
                "factor": 4.0,
                "original_max_position_embeddings": 4,
            }
        ),
    },
    "ALiBi": {"num_key_value_heads": 2, "position": keras_mha.ALiBi},
    "T5": {
        "sliding_window": 3,
        "num_memory_key_values": 2,
        "position": keras_mha.RelativePositionBias,
    },
}


def side_by_side(x, layers, **call):
    """A model of several layers, by name, which all attend within the same input: one
    file for all of them, since making a file takes seconds."""
    outputs = [layer(x, **call) for layer in layers.values()]
    return with_random_weights(keras.Model(x, keras.layers.Concatenate()(outputs)))


def made(options):
    """The options with layers of their own."""
    return {k: v() if callable(v) else v for k, v in OPTIONS[options].items()}


def inputs_of(model, batch, length=None):
    shapes = [(batch, x.shape[1] or length, *x.shape[2:]) for x in model.inputs]
    if "int" in keras.backend.standardize_dtype(model.inputs[0].dtype):
        tokens = RNG.integers(1, 11, size=shapes[0]).astype("int32")
        tokens[0, -1] = tokens[-1, :2] = 0
        return [tokens]
    return [RNG.normal(size=shape).astype("float32") for shape in shapes]


# ---------------------------------------------------------------------- files


def exported(model, file_format, folder):
    """Exports the model and returns what runs the file on NumPy arrays."""
    require(file_format)
    # For ONNX Keras wants a model that has been called.
    predicted(model, inputs_of(model, 1, length=2))
    options = {"dynamic_shapes": torch_shapes(model)} if file_format == "torch" else {}
    path = str(folder / FILES[file_format])
    model.export(path, format=file_format, verbose=False, **options)
    return RUNTIMES[file_format](path)


def torch_shapes(model):
    import torch

    batch = torch.export.Dim("batch", min=1, max=64)
    length = torch.export.Dim("length", min=1, max=4096)
    shapes = [
        {0: batch, 1: length} if x.shape[1] is None else {0: batch}
        for x in model.inputs
    ]
    return shapes[0] if len(shapes) == 1 else [(shapes,)]


def saved_model_runtime(path):
    import tensorflow as tf

    model = tf.saved_model.load(path)

    def run(arrays):
        return np.asarray(model.serve(arrays if len(arrays) > 1 else arrays[0]))

    return run


def onnx_runtime(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)

    def run(arrays):
        names = [x.name for x in session.get_inputs()]
        return session.run(None, dict(zip(names, arrays, strict=True)))[0]

    return run


def openvino_runtime(path):
    import openvino

    # On some CPUs it would compute in half types.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(path, "CPU", options)
    return lambda arrays: model(arrays)[0]


def litert_runtime(path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=path)

    def run(arrays):
        # They come in an order of their own.
        places = sorted(interpreter.get_input_details(), key=lambda x: x["name"])
        for place, array in zip(places, arrays, strict=True):
            interpreter.resize_tensor_input(place["index"], array.shape)
        interpreter.allocate_tensors()
        for place, array in zip(places, arrays, strict=True):
            interpreter.set_tensor(place["index"], array)
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    return run


def torch_runtime(path):
    import torch

    model = torch.export.load(path).module()

    def run(arrays):
        tensors = [torch.from_numpy(array) for array in arrays]
        return model(tensors if len(tensors) > 1 else tensors[0]).detach().numpy()

    return run


RUNTIMES = {
    "tf_saved_model": saved_model_runtime,
    "onnx": onnx_runtime,
    "openvino": openvino_runtime,
    "litert": litert_runtime,
    "torch": torch_runtime,
}


def predicted(model, arrays):
    tensors = [keras.ops.convert_to_tensor(array) for array in arrays]
    output = model(tensors if len(tensors) > 1 else tensors[0], training=False)
    return keras.ops.convert_to_numpy(output)


def assert_runs_alike(model, run, *shapes):
    """Each of `shapes` is a batch and, where the model leaves it open, a length."""
    for shape in shapes:
        arrays = inputs_of(model, *shape)
        np.testing.assert_allclose(run(arrays), predicted(model, arrays), atol=2e-5)


def assert_layers_run_alike(model, layers, run, *shapes):
    """As `assert_runs_alike`, of a model `side_by_side`: says which layers differ."""
    for shape in shapes:
        arrays = inputs_of(model, *shape)
        found, wanted = run(arrays), predicted(model, arrays)
        errors = np.abs(found - wanted).max(axis=tuple(range(found.ndim - 1)))
        errors = dict(zip(layers, np.split(errors, len(layers)), strict=True))
        wrong = {name: error.max() for name, error in errors.items()}
        assert all(error < 2e-5 for error in wrong.values()), wrong


# ---------------------------------------------------------------------- exports


@EACH_FORMAT
@pytest.mark.parametrize("kind", MODELS)
def test_a_file_takes_any_batch(file_format, kind, tmp_path):
    model = MODELS[kind]()
    run = exported(model, file_format, tmp_path)
    assert_runs_alike(model, run, (1,), (3,))


POSITIONS_OF_IMAGES = {
    "rotary": lambda: keras_mha.RotaryEmbedding(rotary_dim=4, axes=2),
    "mixed rotary": keras_mha.MixedRotaryEmbedding,
    "ALiBi": lambda: keras_mha.ALiBi(axes=2),
    "window": lambda: keras_mha.RelativePositionBias(window=(4, 3)),
}


@EACH_FORMAT
def test_positions_over_several_axes_are_exported(file_format, tmp_path):
    layers = {
        name: OURS(4, key_dim=4, position=position())
        for name, position in POSITIONS_OF_IMAGES.items()
    }
    model = side_by_side(keras.Input((3, 2, 8), name="x"), layers)
    run = exported(model, file_format, tmp_path)
    assert_layers_run_alike(model, layers, run, (1,), (3,))


# TensorFlow's tiles of a length not known yet are slow to convert, and are looked at
# below; jax2onnx 0.17 counts positions (`jax.numpy.arange`) only up to a known one.
# PyTorch's models are traced on a length of 1, of which nothing may be kept.
@EACH_FORMAT
def test_options_are_exported(file_format, tmp_path):
    is_open = BACKEND == "torch" or (BACKEND, file_format) == ("jax", "tf_saved_model")
    x = keras.Input((None if is_open else 6, 8), name="x")
    layers = {name: OURS(4, key_dim=4, **made(name)) for name in OPTIONS}
    model = side_by_side(x, layers, use_causal_mask=True)
    run = exported(model, file_format, tmp_path)
    assert_layers_run_alike(model, layers, run, (1, 5), (2, 9))


# TensorFlow's tiles take long to be converted: LiteRT has the masks, the rest has none.
# By jax2onnx a causal mask, which counts positions, needs a known length.
LEFT_OUT = {
    "tensorflow": lambda name, kind: (kind == "mask") != (name == "litert"),
    "jax": lambda name, kind: name == "onnx" and kind == "self",
    "torch": lambda name, kind: False,
}[BACKEND]
LENGTHS = [(x, kind) for x in FORMATS for kind in MODELS if not LEFT_OUT(x, kind)]


@pytest.mark.parametrize(("file_format", "kind"), LENGTHS)
def test_a_file_takes_any_length(file_format, kind, tmp_path):
    arguments = {}
    if BACKEND == "tensorflow" and file_format in ("onnx", "openvino"):
        # TensorFlow takes loops over tiles for a length not known yet. tf2onnx makes no
        # file of them, and OpenVINO takes its time. The reference has none.
        arguments = {"flash_attention": False}
    model = MODELS[kind](length=None, **arguments)
    run = exported(model, file_format, tmp_path)
    assert_runs_alike(model, run, (1, 5), (2, 9))


# ---------------------------------------------------------------------- long


TILED = {  # what exporters make of loops over tiles; the others only know whole scores
    "tensorflow": ["tf_saved_model", "litert"],
    "jax": ["tf_saved_model"],
    "torch": FORMATS,
}[BACKEND]


@pytest.mark.parametrize("file_format", [x for x in FORMATS if x in TILED])
def test_a_long_sequence_is_exported_without_whole_scores(file_format, tmp_path):
    model = self_attention(length=1100, sliding_window=64, flash_attention=True)
    run = exported(model, file_format, tmp_path)
    assert_runs_alike(model, run, (1,))


@EACH_FORMAT
def test_a_long_sequence_is_exported_with_whole_scores(file_format, tmp_path):
    model = self_attention(length=1100, flash_attention=False)
    run = exported(model, file_format, tmp_path)
    assert_runs_alike(model, run, (2,))


# ---------------------------------------------------------------------- LoRA, int8


def with_lora(model):
    layer = model.get_layer("attention")
    for dense in (layer._query_dense, layer._value_dense, layer._output_dense):
        dense.enable_lora(2)
    return with_random_weights(model)


def with_int8(model):
    model.quantize("int8")
    return model


def comes_out(changed, layer_class, file_format, folder):
    """Whether the export works and its file gives the model's numbers."""
    folder.mkdir()
    try:
        model = changed(self_attention(layer_class=layer_class))
        run = exported(model, file_format, folder)
        assert_runs_alike(model, run, (2,))
    except Exception:  # each exporter raises errors of its own kind
        return False
    return True


@EACH_FORMAT
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("changed", [with_lora, with_int8])
def test_lora_and_int8_are_exported_where_keras_layer_is(
    changed, file_format, tmp_path
):
    require(file_format)
    ours = comes_out(changed, OURS, file_format, tmp_path / "ours")
    assert ours or not comes_out(changed, KERAS, file_format, tmp_path / "theirs")


# ---------------------------------------------------------------------- limits


def plain_layer():
    return keras.Sequential([keras.Input((6, 8)), keras.layers.Dense(3)])


REFUSED = {"jax": ["litert", "torch"], "tensorflow": ["torch"]}.get(BACKEND, [])


@pytest.mark.parametrize("file_format", [x for x in REFUSED if x in KNOWN])
def test_keras_refuses_formats_of_other_backends(file_format, tmp_path):
    with pytest.raises(ValueError, match="backend"):
        self_attention().export(tmp_path / FILES[file_format], format=file_format)


NOT_EVEN_PLAIN = {"jax": ["openvino"], "torch": ["tf_saved_model"]}.get(BACKEND, [])


@pytest.mark.parametrize("file_format", [x for x in NOT_EVEN_PLAIN if x in KNOWN])
def test_keras_exports_no_plain_layer_either(file_format, tmp_path):
    """Keras 3.15: OpenVINO 2026.4 lacks what JAX exports; PyTorch 2.13 refuses."""

    def error(model):
        with pytest.raises(Exception) as raised:
            path = str(tmp_path / FILES[file_format])
            model.export(path, format=file_format, verbose=False)
        return raised.type

    assert error(self_attention()) is error(plain_layer())
