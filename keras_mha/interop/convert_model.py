"""A copy of a Keras model with its attention layers exchanged for ours."""

from dataclasses import dataclass, field

import keras

from keras_mha.interop.keras import (
    KERAS_LAYERS,
    from_keras,
    pairs_of_parts,
    projections_of,
)
from keras_mha.interop.model_copy import ModelCopy


@dataclass
class ConversionReport:
    """What `convert_model` did; printed, it is a list to read.

    Attributes:
        replaced: Paths of the layers that were replaced.
        left_alone: Attention layers that were kept: from path to the reason.
    """

    replaced: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} attention layers replaced"]
        lines += [f"  {path}" for path in self.replaced]
        if self.left_alone:
            lines += [f"{len(self.left_alone)} left alone"]
            lines += [f"  {path}: {why}" for path, why in self.left_alone.items()]
        return "\n".join(lines)


def convert_model(model: keras.Model) -> tuple[keras.Model, ConversionReport]:
    """Makes a copy of a model that holds our layer wherever it held Keras's.

    Replaced are layers that are exactly `keras.layers.MultiHeadAttention` or
    `keras.layers.GroupQueryAttention`, wherever they are: in Functional, Sequential and
    subclassed models, nested in other layers' attributes, lists and dictionaries. What
    is shared stays shared. The copy has the weights, trainable flags, dtype policies,
    names, LoRA, and, if the model is compiled, its loss, metrics and optimizer with its
    state. Subclasses of these layers, which may lean on Keras's own methods, and layers
    that were changed by hand are copied as they are, and reported.

    The copy's outputs are the model's, except for queries that may attend to nothing
    (padded ones, say): Keras lets those attend evenly. A function that names a layer as
    a global (in a `Lambda`, say) goes on using that one.

    Args:
        model: A Keras model (or layer). It stays as it is.

    Returns:
        A pair of the copy and a `ConversionReport`, which says what was `replaced` and
        what was `left_alone` and why.

    Raises:
        TypeError: If `model` is no Keras model or layer.
        ValueError: If it holds something that cannot be copied: a function compiled of
            its own layers, or weights of a backend's own such as a `torch.nn.Module`.

    Example:

    >>> model, report = keras_mha.interop.convert_model(model)
    >>> print(report)
    2 attention layers replaced
      encoder_1/attention
      encoder_2/attention
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(
            "`model` must be a Keras model or layer. "
            f"Received: model={model!r} (of type {type(model).__name__})"
        )
    report = ConversionReport()
    return _Conversion(report).copy_apart(model), report


class _Conversion(ModelCopy):
    """A copy that exchanges attention layers on its way."""

    def __init__(self, report: ConversionReport):
        super().__init__()
        self.report = report

    def copy_layer(self, layer: keras.layers.Layer) -> keras.layers.Layer:
        if not isinstance(layer, KERAS_LAYERS):
            return super().copy_layer(layer)
        path = layer.path or layer.name
        reason = self._reason_against(layer)
        if reason is None:
            try:
                new = from_keras(layer)
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            while path in self.report.left_alone:  # without weights it is a name only
                path += "'"
            self.report.left_alone[path] = reason
            return super().copy_layer(layer)
        self.report.replaced.append(path)
        # Others may hold the layer's parts too: an optimizer its variables.
        for old_part, new_part in pairs_of_parts(layer, new):
            self.remember(old_part, new_part)
        return new

    def _reason_against(self, layer: keras.layers.Layer) -> str | None:
        """Returns why a layer is not to be replaced, or `None`."""
        if type(layer) not in KERAS_LAYERS:
            return f"a subclass, {type(layer).__name__}"
        if "call" in vars(layer):
            return "a layer with a `call` of its own"
        parts = projections_of(layer)
        other = [x for x in parts if type(x) is not keras.layers.EinsumDense]
        if other:
            return f"a layer with a {type(other[0]).__name__} as projection"
        variables = [variable for part in parts for variable in part.variables]
        if any(id(x) in self.copies for x in (*parts, *variables)):
            return "a layer that shares weights with another"
        return None
