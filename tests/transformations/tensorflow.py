"""TensorFlow's transformations of a program, none of which knows a batch or length.

Graphs take long to make: those of tiles are made with gradients, and one tile, which a
short call has, is looked at in the file that is saved.
"""

from __future__ import annotations

import tempfile

import keras

from tests.helpers import to_numpy
from tests.transformations.program import CACHE, is_shared, tensors, total
from tests.transformations.transformation import LONG, SHORT, Transformation


def unknown(program):
    """The program's inputs as a signature: only the width of features is known, and
    of a cache, which is made of fixed size, all but the batch."""
    import tensorflow as tf

    def shape(name, array):
        if name.startswith(CACHE):
            return (None, *array.shape[1:])
        width = array.shape[-1] if name in ("query", "value", "key") else None
        return (*[None] * (array.ndim - 1), width)

    return {
        name: tf.TensorSpec(
            shape(name, array), array.dtype, name=name.replace(" ", "_")
        )
        for name, array in program.inputs.items()
    }


def function(program, xla=False):
    import tensorflow as tf

    def run(inputs):
        floats = {k: inputs[k] for k in program.floats if not is_shared(k)}
        weights = [variable.value for variable in program.layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(floats)
            outputs = program(inputs)
            loss = total(outputs)
        sources = [*floats.values(), *weights]
        return [*outputs, *map(tf.convert_to_tensor, tape.gradient(loss, sources))]

    program.reset()
    compiled = tf.function(
        run, input_signature=[unknown(program)], jit_compile=xla or None
    )
    return [to_numpy(x) for x in compiled(tensors(program.inputs))]


def with_xla(program):
    return function(program, xla=True)


def saved_model(program):
    import tensorflow as tf

    program.reset()
    archive = keras.export.ExportArchive()
    archive.track(program.layer)
    archive.add_endpoint("serve", program, input_signature=[unknown(program)])
    with tempfile.TemporaryDirectory() as folder:
        archive.write_out(folder, verbose=False)
        saved = tf.saved_model.load(folder)
        return [to_numpy(x) for x in saved.serve(tensors(program.inputs))]


TRANSFORMATIONS = {
    "tf.function": Transformation(function, "gradients", lengths=(LONG,)),
    "jit_compile=True": Transformation(with_xla, "gradients", lengths=(LONG,)),
    "SavedModel": Transformation(saved_model, "outputs", lengths=(SHORT,)),
}
